"""What a layer does with the stream, tried on a few random tokens instead of known by its name.

A repair that goes into existing weights needs to know which modules write into the stream, whether
anything follows them, and whether what reads the stream takes its scale away. One layer, as an
excerpt of its model, answers that by what it returns when one of them returns something else.
"""

import re
from collections.abc import Callable, Iterable, Iterator
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
    """What was found out about one layer.

    Attributes:
        writers: paths of the modules whose outputs are added to the stream, in order.
        last: path of the linear map that is the last to write, or "" where there is none.
        norm: ``"rms"`` or ``"layer"``, the norm that all read the stream through, or "".
        scales: whether scaling the stream and all writers does no more than scale what leaves it.
    """

    writers: tuple[str, ...]
    last: str
    norm: str
    scales: bool


# Copies of a model share its tensors, and what is known of a layer goes with them.
_FACTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def facts(model: PreTrainedModel, index: int) -> Facts:
    """What layer ``index`` does, found out once."""
    key = next(decoder_layers(model)[index].parameters())
    if key not in _FACTS:
        _FACTS[key] = _find_out(model, index)
    found: Facts = _FACTS[key]
    return found


Change = Callable[[Tensor], Tensor]


class _Bench:
    """One layer on its own, that can be run on a stream while some of its modules are changed."""

    def __init__(self, model: PreTrainedModel, index: int) -> None:
        self.part = excerpt(model, index, index + 1)
        for module in self.part.modules():  # a pass of the model may be watched meanwhile
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.layer = decoder_layers(self.part)[0]
        self.width = hidden_size(model)
        generator = torch.Generator().manual_seed(0)
        weight = next(p for p in self.layer.parameters() if p.is_floating_point())
        shape = (1, _TOKENS, self.width)
        device, self.dtype = compute_device(self.layer), weight.dtype
        self.stream = torch.randn(shape, generator=generator).to(device, self.dtype)
        self.nudge = torch.randn(shape, generator=generator).to(device, self.dtype)
        self.ids = torch.arange(3, 3 + _TOKENS, device=input_device(model))[None]

    def run(
        self, stream: Tensor | None = None, change: dict[str, Change] | None = None
    ) -> tuple[Tensor, list[tuple[str, Tensor | None, Tensor]]]:
        """What the layer returns, and every module's first input and output, in order."""
        seen: list[tuple[str, Tensor | None, Tensor]] = []
        left: list[Tensor] = []
        change = change or {}

        def hook(path: str) -> Callable[..., Any]:
            def after(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
            ) -> Any:
                first = args[0] if args else kwargs.get("hidden_states")
                values = output[0] if isinstance(output, tuple) else output
                if not isinstance(values, Tensor):
                    return None
                if path in change:
                    values = change[path](values)
                seen.append((path, first if isinstance(first, Tensor) else None, values))
                if path not in change:
                    return None
                return (values, *output[1:]) if isinstance(output, tuple) else values

            return after

        with ExitStack() as stack:
            for path, module in self.layer.named_modules():
                if path:
                    handle = module.register_forward_hook(hook(path), with_kwargs=True)
                    stack.callback(handle.remove)
            stack.enter_context(feed(self.part, self.stream if stream is None else stream))
            run = stack.enter_context(tap(self.part, [1], lambda _, hidden: left.append(hidden)))
            run(input_ids=self.ids)
        return left[0].clone(), seen


