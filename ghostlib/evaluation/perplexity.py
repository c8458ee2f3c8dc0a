"""Perplexity: on windows of tokens, and on a corpus by the published protocol."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import at_least, checked, track
from ghostlib.models.streams import check_scored, final_hidden, head
from ghostlib.text.corpora import CORPORA, tokenised
from ghostlib.text.tokens import SEPARATOR, bos_token, encode

NOT_FINITE = (
    "a weight or an operator of the model is not finite, or its activations overflow its dtype: "
    "check the weights, or load the model in float32"
)
_CHUNK = 256  # tokens whose logits exist at once: 256 x 150,000 words x 4 bytes = 150 MB


@checked
def window_losses(model: PreTrainedModel, windows: Tensor, *, batch_size: int = 1) -> Tensor:
    """Mean negative log-likelihood per predicted token (nats) of each window.

    Every window is scored by itself; its first token is context only, so that ``length - 1`` tokens
    are predicted. The head is computed in chunks of tokens, in float32. Without soft-capping this
    equals ``model(window, labels=window).loss``.

    Args:
        model: any causal LM this package supports; it is scored in evaluation mode, and its own
            mode is restored.
        windows: (windows, length) token ids.
        batch_size: windows per forward pass.

    Returns:
        float64 tensor (windows,) on the CPU.

    Raises:
        ValueError: windows that do not fit the model or have fewer than two tokens; a loss that is
            infinite or not a number.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 97}
    >>> config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    >>> windows = torch.randint(97, (3, 12))
    >>> window_losses(LlamaForCausalLM(config), windows).shape
    torch.Size([3])
    """
    check_scored(model, windows)
    at_least(1, batch_size=batch_size)
    batches = track(torch.split(windows, batch_size), "scoring", unit="batch")
    parts = [token_losses(model, final_hidden(model, ids), ids).mean(1) for ids in batches]
    losses = torch.cat(parts)
    if not losses.isfinite().all():
        bad = int((~losses.isfinite()).nonzero()[0])
        raise ValueError(f"the loss of window {bad} is {float(losses[bad])}; {NOT_FINITE}")
    return losses


@torch.no_grad()
def token_losses(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood (nats) of every token but the first, from the input of the head.

    Args:
        hidden: (windows, length, hidden), see `final_hidden`.
        ids: (windows, length) token ids.

    Returns:
        float64 tensor (windows, length - 1) on the CPU.
    """
    flat, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    losses = []
    for h, y in zip(torch.split(flat, _CHUNK), torch.split(targets, _CHUNK), strict=True):
        logits = head(model, h).float()
        losses.append(nn.functional.cross_entropy(logits, y.to(logits.device), reduction="none"))
    return torch.cat(losses).double().view(len(ids), -1).cpu()


@checked
def perplexity(model: PreTrainedModel, windows: Tensor, *, batch_size: int = 1) -> float:
    """``exp`` of the mean negative log-likelihood over all windows; infinite beyond e^709.

    Arguments and errors are those of `window_losses`.
    """
    return float(window_losses(model, windows, batch_size=batch_size).mean().exp())


