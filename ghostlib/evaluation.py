"""Evaluation: what a model, dense or recovered, makes of held-out text."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.calibration import check_windows
from ghostlib.models import final_hidden, head
from ghostlib.placement import input_device
from ghostlib.progress import track

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