def _find_out(model: PreTrainedModel, index: int) -> Facts:
    if looks_back(model):  # no layer of it can be tried alone
        return Facts((), "", "", False)
    bench = _Bench(model, index)
    modules = dict(bench.layer.named_modules())
    before, seen = bench.run()
    streams = bench.stream.shape

    def norm_like(path: str) -> bool:
        return "norm" in type(modules[path]).__name__.lower()

    candidates = {
        path: None
        for path, _, output in seen
        if output.numel() == bench.stream.numel()
        and output.shape[-1] == bench.width
        and (_is_linear(modules[path]) or norm_like(path))
    }
    writers, linear = [], []
    for path in candidates:
        if any(path.startswith(f"{outer}.") for outer in candidates):
            continue  # a part of a projection, such as the base layer of an adapter
        nudged = {path: lambda values: values + bench.nudge.view_as(values)}
        after, again = bench.run(change=nudged)
        if _added(bench, path, seen, again, before, after, norm_like):
            writers.append(path)
        if _is_linear(modules[path]) and _close(bench.nudge, after - before):
            linear.append(path)
    outside = [path for path in linear if not _in_attention(modules, path)]
    last = (outside or linear or [""])[-1]

    readers = [
        path
        for path, first, _ in seen
        if first is not None and first.shape == streams and torch.equal(first, bench.stream)
    ]
    outer = [p for p in readers if not any(p.startswith(f"{o}.") for o in readers)]
    kinds = {_norm_kind(modules[path], bench.stream) for path in outer if path not in writers}
    norm = kinds.pop() if len(kinds) == 1 else ""
    grown: dict[str, Change] = dict.fromkeys(writers, lambda values: values * _FACTOR)
    scaled, _ = bench.run(bench.stream * _FACTOR, grown)
    scales = bool(writers) and _close(before * _FACTOR, scaled)
    return Facts(tuple(writers), last, norm, scales)


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a projection, quantised and adapted ones included (see `present`)."""
    if type(module).forward in _LINEAR or hasattr(module, "base_layer"):
        return True
    made_of_others = any(type(part).forward in _LINEAR for part in module.modules())
    return bool(_NAMED.search(type(module).__name__)) and not made_of_others


def _added(
    bench: _Bench,
    path: str,
    seen: list[tuple[str, Tensor | None, Tensor]],
    again: list[tuple[str, Tensor | None, Tensor]],
    before: Tensor,
    after: Tensor,
    norm_like: Callable[[str], bool],
) -> bool:
    """Whether a nudge to what ``path`` returns arrives as it is where the stream is read next."""
    place = max(i for i, (name, *_) in enumerate(seen) if name == path)
    own = seen[place][2].reshape(bench.stream.shape)
    for (name, first, _), (_, changed, _) in zip(
        seen[place + 1 :], again[place + 1 :], strict=False
    ):
        if first is None or changed is None or first.numel() != bench.stream.numel():
            continue
        if norm_like(name):
            if _close(own, first.reshape(own.shape)):
                return False  # what it returns is normalised before it is added
            if torch.equal(first, changed):
                continue  # a norm beside it
            return _close(bench.nudge, (changed - first).reshape(own.shape))
    return _close(bench.nudge, after - before)


def _in_attention(modules: dict[str, nn.Module], path: str) -> bool:
    """Whether a module belongs to what has a place in the cache."""
    names = path.split(".")
    above = (modules[".".join(names[:n])] for n in range(1, len(names) + 1))
    return any(hasattr(module, "layer_idx") for module in above)


def _norm_kind(module: nn.Module, stream: Tensor) -> str:
    """``"rms"`` or ``"layer"`` for a module that takes the scale of ``stream`` away, or nothing."""
    with torch.no_grad():
        try:
            plain, grown, moved = (module(x) for x in (stream, stream * _FACTOR, stream + 1))
        except (TypeError, ValueError, RuntimeError):
            return ""
    if not isinstance(plain, Tensor) or not _close(plain, grown):
        return ""
    return "layer" if _close(plain, moved) else "rms"


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to the rounding of the dtype, and to what a norm adds to the variance."""
    error = (one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-12)
    return bool(error < max(1e-3, 30 * torch.finfo(one.dtype).eps))


