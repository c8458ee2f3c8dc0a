"""Streams: the residual stream of a pass, watched, recorded, or put in.

Hooks see the passes of the thread that set them, and no other's; a model that is being trained is
passed in evaluation mode, and given back as it was. What removing a layer does not change need not
be computed again: an excerpt of the layers behind it is fed the stream that enters them. It shares
every weight with the model it is taken from.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlib.common import checked, told, whole
from ghostlib.models.architectures import (
    check_index,
    check_layers,
    decoder_layers,
    keep_layers,
    model_type,
    num_layers,
    receiver,
    same_layers,
    structure,
    text_config,
    to_state,
    to_stream,
    uncached,
    vocabulary,
)
from ghostlib.models.placement import input_device, offload_stores, release_movers


class EndOfPass(Exception):
    """Raised in a hook to end a forward pass once all that is wanted of it has been seen."""


# How many passes of a model are under way, and which of its modules were in training mode.
_EVALUATING: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while it lasts: no dropout. The last one to leave restores every module."""
    with _LOCK:
        count, training = _EVALUATING.get(model, (0, []))
        if count == 0:
            training = [module for module in model.modules() if module.training]
            for module in training:
                module.training = False
        _EVALUATING[model] = (count + 1, training)
    try:
        yield
    finally:
        with _LOCK:
            count, training = _EVALUATING.pop(model)
            if count > 1:
                _EVALUATING[model] = (count - 1, training)
            else:
                for module in training:
                    module.training = True


