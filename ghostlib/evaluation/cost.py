"""Cost: parameters, operations and cache counted from the model; time measured on the machine.

One multiply-add is two FLOPs. Matrix products are counted and nothing else: the rest (norms,
activations, softmax, rotations) is linear in the width. Attention is counted as if every new token
met every key in reach of the cache, masked or not, which is what a plain implementation computes
and what `torch.utils.flop_counter` counts; kernels that skip the masked half do less.
"""

import inspect
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ghostlib.common import track
from ghostlib.models.architectures import attentions, hidden_size
from ghostlib.surgery.ghosted import BoundaryModule


class Flops(NamedTuple):
    """Floating-point operations of one forward pass, by what they are spent on.

    Attributes:
        attention: projections, and the products of queries, keys and values.
        mlp: feed-forward layers, and any projection that belongs nowhere else.
        boundary: operators of a recovered model.
        head: logits.
    """

    attention: int
    mlp: int
    boundary: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def count_parameters(model: PreTrainedModel) -> int:
    """Number of parameters; a tied weight counts once."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters, each in its own dtype; a tied weight counts once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def cache_bytes(model: PreTrainedModel, tokens: int, *, batch_size: int = 1) -> int:
    """Bytes of the keys and values kept after ``tokens`` tokens, in the model's dtype.

    A layer with a sliding window keeps no more than the next token can see; a boundary that reads
    the token before keeps that one.

    Raises:
        ValueError: ``tokens`` is negative or ``batch_size`` below 1.
    """
    _at_least(0, tokens=tokens)
    _at_least(1, batch_size=batch_size)
    numbers = sum(2 * a.kv_heads * a.head_dim * a.cached(tokens) for a in attentions(model))
    numbers += len(getattr(model, "looking_back", ())) * hidden_size(model) * (tokens > 0)
    return batch_size * numbers * model.dtype.itemsize


def flops(
    model: PreTrainedModel, tokens: int, *, context: int = 0, batch_size: int = 1, logits: int = 1
) -> Flops:
    """Count one forward pass of ``tokens`` new tokens after ``context`` tokens in the cache.

    ``flops(model, 2048)`` is a prefill, ``flops(model, 1, context=2048)`` the next token.
    Every matrix that is not looked up row by row multiplies every token once.

    Args:
        logits: positions whose logits are computed; ``generate`` asks for the last alone.

    Raises:
        ValueError: a negative ``context`` or ``logits``, or ``tokens`` or ``batch_size`` below 1.
    """
    _at_least(1, tokens=tokens, batch_size=batch_size)
    _at_least(0, context=context, logits=logits)
    layers = attentions(model)
    attention = sum(_weights(a.module) for a in layers)
    boundary = sum(_weights(m) for m in model.modules() if isinstance(m, BoundaryModule))
    head = _weights(model.get_output_embeddings())
    mlp = _weights(model) - attention - boundary - head
    pairs = sum(  # (query, key) pairs, times the numbers of a key and of a value
        2 * a.heads * a.head_dim * tokens * (a.cached(context) + tokens) for a in layers
    )
    return Flops(
        attention=2 * batch_size * (tokens * attention + pairs),
        mlp=2 * batch_size * tokens * mlp,
        boundary=2 * batch_size * tokens * boundary,
        head=2 * batch_size * logits * head,
    )


def _weights(module: nn.Module) -> int:
    """Numbers in the matrices of ``module`` that multiply activations."""
    return sum(
        parameter.numel()
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
        if parameter.ndim == 2
    )


class Spread(NamedTuple):
    """Seconds over several rounds: their median, and the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Spread":
        """Summarise measurements."""
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


class Latency(NamedTuple):
    """What one model took.

    Attributes:
        prefill: seconds from the prompt to the first new token's logits.
        decode: seconds per step after that, which gives every sequence of the batch one more token.
        peak_bytes: largest memory allocated on a CUDA device beyond what it held before (weights),
            that is, activations and cache; None without such a device.
    """

    prefill: Spread
    decode: Spread
    peak_bytes: int | None


def latency(
    models: Mapping[str, PreTrainedModel],
    prompt_tokens: int = 512,
    new_tokens: int = 16,
    *,
    batch_size: int = 1,
    warmup: int = 1,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Latency]:
    """Time several models in turn, so that a machine that slows down slows all of them alike.

    In every round each model reads the same random prompt and continues it greedily, one token at a
    time. Clocks are read when the devices have finished.

    Args:
        models: ``{name: model}``; they are not changed.
        prompt_tokens, new_tokens, batch_size: size of the task.
        warmup: rounds that are not counted. repeats: rounds that are.
        seed: of the prompt.

    Raises:
        ValueError: no model, a size below 1, a negative ``warmup``, or more tokens than a model has
            positions.
    """
    if not models:
        raise ValueError("no model to time: name at least one")
    _at_least(
        1,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
    )
    _at_least(0, warmup=warmup)
    for name, model in models.items():
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and prompt_tokens + new_tokens > positions:
            raise ValueError(
                f"{prompt_tokens} + {new_tokens} tokens exceed the {positions} positions of "
                f"{name!r}: shorten the prompt"
            )
    words = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(words, (batch_size, prompt_tokens), generator=generator)
    rounds: dict[str, list[tuple[float, float, int | None]]] = {name: [] for name in models}
    for turn in track(range(warmup + repeats), "timing", unit="round"):
        for name, model in models.items():
            measured = _measure(model, prompt, new_tokens)
            if turn >= warmup:
                rounds[name].append(measured)
    return {
        name: Latency(
            Spread.of(prefill for prefill, _, _ in taken),
            Spread.of(decode for _, decode, _ in taken),
            max((peak for *_, peak in taken if peak is not None), default=None),
        )
        for name, taken in rounds.items()
    }


@torch.no_grad()
def _measure(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int
) -> tuple[float, float, int | None]:
    """Seconds of one prefill, seconds per decoded token, and peak memory."""
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    cuda = [device for device in devices if device.type == "cuda"]
    # The cache has got another name in the course of transformers 5.
    named = inspect.signature(model.forward).parameters
    cache = {"cache" if "cache" in named else "past_key_values": DynamicCache(config=model.config)}
    options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1, **cache}
    prompt = prompt.to(model.device)

    _synchronize(devices)
    before = {device: torch.cuda.memory_allocated(device) for device in cuda}
    for device in cuda:
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    logits = model(prompt, **options).logits
    _synchronize(devices)
    read = time.perf_counter()
    for _ in range(new_tokens):
        logits = model(logits[:, -1:].argmax(-1), **options).logits
    _synchronize(devices)
    end = time.perf_counter()
    peak = sum(torch.cuda.max_memory_allocated(d) - held for d, held in before.items())
    return read - begin, (end - read) / new_tokens, peak if cuda else None


def _synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until every accelerator has finished what it was given."""
    for device in devices:
        torch.accelerator.synchronize(device)


def _at_least(least: int, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