def down_projection(model: PreTrainedModel, index: int) -> nn.Module:
    """The linear map through which layer ``index`` writes into the stream last, that of its MLP.

    A `torch.nn.Linear`, which keeps ``(width, I)``, or a `Conv1D` of transformers, which keeps
    ``(I, width)``. What it returns is added to the stream as it is.

    Raises:
        ValueError: there is none, because what the MLP returns is normalised, scaled or routed
            before it is added.
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
    """Width of what `down_projection` of layer ``index`` reads.

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
        ValueError: scaling them and the stream does more than scaling what leaves the layer.
    """
    found = facts(model, index)
    if not found.scales:
        raise ValueError(
            f"layer {index} of this {model_type(model)} reads its stream without a norm, or writes "
            "into it by more than single modules: scaling the stream would change what the layer "
            "computes; use an operator at the gap, such as scalar or ghost"
        )
    return [decoder_layers(model)[index].get_submodule(path) for path in found.writers]


def stream_norm(model: PreTrainedModel) -> str:
    """``"rms"`` or ``"layer"``: the norm through which layers read the stream.

    Raises:
        ValueError: the first layer reads the stream itself.
    """
    norm = facts(model, 0).norm
    if not norm:
        raise ValueError(
            f"the layers of a {model_type(model)} read their stream without a norm: a repair with "
            "n(x) or n(prev) has no ground here; use one that reads x alone, such as ghost-relative"
        )
    return norm


def embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose outputs make up the stream that enters the first layer.

    Raises:
        ValueError: scaling what they return does more than scaling the stream, or what receives the
            stream after the last layer is no norm.
    """
    inside = set(decoder_layers(model).modules())
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    found: list[nn.Module] = [table for table in tables if table not in inside]
    ids = torch.arange(3, 3 + _TOKENS, device=input_device(model))[None]
    plain = _entering(model, ids, [])
    if not found or not _close(plain * _FACTOR, _entering(model, ids, found)):
        raise ValueError(
            f"what enters the first layer of a {model_type(model)} is more than a sum of "
            "embeddings, so that it cannot be scaled in them; use an operator at the gap, such as "
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
    return found


def _entering(model: PreTrainedModel, ids: Tensor, scaled: Iterable[nn.Module]) -> Tensor:
    """The stream that enters the first layer while the outputs of ``scaled`` are multiplied."""
    left: list[Tensor] = []
    with ExitStack() as stack:
        for module in scaled:
            stack.enter_context(leaving(module, lambda args, output: output * _FACTOR))
        run = stack.enter_context(tap(model, [0], lambda _, hidden: left.append(hidden)))
        run(input_ids=ids)
    return left[0].clone()


def scale_output(module: nn.Module, factor: float) -> None:
    """Multiply what ``module`` (a projection, an embedding or a norm) returns, by new weights.

    The old parameters, which other models may share, stay as they are.

    Raises:
        ValueError: as `present`.
    """
    present(module)
    projects = isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    offset = 0.0 if projects else norm_offset(module)
    for name, parameter in list(module.named_parameters(recurse=False)):
        shift = offset if name == "weight" else 0.0
        setattr(module, name, nn.Parameter((parameter + shift) * factor - shift))


def norm_offset(module: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies (Gemma: 1), tried on one token."""
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
    """``module``, if its weights can be folded into.

    Raises:
        ValueError: they are offloaded or quantised, or an adapter sits on them.
    """
    reason, remedy = "", ""
    if hasattr(module, "base_layer"):  # as PEFT wraps what it adapts
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
    """Whether its weight is a floating-point tensor of 16 bits or more, used as it is."""
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
    """Watch the last down-projection before each of ``starts``: ``on_mlp(start, read, returned)``.

    ``read`` (…, intermediate) is its input, ``returned`` (…, width) what it adds to the stream, in
    the passes that this thread makes.
    """
    with ExitStack() as stack:
        # All are found before the first is watched.
        modules = {start: down_projection(model, start - 1) for start in starts}
        for start, module in modules.items():
            seen = partial(lambda start, args, output: on_mlp(start, args[0], output), start)
            stack.enter_context(leaving(module, seen))
        yield
