"""Properties of a layer, measured on a few random tokens instead of looked up by its type.

A repair in existing weights needs to know which modules write into the stream, whether their
outputs are changed before that, and whether a norm removes the scale of the stream when it is read.
A single layer, as an excerpt of its model, shows that by its response to changed outputs.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ghostlib.models.architectures import (
    decoder_layers,
    hidden_size,
    looks_back,
    model_type,
    num_layers,
    receiver,
    structure,
)
from ghostlib.models.placement import compute_device, input_device
from ghostlib.models.streams import excerpt, feed, leaving, tap

_TOKENS, _FACTOR = 5, 2.0
_LINEAR = (nn.Linear.forward, Conv1D.forward)
_NAMED = re.compile(r"Linear(\d+bit\w*|_\w+)?$")  # Linear4bit, WQLinear_GEMM; no KimiLinearExperts


class Facts(NamedTuple):
    """Measured properties of one layer.

    Attributes:
        writers: paths of the modules whose outputs are added to the stream, in order.
        last: path of the last linear map that writes into the stream, or "".
        norm: ``"rms"`` or ``"layer"``, the norm through which the layer reads the stream, or "".
        scales: whether scaling the stream and all writers scales the output, and nothing else.
    """

    writers: tuple[str, ...]
    last: str
    norm: str
    scales: bool


# By a weight of the layer, which copies of a model share.
_FACTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def facts(model: PreTrainedModel, index: int) -> Facts:
    """The `Facts` of layer ``index``, measured once."""
    key = next(decoder_layers(model)[index].parameters())
    if key not in _FACTS:
        _FACTS[key] = _measure(model, index)
    result: Facts = _FACTS[key]
    return result


_Change = Callable[[Tensor], Tensor]
# Path, first input and output of every module called in a pass.
_Calls = list[tuple[str, Tensor | None, Tensor]]


class _Bench:
    """A single layer, to run on a stream with changed outputs of its modules."""

    def __init__(self, model: PreTrainedModel, index: int) -> None:
        self.part = excerpt(model, index, index + 1)
        for module in self.part.modules():  # hooks of a pass in another thread
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        layer = decoder_layers(self.part)[0]
        self.modules = dict(layer.named_modules())
        weight = next(p for p in layer.parameters() if p.is_floating_point())
        shape, generator = (2, 1, _TOKENS, hidden_size(model)), torch.Generator().manual_seed(0)
        random = torch.randn(shape, generator=generator).to(compute_device(layer), weight.dtype)
        self.stream, self.nudge = random
        self.ids = torch.arange(3, 3 + _TOKENS, device=input_device(model))[None]

    def run(
        self, stream: Tensor | None = None, changes: dict[str, _Change] | None = None
    ) -> tuple[Tensor, _Calls]:
        """The output of the layer, and the calls of its modules in order."""
        calls: _Calls = []
        outputs: list[Tensor] = []
        changes = changes or {}

        def hook(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            first = args[0] if args else kwargs.get("hidden_states")
            values = output[0] if isinstance(output, tuple) else output
            if not isinstance(values, Tensor):
                return None
            if path in changes:
                values = changes[path](values)
            calls.append((path, first if isinstance(first, Tensor) else None, values))
            if path not in changes:
                return None
            return (values, *output[1:]) if isinstance(output, tuple) else values

        with ExitStack() as stack:
            for path, module in self.modules.items():
                if path:
                    handle = module.register_forward_hook(partial(hook, path), with_kwargs=True)
                    stack.enter_context(handle)
            stack.enter_context(feed(self.part, self.stream if stream is None else stream))
            run = stack.enter_context(tap(self.part, [1], lambda _, hidden: outputs.append(hidden)))
            run(input_ids=self.ids)
        return outputs[0].clone(), calls


def _measure(model: PreTrainedModel, index: int) -> Facts:
    if looks_back(model):  # a layer cannot run alone
        return Facts((), "", "", False)
    bench = _Bench(model, index)
    modules, stream = bench.modules, bench.stream
    output, calls = bench.run()
    candidates = {
        path: None
        for path, _, values in calls
        if values.numel() == stream.numel()
        and values.shape[-1] == stream.shape[-1]
        and (_is_linear(modules[path]) or _is_norm(modules[path]))
    }
    writers, linear = [], []
    # A part of a projection, such as the base layer of an adapter, does not write itself.
    for path in _outermost(candidates):
        nudge = {path: lambda values: values + bench.nudge.view_as(values)}
        nudged, nudged_calls = bench.run(changes=nudge)
        direct = _close(bench.nudge, nudged - output)
        if _is_added(bench, path, calls, nudged_calls, direct):
            writers.append(path)
        if direct and _is_linear(modules[path]):
            linear.append(path)
    outside = [path for path in linear if not _in_attention(modules, path)]
    last = (outside or linear or [""])[-1]

    readers = {
        path: None
        for path, first, _ in calls
        if first is not None and first.shape == stream.shape and torch.equal(first, stream)
    }
    kinds = {_norm_kind(modules[p], stream) for p in _outermost(readers) if p not in writers}
    norm = kinds.pop() if len(kinds) == 1 else ""
    scaling: dict[str, _Change] = dict.fromkeys(writers, lambda values: values * _FACTOR)
    scaled, _ = bench.run(stream * _FACTOR, scaling)
    scales = bool(writers) and _close(output * _FACTOR, scaled)
    return Facts(tuple(writers), last, norm, scales)


def _outermost(paths: Collection[str]) -> list[str]:
    return [path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths)]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a projection, quantised and adapted ones included (see `present`)."""
    if type(module).forward in _LINEAR or hasattr(module, "base_layer"):
        return True
    composite = any(type(part).forward in _LINEAR for part in module.modules())
    return bool(_NAMED.search(type(module).__name__)) and not composite


