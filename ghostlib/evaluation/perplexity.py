"""Evaluation: what a model, dense or recovered, makes of held-out text."""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import track
from ghostlib.models.architectures import head
from ghostlib.models.placement import input_device
from ghostlib.models.streams import check_windows, final_hidden
from ghostlib.text.corpora import CORPORA, tokenised
from ghostlib.text.tokens import SEPARATOR

_CHUNK = 256  # tokens whose logits exist at once: 256 x 150,000 words x 4 bytes = 150 MB


def window_losses(model: PreTrainedModel, windows: Tensor, *, batch_size: int = 1) -> Tensor:
    """Mean negative log-likelihood per predicted token (nats) of each window.

    Every window is scored by itself; its first token is context only, so that ``length - 1`` tokens
    are predicted. The head is computed in chunks of tokens, in float32.

    Args:
        model: any causal LM this package supports.
        windows: (windows, length) token ids. batch_size: windows per forward pass.

    Returns:
        float64 tensor (windows,).

    Raises:
        ValueError: windows that do not fit the model, or of fewer than two tokens.
    """
    check_windows(model, windows)
    if windows.shape[1] < 2:
        raise ValueError("windows of one token predict nothing: use a length of at least 2")
    losses = []
    for ids in track(windows.split(batch_size), "scoring", unit="batch"):
        losses.append(token_losses(model, final_hidden(model, ids), ids).mean(1))
    return torch.cat(losses)


@torch.no_grad()
def token_losses(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood (nats) of every token but the first, from what the head receives.

    Args:
        hidden: (windows, length, hidden), see `final_hidden`. ids: (windows, length) token ids.

    Returns:
        float64 tensor (windows, length - 1) on the CPU.
    """
    flat, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    losses = [
        nn.functional.cross_entropy(
            (logits := head(model, h).float()), y.to(logits.device), reduction="none"
        )
        for h, y in zip(flat.split(_CHUNK), targets.split(_CHUNK), strict=True)
    ]
    return torch.cat(losses).double().view(len(ids), -1).cpu()


def perplexity(model: PreTrainedModel, windows: Tensor, *, batch_size: int = 1) -> float:
    """``exp`` of the mean negative log-likelihood over all windows; see `window_losses`."""
    return math.exp(float(window_losses(model, windows, batch_size=batch_size).mean()))


def gap_closed(dense: float, pruned: float, recovered: float) -> float:
    """Share of the log-perplexity lost by pruning that recovery wins back (1 = all, < 0 = harm).

    Args:
        dense, pruned, recovered: perplexities of the three models on the same windows.

    Raises:
        ValueError: pruning lost nothing.
    """
    if not pruned > dense:
        raise ValueError(
            f"pruned perplexity {pruned:.4g} is not above dense {dense:.4g}: no gap to close"
        )
    return math.log(pruned / recovered) / math.log(pruned / dense)


Message = dict[str, str]  # {"role": "user", "content": …}


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 40,
    chat: bool = False,
) -> list[str]:
    """Continue each prompt greedily; returns the continuations alone.

    Prompts of different lengths are padded on the left, as a decoder-only model needs, whatever
    side the tokenizer pads on.

    Args:
        prompts: a text, or several. With ``chat`` each may also be a list of messages, and a list
            of messages alone is one prompt.
        max_new_tokens: tokens to generate at most.
        chat: put each prompt into the tokenizer's chat template, as instruct models need; a text
            becomes the message of a user.

    Raises:
        ValueError: no prompt, ``chat`` without a chat template, messages without ``chat``, or a
            tokenizer that has nothing to pad with.
    """
    several: Any = [prompts] if isinstance(prompts, str) else list(prompts)
    if not several:
        raise ValueError("no prompt to continue: give at least one text")
    texts = _in_template(tokenizer, several) if chat else several
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("prompts made of messages need chat=True; without it, give texts")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "this tokenizer has neither a padding nor an end token: set tokenizer.pad_token"
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,  # decoders have no use for them, and generate refuses them
        add_special_tokens=not chat,  # a template brings its own
    )
    generator: Any = model
    with torch.no_grad():
        out = generator.generate(
            **batch.to(input_device(model)),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _in_template(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> list[str]:
    """Each prompt, a text or a list of messages, as the tokenizer's chat template writes it."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "this tokenizer has no chat template: use chat=False, or set tokenizer.chat_template"
        )
    if isinstance(prompts[0], dict):
        prompts = [prompts]
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)


