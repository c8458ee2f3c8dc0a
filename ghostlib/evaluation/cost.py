"""Cost: parameters, operations and cache are counted on a copy without weights, time is measured.

One multiply-add is two FLOPs. Only matrix products are counted: the rest (norms, activations,
softmax, rotations) is linear in the width. Attention is counted as if every new token attended to
every key in the cache, masked or not, as a plain implementation computes it; kernels that skip the
masked half compute less.
"""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from ghostlib.common import at_least, checked, track
from ghostlib.models.architectures import cached, check_model, decoder_layers, text_config
from ghostlib.models.placement import input_device
from ghostlib.models.shapes import cached_tensors, read, without_weights
from ghostlib.models.streams import evaluating, known_positions
from ghostlib.surgery.ghosted import BoundaryModule


class Flops(NamedTuple):
    """Floating-point operations of one forward pass, by part of the model.

    Attributes:
        attention: projections, and the products of queries, keys and values.
        mlp: feed-forward layers, and all other projections.
        boundary: operators of a recovered model.
        head: logits.
    """

    attention: int
    mlp: int
    boundary: int
    head: int

    @property
    def total(self) -> int:
        """Sum of the four."""
        return sum(self)


def count_parameters(model: PreTrainedModel) -> int:
    """Number of parameters; a tied weight counts once. `ValueError` unless it is a model."""
    check_model(model)
    return sum(p.numel() for p in model.parameters())


@checked
def cache_bytes(model: PreTrainedModel, tokens: int, *, batch_size: int = 1) -> int:
    """Bytes of the keys, values and states cached after ``tokens`` tokens, in the model's dtype.

    A layer with a sliding window caches only the keys that the next token sees, a recurrent layer a
    state of fixed size, a boundary that reads the previous token that token.

    Raises:
        ValueError: ``tokens`` is negative or ``batch_size`` below 1, or a model with a cache of its
            own.
    """
    check_model(model)
    at_least(0, tokens=tokens)
    at_least(1, batch_size=batch_size)
    parts = cached_tensors(model, tokens, batch_size) if tokens else []
    return sum(t.numel() * t.itemsize for part in parts for t in part)


@checked
def flops(
    model: PreTrainedModel, tokens: int, *, context: int = 0, batch_size: int = 1, logits: int = 1
) -> Flops:
    """Count one forward pass of ``tokens`` new tokens after ``context`` tokens in the cache.

    ``flops(model, 2048)`` is a prefill, ``flops(model, 1, context=2048)`` a decoding step.
    `torch.utils.flop_counter.FlopCounterMode` counts the products in a pass of a copy without
    weights; nothing is computed.

    Args:
        logits: positions for which logits are computed; ``generate`` computes the last alone.

    Raises:
        ValueError: a negative ``context`` or ``logits``, ``tokens`` or ``batch_size`` below 1, or
            more ``logits`` than ``tokens``; or a model whose operations depend on values.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 97}
    >>> config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    >>> flops(LlamaForCausalLM(config), 8)
    Flops(attention=40960, mlp=36864, boundary=0, head=3104)
    >>> flops(LlamaForCausalLM(config), 1, context=8).total
    12960
    """
    check_model(model)
    at_least(1, tokens=tokens, batch_size=batch_size)
    at_least(0, context=context, logits=logits)
    if logits > tokens:
        raise ValueError(f"logits must be at most tokens = {tokens}, got {logits}")
    copied = without_weights(model)
    cache = DynamicCache(config=model.config)
    if context:
        read(copied, context, cache, batch_size=batch_size, logits=1)
    with FlopCounterMode(display=False) as counter:
        read(copied, tokens, cache, batch_size=batch_size, logits=logits or 1)  # 0 asks for all
    counts = counter.get_flop_counts()
    names = {m: f"{type(copied).__name__}.{name}" for name, m in copied.named_modules()}

    def total(modules: Iterable[Any]) -> int:
        return sum(sum(counts[names[m]].values()) for m in modules if names[m] in counts)

    # A layer's attention is its child that has a place in the cache.
    children = [child for layer in decoder_layers(copied) for child in layer.children()]
    attention = total(child for child in children if hasattr(child, "layer_idx"))
    boundaries = [module for module in names if isinstance(module, BoundaryModule)]
    boundary, last = total(boundaries), copied.get_output_embeddings()
    head = total([last]) - total(set(boundaries).intersection(last.modules()))
    mlp = counter.get_total_flops() - attention - boundary - head
    return Flops(attention, mlp, boundary, head if logits else 0)