def _is_added(bench: _Bench, path: str, calls: _Calls, nudged: _Calls, direct: bool) -> bool:
    """Whether a nudge to the output of ``path`` is added to the input of the next norm.

    ``direct`` says whether it is added to the output of the layer, for a module without next norm.
    """
    place = max(i for i, (name, *_) in enumerate(calls) if name == path)
    own = calls[place][2].reshape(bench.stream.shape)
    for (name, before, _), (_, after, _) in list(zip(calls, nudged, strict=False))[place + 1 :]:
        if before is None or after is None or before.numel() != own.numel():
            continue
        if _is_norm(bench.modules[name]):
            if _close(own, before.reshape(own.shape)):
                return False  # the output is normalised before it is added
            if not torch.equal(before, after):  # otherwise a parallel norm
                return _close(bench.nudge, (after - before).reshape(own.shape))
    return direct


def _in_attention(modules: dict[str, nn.Module], path: str) -> bool:
    """Whether ``path`` belongs to a module with a place in the cache."""
    names = path.split(".")
    ancestors = (modules[".".join(names[:n])] for n in range(1, len(names) + 1))
    return any(hasattr(module, "layer_idx") for module in ancestors)


def _norm_kind(module: nn.Module, stream: Tensor) -> str:
    """``"rms"`` or ``"layer"`` for a module that removes the scale of ``stream``, or ""."""
    with torch.no_grad():
        try:
            plain, scaled, shifted = (module(x) for x in (stream, stream * _FACTOR, stream + 1))
        except (TypeError, ValueError, RuntimeError):
            return ""
    if not isinstance(plain, Tensor) or not _close(plain, scaled):
        return ""
    return "layer" if _close(plain, shifted) else "rms"


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to the rounding of the dtype, and to the epsilon in the variance of a norm."""
    error = (one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-12)
    return bool(error < max(1e-3, 30 * torch.finfo(one.dtype).eps))


def down_projection(model: PreTrainedModel, index: int) -> nn.Module:
    """The last linear map of layer ``index`` that writes into the stream, that of its MLP.

    A `torch.nn.Linear`, with weights ``(width, I)``, or a `Conv1D` of transformers, with weights
    ``(I, width)``. Its output is added to the stream unchanged.

    Raises:
        ValueError: the output of the MLP is normalised, scaled or routed before it is added.
    """
    last = facts(model, index).last
    if not last:
        raise ValueError(
            f"layer {index} of this {model_type(model)} normalises, scales or routes what its MLP "
            "returns before it is added to the stream: nothing can be folded into its last matrix; "
            "use an operator at the gap, such as ghost"
        )
    return decoder_layers(model)[index].get_submodule(last)


def intermediate_size(model: PreTrainedModel, index: int) -> int:
    """Width of the input of `down_projection` of layer ``index``.

    Raises:
        ValueError: as `down_projection`.
    """
    module: Any = down_projection(model, index)
    return int(module.in_features if isinstance(module, nn.Linear) else module.nx)


def has_bias(model: PreTrainedModel, index: int) -> bool:
    """Whether `down_projection` of layer ``index`` has a bias.

    Raises:
        ValueError: as `down_projection`.
    """
    module: Any = down_projection(model, index)
    return module.bias is not None


def writers(model: PreTrainedModel, index: int) -> list[nn.Module]:
    """The modules of layer ``index`` whose outputs are added to the stream.

    Raises:
        ValueError: scaling them and the stream does more than scale the output of the layer.
    """
    layer = facts(model, index)
    if not layer.scales:
        raise ValueError(
            f"layer {index} of this {model_type(model)} reads its stream without a norm, or writes "
            "into it by more than single modules: scaling the stream would change what the layer "
            "computes; use an operator at the gap, such as scalar or ghost"
        )
    return [decoder_layers(model)[index].get_submodule(path) for path in layer.writers]


def stream_norm(model: PreTrainedModel) -> str:
    """The norm through which layers read the stream, ``"rms"`` or ``"layer"``.

    Raises:
        ValueError: the first layer reads the stream without a norm.
    """
    norm = facts(model, 0).norm
    if not norm:
        raise ValueError(
            f"the layers of a {model_type(model)} read their stream without a norm: a repair with "
            "n(x) or n(prev) has no ground here; use one that reads x alone, such as ghost-relative"
        )
    return norm


def embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The embeddings whose sum is the stream that enters the first layer.

    Raises:
        ValueError: scaling their outputs does more than scale the stream, or no norm with weights
            receives the stream after the last layer.
    """
    inside = set(decoder_layers(model).modules())
    tables: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, nn.Embedding) and m not in inside
    ]
    ids = torch.arange(3, 3 + _TOKENS, device=input_device(model))[None]
    plain = _first_stream(model, ids, [])
    if not tables or not _close(plain * _FACTOR, _first_stream(model, ids, tables)):
        raise ValueError(
            f"the stream that enters the first layer of a {model_type(model)} is more than a sum "
            "of embeddings and cannot be scaled in them; use an operator at the gap, such as "
            "scalar or ghost"
        )
    last: Any = receiver(model, num_layers(model)) if structure(model).receiver else None
    norm = ""
    if getattr(last, "weight", None) is not None:
        stream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
        norm = _norm_kind(last, stream.to(compute_device(last), plain.dtype))
    if not norm:
        raise ValueError(
            f"a {model_type(model)} has no norm with weights after its last layer, so that scaling "
            "its stream would scale its logits; use an operator at the gap, such as scalar or ghost"
        )
    return tables