# Byte-level vocabularies write every byte of a token as one of 256 letters.
_BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())
_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


class Choice(NamedTuple):
    """Which part of a corpus is scored: a split, and how many windows of it (None for all)."""

    split: str
    windows: int | None


# WikiText-2 and Penn Treebank whole; of C4's validation split, which is large, the first 256
# windows, the number that evaluation code for compressed models has used since GPTQ.
PUBLISHED = {
    "wikitext2": Choice("test", None),
    "ptb": Choice("validation", None),
    "c4": Choice("validation", 256),
}


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, and all one must know to measure it again.

    Attributes:
        corpus, split: the text; of a local file its name without folders.
        perplexity: ``exp(nll)``.
        nll: mean negative log-likelihood of a scored token, in nats.
        nll_se: its standard error over windows; None for a single window.
        bits_per_byte: bits spent on the scored tokens, by the UTF-8 bytes these cover; None where
            the tokenizer does not say what they cover.
        windows, length: how many windows, of how many tokens.
        tokens: scored ones, ``windows * (length - 1)``.
        bytes: covered by the scored tokens.
        separator: between documents.
        special_tokens: what the tokenizer added to the text, as text.
        window_nll: ``nll`` of each window, to compare models window by window.
    """

    corpus: str
    split: str
    perplexity: float
    nll: float
    nll_se: float | None
    bits_per_byte: float | None
    windows: int
    length: int
    tokens: int
    bytes: int | None
    separator: str
    special_tokens: Sequence[str]
    window_nll: Sequence[float]


@dataclass(frozen=True)
class ScoredText:
    """Held-out windows of a corpus, and what a perplexity on them must say; see `scored_text`.

    Attributes:
        corpus: its name; of a local file the name without folders.
        split: which part of the corpus.
        windows: (windows, length) token ids.
        bytes: UTF-8 bytes that the scored tokens cover; None where the tokenizer does not say.
        special_tokens: what the tokenizer added to the text, as text.
    """

    corpus: str
    split: str
    windows: Tensor
    bytes: int | None
    special_tokens: Sequence[str]

    def perplexity(self, losses: Tensor) -> Perplexity:
        """The perplexity that the losses (windows,) of these windows make, see `window_losses`."""
        nll, tokens = float(losses.mean()), self.windows[:, 1:].numel()
        error = float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else None
        return Perplexity(
            corpus=self.corpus,
            split=self.split,
            perplexity=math.exp(nll),
            nll=nll,
            nll_se=error,
            bits_per_byte=nll * tokens / math.log(2) / self.bytes if self.bytes else None,
            windows=len(self.windows),
            length=self.windows.shape[1],
            tokens=tokens,
            bytes=self.bytes,
            separator=SEPARATOR,
            special_tokens=self.special_tokens,
            window_nll=losses.tolist(),
        )


def scored_text(
    tokenizer: PreTrainedTokenizerBase,
    corpus: str | Path,
    *,
    split: str | None = None,
    length: int = 2048,
    count: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    special_tokens: bool = True,
) -> ScoredText:
    """The windows of a corpus that `corpus_perplexity` scores, with its arguments and errors."""
    usual = PUBLISHED.get(str(corpus), Choice("test", None))
    split = split or usual.split
    windows, text = tokenised(
        corpus,
        tokenizer,
        split=split,
        length=length,
        count=usual.windows if count is None else count,
        seed=seed,
        text_column=text_column,
        special_tokens=special_tokens,
    )
    sizes = token_bytes(tokenizer, text, special_tokens=special_tokens)
    covered = None
    if sizes is not None:
        covered = int(sizes[: windows.numel()].reshape(windows.shape)[:, 1:].sum())
    added = _added(tokenizer) if special_tokens else []
    return ScoredText(_name(corpus), split, windows, covered, added)


def corpus_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str | Path,
    *,
    split: str | None = None,
    length: int = 2048,
    count: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    special_tokens: bool = True,
    batch_size: int = 1,
) -> Perplexity:
    """Perplexity and bits per byte of a model on a corpus, by the protocol of this module.

    Args:
        model: any causal LM, dense or recovered, of any dtype and on any device.
        tokenizer: its tokenizer.
        corpus: a name, a hub dataset or a path, as for `ghostlib.documents`.
        split: by default that of `PUBLISHED`, and ``"test"`` for other corpora; ``"all"`` for the
            whole of a local file.
        length: tokens of a window.
        count: the first so many windows; by default as in `PUBLISHED`, and all of other corpora.
        seed, text_column: see `ghostlib.documents`.
        special_tokens: let the tokenizer add its own (a BOS for Llama, nothing for SmolLM2), once,
            at the beginning of the corpus and not of every window, as published.
        batch_size: windows in a forward pass.

    Raises:
        ValueError: less text than one window, and whatever `ghostlib.token_windows` refuses.
        ConnectionError: a hub corpus that cannot be reached.
    """
    text = scored_text(
        tokenizer,
        corpus,
        split=split,
        length=length,
        count=count,
        seed=seed,
        text_column=text_column,
        special_tokens=special_tokens,
    )
    return text.perplexity(window_losses(model, text.windows, batch_size=batch_size))


def token_bytes(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = False
) -> np.ndarray | None:
    """UTF-8 bytes of ``text`` that each of its tokens covers, 0 for one the tokenizer adds.

    Exact for byte-level vocabularies and for those that fall back to bytes, which may cut through
    a character. Bytes that no token covers, such as white space that is dropped, go to the token
    before them.

    Returns:
        Integers (tokens,); None for a tokenizer that keeps no track of the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    found = tokenizer(
        text,
        add_special_tokens=special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    pieces: list[str] = tokenizer.convert_ids_to_tokens(found["input_ids"])
    spans = np.array(found["offset_mapping"], dtype=int).reshape(-1, 2)
    added = np.array(found["special_tokens_mask"], dtype=bool) & (spans[:, 0] == spans[:, 1])
    written = ["" if a else p for p, a in zip(pieces, added, strict=True)]
    if "".join(p if _BYTES.issuperset(p) else _letters(p) for p in written) == _letters(text):
        return np.array([len(p) if _BYTES.issuperset(p) else len(_letters(p)) for p in written])

    sizes = np.zeros(len(pieces), dtype=int)
    per_character = [len(character.encode("utf-8", "surrogatepass")) for character in text]
    until = np.concatenate([[0], np.cumsum(per_character)]).astype(int)
    starts = until[spans[~added, 0]]
    sizes[~added] = np.diff(np.concatenate([[0], starts[1:], until[-1:]]))
    # The pieces of a character that fell back to bytes all have the span of that character.
    alone = np.array([bool(re.fullmatch("<0x[0-9A-F]{2}>", p)) for p in pieces], dtype=bool)
    return np.where(alone, 1, sizes)


def _letters(text: str) -> str:
    """Text as byte-level vocabularies write it, one letter a byte."""
    return "".join(piece for piece, _ in _LEVEL.pre_tokenize_str(text))


def _added(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a tokenizer adds to a text, as text."""
    added: list[str] = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
    return added


def _name(corpus: str | Path) -> str:
    """A corpus as results name it: of a local path only the last part."""
    local = str(corpus) not in CORPORA and Path(corpus).expanduser().exists()
    return Path(corpus).name if local else str(corpus)