@checked
def gap_closed(dense: float, pruned: float, recovered: float) -> float:
    """Share of the log-perplexity lost by pruning that recovery wins back (1 = all, < 0 = harm).

    It measures running text alone; `ghostlib.abilities` shows what else was lost.

    Args:
        dense: perplexity of the dense model.
        pruned: perplexity of the pruned model, on the same windows.
        recovered: perplexity of the recovered model, on the same windows.

    Raises:
        ValueError: pruning lost nothing, or a value that is not positive and finite.

    >>> round(gap_closed(dense=10, pruned=40, recovered=20), 2)
    0.5
    """
    for name, value in (("dense", dense), ("pruned", pruned), ("recovered", recovered)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a perplexity, positive and finite, got {value}")
    if not pruned > dense:
        raise ValueError(
            f"pruned perplexity {pruned:.4g} is not above dense {dense:.4g}: no gap to close"
        )
    return math.log(pruned / recovered) / math.log(pruned / dense)


# The published split and number of windows (None for all): all of WikiText-2 and Penn Treebank; the
# first 256 of C4's large validation split, as evaluation code for compressed models has done since
# GPTQ.
PUBLISHED: dict[str, tuple[str, int | None]] = {
    "wikitext2": ("test", None),
    "ptb": ("validation", None),
    "c4": ("validation", 256),
}


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, and the settings that reproduce it.

    Attributes:
        corpus: name of the text, without folders for a local file.
        split: split of the corpus.
        perplexity: ``exp(nll)``; infinite beyond e^709.
        nll: mean negative log-likelihood of a scored token, in nats.
        nll_se: its standard error over windows; None for a single window.
        bits_per_byte: bits of the scored tokens, divided by the UTF-8 bytes they cover; None for a
            tokenizer without offsets.
        windows: number of windows.
        length: tokens per window.
        tokens: number of scored tokens, ``windows * (length - 1)``.
        bytes: bytes that the scored tokens cover.
        separator: text between documents.
        bos: first token of every window, which is not scored; None without one.
        special_tokens: tokens that the tokenizer added once, to the whole corpus.
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
    bos: str | None
    special_tokens: Sequence[str]
    window_nll: Sequence[float]


@dataclass(frozen=True)
class ScoredText:
    """Held-out windows of a corpus, and their settings; see `scored_text`.

    Attributes:
        windows: (windows, length) token ids; the other attributes are those of `Perplexity`.
    """

    corpus: str
    split: str
    windows: Tensor
    bytes: int | None
    bos: str | None
    special_tokens: Sequence[str]

    def perplexity(self, losses: Tensor) -> Perplexity:
        """The perplexity from the losses (windows,) of these windows, see `window_losses`."""
        nll, tokens = float(losses.mean()), self.windows[:, 1:].numel()
        count, length = self.windows.shape
        return Perplexity(
            **vars(self) | {"windows": count, "length": length, "separator": SEPARATOR},
            perplexity=float(losses.mean().exp()),
            nll=nll,
            nll_se=float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else None,
            bits_per_byte=nll * tokens / math.log(2) / self.bytes if self.bytes else None,
            tokens=tokens,
            window_nll=losses.tolist(),
        )


@checked
def scored_text(
    tokenizer: PreTrainedTokenizerBase,
    corpus: str | Path,
    *,
    split: str | None = None,
    length: int = 2048,
    count: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    bos: bool | None = None,
) -> ScoredText:
    """The windows of a corpus that `corpus_perplexity` scores; its arguments and errors."""
    published_split, published_count = PUBLISHED.get(str(corpus), ("test", None))
    split = split or published_split
    count = published_count if count is None else count
    first = bos_token(tokenizer, bos)
    reading: dict[str, Any] = {"split": split, "seed": seed, "text_column": text_column, "bos": bos}
    windows, text = tokenised(
        corpus, tokenizer, length=length, count=count, special_tokens=first is None, **reading
    )
    special: list[str] = []
    if first is None:
        special = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
    sizes, covered = token_bytes(tokenizer, text), None
    if sizes is not None and first is None:
        sizes = np.concatenate([np.zeros(len(special), dtype=int), sizes])[: windows.numel()]
        covered = int(sizes.reshape(windows.shape)[:, 1:].sum())
    elif sizes is not None:  # every token but the first of a window is from the text
        covered = int(sizes[: windows[:, 1:].numel()].sum())
    local = str(corpus) not in CORPORA and Path(corpus).expanduser().exists()
    name = Path(corpus).name if local else str(corpus)
    return ScoredText(name, split, windows, covered, first, special)


@checked
def corpus_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str | Path,
    *,
    batch_size: int = 1,
    **options: Any,
) -> Perplexity:
    """Perplexity and bits per byte of a model on a corpus; ``bos=False`` is the published protocol.

    The documents, joined by a blank line, are tokenised as one text and cut into windows without
    overlap, each scored by itself (as in the evaluation code of GPTQ, arXiv 2210.17323, and the
    papers that follow it).

    Args:
        model: any causal LM, dense or recovered, of any dtype and on any device.
        tokenizer: its tokenizer.
        corpus: a name, a hub dataset or a path, as for `ghostlib.documents`.
        batch_size: windows per forward pass.
        split: by default as in `PUBLISHED`, and ``"test"`` for other corpora; ``"all"`` for the
            whole of a local file.
        length: tokens per window; 2,048 by default.
        count: number of windows from the first; by default as in `PUBLISHED`, and all of other
            corpora.
        seed, text_column: see `ghostlib.documents`.
        bos: whether every window begins with BOS, which a model trained with one needs; by default
            if the tokenizer adds one. With False, as published, special tokens of the tokenizer (a
            BOS for Llama, none for SmolLM2) stand once, at the beginning of the corpus.

    Raises:
        ValueError: less text than one window, and as `ghostlib.token_windows` and `window_losses`.
        ConnectionError: a hub corpus that cannot be reached.
    """
    text = scored_text(tokenizer, corpus, **options)
    return text.perplexity(window_losses(model, text.windows, batch_size=batch_size))


def token_bytes(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray | None:
    """UTF-8 bytes of ``text`` that each of its tokens covers.

    They add up to the bytes of the text: dropped characters, such as white space, count for the
    token before them, and a character that several tokens share for the last of them.

    Returns:
        Integers (tokens,); None for a tokenizer without offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    spans = encode(tokenizer, text, return_offsets_mapping=True)["offset_mapping"]
    characters = [len(character.encode("utf-8", "surrogatepass")) for character in text]
    offsets = np.concatenate([[0], np.cumsum(characters)]).astype(int)  # of characters, in bytes
    starts = offsets[[start for start, _ in spans]]
    edges = np.concatenate([[0], starts[1:], offsets[-1:]])
    return np.diff(edges[: len(spans) + 1])  # an empty text has the first edge alone