class Spread(NamedTuple):
    """Seconds over several rounds: median, minimum and maximum."""

    median: float
    least: float
    most: float


class Latency(NamedTuple):
    """Time and memory of one model.

    Attributes:
        prefill: seconds from the prompt to the first new token's logits.
        decode: seconds per later step, which gives every sequence of the batch one more token.
        peak_bytes: peak memory on a CUDA device beyond the weights: activations and cache; None
            without such a device.
    """

    prefill: Spread
    decode: Spread
    peak_bytes: int | None


@checked
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
    """Time several models in turn, so that a machine that slows down affects all of them alike.

    In every round each model reads the same random prompt and continues it greedily, one token at a
    time, in evaluation mode. Clocks are read when the devices have finished.

    Args:
        models: ``{name: model}``; they are not changed.
        prompt_tokens: length of the prompt.
        new_tokens: number of decoding steps.
        batch_size: sequences in the batch.
        warmup: number of rounds that are not counted.
        repeats: number of rounds that are counted.
        seed: seed of the prompt.

    Raises:
        ValueError: no model, a size below 1, a negative ``warmup``, or more tokens than a model has
            positions.
    """
    if not models:
        raise ValueError("no model to time: name at least one")
    at_least(1, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    at_least(1, batch_size=batch_size, repeats=repeats)
    at_least(0, warmup=warmup)
    for name, model in models.items():
        check_model(model)
        positions = known_positions(model)
        if positions is not None and prompt_tokens + new_tokens > positions:
            raise ValueError(
                f"{prompt_tokens} + {new_tokens} tokens exceed the {positions} positions of "
                f"{name!r}: shorten the prompt"
            )
    vocabulary = min(text_config(model).vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator)
    rounds: dict[str, list[tuple[float, float, int]]] = {name: [] for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for _ in track(range(warmup + repeats), "timing", unit="round"):
            for name, model in models.items():
                rounds[name].append(_measure(model, prompt, new_tokens))
    latencies = {}
    for name, measured in rounds.items():
        prefill, decode, peaks = zip(*measured[warmup:], strict=True)
        latencies[name] = Latency(_spread(prefill), _spread(decode), max(peaks) or None)
    return latencies


def _spread(seconds: Sequence[float]) -> Spread:
    return Spread(statistics.median(seconds), min(seconds), max(seconds))


@torch.no_grad()
def _measure(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Seconds of one prefill, seconds per decoding step, and peak bytes (0 without CUDA)."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    cuda = [device for device in devices if device.type == "cuda"]
    options = cached(model, DynamicCache(config=model.config))
    options |= {"use_cache": True, "logits_to_keep": 1}
    prompt = prompt.to(input_device(model))

    _synchronize(devices)
    before = {device: torch.cuda.memory_allocated(device) for device in cuda}
    for device in cuda:
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    logits = model(prompt, **options).logits
    _synchronize(devices)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        logits = model(logits[:, -1:].argmax(-1), **options).logits
    _synchronize(devices)
    end = time.perf_counter()
    peak = sum(torch.cuda.max_memory_allocated(d) - allocated for d, allocated in before.items())
    return prefilled - begin, (end - prefilled) / new_tokens, peak


def _synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until every accelerator has finished its work."""
    for device in devices:
        torch.accelerator.synchronize(device)