def _first_stream(model: PreTrainedModel, ids: Tensor, scaled: Iterable[nn.Module]) -> Tensor:
    """The stream that enters the first layer, with the outputs of ``scaled`` multiplied."""
    streams: list[Tensor] = []
    with ExitStack() as stack:
        for module in scaled:
            stack.enter_context(leaving(module, lambda args, output: output * _FACTOR))
        run = stack.enter_context(tap(model, [0], lambda _, hidden: streams.append(hidden)))
        run(input_ids=ids)
    return streams[0].clone()


def scale_output(module: nn.Module, factor: float) -> None:
    """Multiply the output of ``module`` (a projection, an embedding or a norm) by new weights.

    The old parameters, which other models may share, are not changed.

    Raises:
        ValueError: as `present`.
    """
    present(module)
    is_matrix = isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    offset = 0.0 if is_matrix else norm_offset(module)
    for name, parameter in list(module.named_parameters(recurse=False)):
        shift = offset if name == "weight" else 0.0
        setattr(module, name, nn.Parameter((parameter + shift) * factor - shift))


def norm_offset(module: nn.Module) -> float:
    """The constant that a norm adds to its weight (Gemma: 1), measured on one token."""
    weight: Any = module.get_parameter("weight")
    token = torch.ones(1, 1, weight.numel(), dtype=weight.dtype, device=weight.device)
    token[..., ::2] = -1.0
    with torch.no_grad():
        at_zero, at_one = (
            torch.func.functional_call(module, {"weight": torch.full_like(weight, value)}, (token,))
            for value in (0.0, 1.0)
        )
        if getattr(module, "bias", None) is not None:
            at_zero, at_one = (out - module.bias for out in (at_zero, at_one))
    step = float((at_one - at_zero).abs().mean())
    return round(float(at_zero.abs().mean()) / step, 3)


def present(module: nn.Module) -> nn.Module:
    """Return ``module`` if its weights can be changed.

    Raises:
        ValueError: they are offloaded or quantised, or have an adapter.
    """
    reason, remedy = "", ""
    if hasattr(module, "base_layer"):  # wrapped by PEFT
        reason, remedy = "have an adapter on them", "merge it (merge_and_unload)"
    elif any(p.device.type == "meta" for p in module.parameters(recurse=False)):
        reason, remedy = "are offloaded", "load the model without offloading"
    elif not _is_plain(module):
        reason, remedy = "are quantised", "load the model in bfloat16 or float32"
    if reason:
        raise ValueError(
            f"the weights of a {type(module).__name__} {reason} and cannot be folded into: "
            f"{remedy}, or use an operator at the gap, such as ghost"
        )
    return module


def _is_plain(module: Any) -> bool:
    """Whether its weight is a floating-point tensor of 16 bits or more, used without scaling."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.itemsize == 1:
        return False
    if not isinstance(module, nn.Linear) or type(module).forward in _LINEAR:
        return True
    x = torch.linspace(-1, 1, module.in_features, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        return _close(nn.functional.linear(x, weight, module.bias), module(x))


@contextmanager
def listen(
    model: PreTrainedModel, starts: Iterable[int], on_mlp: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Observe the last down-projection before each of ``starts``: ``on_mlp(start, x, output)``.

    ``x`` (…, intermediate) is its input, ``output`` (…, width) is added to the stream, in the
    passes of this thread.
    """
    # `down_projection` makes passes of its own, so all are located before the first hook is set.
    modules = {start: down_projection(model, start - 1) for start in starts}
    with ExitStack() as stack:
        for start, module in modules.items():
            hook = partial(lambda start, args, output: on_mlp(start, args[0], output), start)
            stack.enter_context(leaving(module, hook))
        yield