@contextmanager
def _hooked(
    module: nn.Module,
    hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any],
    *,
    first: bool = False,
) -> Iterator[None]:
    """Call ``hook`` before each pass of ``module`` that this thread makes."""
    owner = threading.get_ident()

    def own(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        # Between the two steps in which PyTorch registers a hook, another thread may call it
        # without keywords.
        if threading.get_ident() != owner or kwargs is None:
            return None
        return hook(module, args, kwargs)

    handle = module.register_forward_pre_hook(own, with_kwargs=True, prepend=first)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def leaving(module: nn.Module, hook: Callable[[tuple[Any, ...], Any], Any]) -> Iterator[None]:
    """Call ``hook(arguments, output)`` after each pass of ``module`` that this thread makes.

    What it returns, unless that is None, takes the place of the output.
    """
    owner = threading.get_ident()

    def own(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return hook(args, output) if threading.get_ident() == owner else None

    handle = module.register_forward_hook(own)
    try:
        yield
    finally:
        handle.remove()


def forward_once(model: PreTrainedModel, **inputs: Tensor) -> None:
    """One pass without cache and gradients, in evaluation mode; `EndOfPass` ends it."""
    with evaluating(model), torch.no_grad(), suppress(EndOfPass):
        model(**inputs, **uncached(model))


def final_hidden(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """What the language-model head would receive, (windows, length, hidden), without running it."""
    caught: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0])
        raise EndOfPass

    structure(model)  # refuses what has no head
    with _hooked(model.get_output_embeddings(), hook):
        forward_once(model, input_ids=windows.to(input_device(model)))
    if not caught:
        raise RuntimeError(f"{type(model).__name__} never called its output embeddings")
    return caught[0]


_PLAIN_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (…, vocabulary) of final hidden states (…, hidden), as the model itself makes them.

    What it does to them after the output embeddings (scale, soft cap, padding of the vocabulary) is
    done by its own code: one token is passed through the model, and ``hidden`` takes its place
    before the output embeddings. Where that turns out to be nothing, they alone are called.
    """
    if model not in _PLAIN_HEADS:
        few = hidden.flatten(0, -2)[:2]
        alone, whole = model.get_output_embeddings()(few), _through(model, few)
        _PLAIN_HEADS[model] = alone.shape == whole.shape and torch.equal(alone, whole)
    logits: Tensor
    if _PLAIN_HEADS[model]:
        logits = model.get_output_embeddings()(hidden)
        return logits
    logits = _through(model, hidden.flatten(0, -2))
    return logits.view(*hidden.shape[:-1], logits.shape[-1])


def _through(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) of ``hidden`` (tokens, width), in a pass of the whole model."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (hidden[None], *args[1:]), kwargs

    with _hooked(model.get_output_embeddings(), hook):
        token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
        logits: Tensor = model(input_ids=token, **uncached(model)).logits[0]
        return logits


def share(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of ``model``, reduced to the layers ``kept``, around the very same weights."""
    # Copying the modules but not what is in the memo shares every weight with the model.
    memo: dict[int, Any] = {id(store): store for store in offload_stores(model)}
    for module in model.modules():
        # Some keep a tensor of their last pass, which may have a graph and cannot be copied.
        own = (module._parameters, module._buffers, vars(module))
        memo |= {id(v): v for held in own for v in held.values() if isinstance(v, Tensor)}
        # A dozen empty dictionaries of hooks a module: an empty one is made sooner than copied.
        empty = (v for v in vars(module).values() if type(v) in (dict, OrderedDict) and not v)
        memo |= {id(v): type(v)() for v in empty}
    # Copying modules is what takes time. How layers are numbered shows in the first and the last.
    layers = decoder_layers(model)
    for index in set(range(1, len(layers) - 1)).difference(kept):
        memo[id(layers[index])] = nn.Identity()
    copied: PreTrainedModel = copy.deepcopy(model, memo)
    release_movers(copied, model)
    keep_layers(copied, kept, model)
    return copied


def excerpt(model: PreTrainedModel, start: int, stop: int | None = None) -> PreTrainedModel:
    """Layers ``start … stop - 1`` of ``model`` as a model that shares its weights; see `feed`."""
    return share(model, range(num_layers(model))[start:stop])


def refusal(model: PreTrainedModel, layers: Iterable[int]) -> str:
    """Why ``layers`` cannot be removed from ``model`` together; empty if they can."""
    removed, total = set(layers), num_layers(model)
    try:
        if total - 1 in removed:
            receiver(model, total)
        if same_layers(model):
            return ""
        check_layers(share(model, [i for i in range(total) if i not in removed]), model)
    except ValueError as error:
        return str(error)
    return ""


@contextmanager
def feed(model: PreTrainedModel, stream: Tensor) -> Iterator[None]:
    """Let ``stream`` (windows, length, hidden) enter the first layer in place of the embeddings.

    So an `excerpt` goes on from where another pass has been before.
    """

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state = args[0] if args else kwargs["hidden_states"]
        entering = to_state(stream.to(state), state, structure(model).layout)
        if args:
            return (entering, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": entering}

    with _hooked(receiver(model, 0), hook, first=True):
        yield


@checked
def record(
    model: PreTrainedModel, windows: Tensor, indices: Iterable[int], **inputs: Tensor
) -> dict[int, Tensor]:
    """The streams that enter layers ``indices`` in one pass over a batch of windows.

    Returns:
        ``{index: (windows, length, hidden)}`` in the model's dtype; the layer count stands for the
        final norm.
    """
    check_windows(model, windows)
    streams: dict[int, Tensor] = {}
    with tap(model, indices, streams.__setitem__) as run:
        run(input_ids=windows.to(input_device(model)), **inputs)
    return streams


@checked
@contextmanager
def tap(
    model: PreTrainedModel, indices: Iterable[int], on_stream: Callable[[int, Tensor], None]
) -> Iterator[Callable[..., None]]:
    """Watch the residual stream where it enters layers ``indices`` (the layer count: final norm).

    Inside the context, calling the yielded function runs the model as far as the last index and no
    further; ``on_stream(index, hidden)`` receives each stream (batch, tokens, hidden) on the way.
    Forward pre-hooks are used because ``output_hidden_states`` gives its last entry after the final
    norm. The hooks are removed whatever happens.

    Raises:
        ValueError: what passes from layer to layer is no stream (batch, tokens, hidden), or an
            index that is none.
    """
    wanted = sorted(set(indices))
    for index in wanted:
        check_index(model, index)
    waiting: list[int] = []
    layout = structure(model).layout

    def hook_for(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not isinstance(hidden, Tensor) or hidden.ndim != len(layout):
                got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
                raise ValueError(
                    f"layer {index} of a {model_type(model)} receives {got}, no stream "
                    "(batch, tokens, hidden): it cannot be pruned layer by layer"
                )
            hidden = to_stream(hidden, layout)
            # A layer that this pass skips, as text does those for images, leaves the stream as it
            # is: what enters it is what enters the next one.
            while waiting and waiting[0] <= index:
                on_stream(waiting.pop(0), hidden)
            if not waiting:
                raise EndOfPass

        return hook

    def run(**inputs: Tensor) -> None:
        waiting[:] = wanted
        forward_once(model, **inputs)

    def left(args: tuple[Any, ...], output: Any) -> None:
        hook_for(last)(model, output if isinstance(output, tuple) else (output,), {})

    last = num_layers(model)
    with ExitStack() as stack:
        for index in range(wanted[0], last + bool(structure(model).receiver)) if wanted else ():
            stack.enter_context(_hooked(receiver(model, index), hook_for(index)))
        if wanted and not structure(model).receiver:
            stack.enter_context(leaving(receiver(model, last - 1), left))
        yield run


def check_windows(model: PreTrainedModel, windows: Tensor, mask: Tensor | None = None) -> None:
    """Raise `ValueError` unless ``windows`` is a non-empty (windows, length) tensor of ids.

    Their ids must be in the vocabulary, and they may not be longer than the positions the model
    knows, unless its configuration says that it computes any (ALiBi, dynamic rotary embeddings).
    """
    integers = isinstance(windows, Tensor) and whole(windows.new_zeros(()))
    if not integers or windows.ndim != 2:
        raise ValueError(
            f"windows must be a (windows, length) tensor of token ids, got {told(windows)}"
        )
    if windows.numel() == 0:
        raise ValueError(f"windows hold no token: shape {tuple(windows.shape)}")
    low, high = int(windows.min()), int(windows.max())
    structure(model)
    known = vocabulary(model)
    if low < 0 or high >= known:
        raise ValueError(
            f"token ids {low} … {high} do not fit a vocabulary of {known}: "
            "were the windows made with another model's tokenizer?"
        )
    positions = known_positions(model)
    if positions is not None and windows.shape[1] > positions:
        raise ValueError(
            f"windows of {windows.shape[1]} tokens exceed the {positions} positions that "
            f"{type(model).__name__} knows: use a length of at most {positions}"
        )
    if mask is not None and mask.shape != windows.shape:
        raise ValueError(
            f"attention_mask must have the windows' shape {tuple(windows.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    if mask is not None and (odd := mask[(mask != 0) & (mask != 1)]).numel():
        raise ValueError(f"attention_mask must hold 1, and 0 at padding, got {odd[0].item()}")


def check_scored(model: PreTrainedModel, windows: Tensor) -> None:
    """Refuse, by `ValueError`, windows that do not fit the model or that predict no token."""
    check_windows(model, windows)
    if windows.shape[1] < 2:
        raise ValueError("windows of one token predict nothing: use a length of at least 2")


def known_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for; None where its configuration sets no limit."""
    config = text_config(model)
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = [rotary, *(part for part in rotary.values() if isinstance(part, dict))]
    if any(kind.get("rope_type") == "dynamic" for kind in kinds) or getattr(config, "alibi", False):
        return None
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    # RoBERTa's kind look positions up in a table, counted from behind the one for padding.
    tables = {m for m in model.modules() if isinstance(m, nn.Embedding)}
    tables -= {model.get_input_embeddings()}
    padded = [t.padding_idx for t in tables if t.num_embeddings == positions]
    return positions - max((index + 1 for index in padded if index is not None), default=0)
