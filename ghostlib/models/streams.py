"""Streams: the residual stream of a pass, observed, recorded, or replaced.

Hooks see only the passes of the thread that set them. Passes are made in evaluation mode; the
training mode is restored afterwards. Layers before a removed one need not be computed again: an
excerpt of the later layers, which shares the weights of its model, is fed the stream that enters
them.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ghostlib.common import checked, is_integer, short_repr
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
    """Raised in a hook to end a forward pass early."""


# Number of passes of a model under way, and its modules that were in training mode.
_EVALUATING: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the context; the last to exit restores the modes."""
    with _LOCK:
        new = (0, [module for module in model.modules() if module.training])
        count, training = _EVALUATING.get(model, new)
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


_PreHook = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def _entering(module: nn.Module, hook: _PreHook, *, first: bool = False) -> RemovableHandle:
    """Call ``hook(args, kwargs)`` before each pass of ``module`` that this thread makes."""
    owner = threading.get_ident()

    def own(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        # While PyTorch registers a hook in two steps, another thread may call it without kwargs.
        if threading.get_ident() == owner and kwargs is not None:
            return hook(args, kwargs)

    return module.register_forward_pre_hook(own, with_kwargs=True, prepend=first)


def leaving(module: nn.Module, hook: Callable[[tuple[Any, ...], Any], Any]) -> RemovableHandle:
    """Call ``hook(args, output)`` after each pass of ``module`` that this thread makes.

    Its result, unless None, replaces the output. The handle is a context manager.
    """
    owner = threading.get_ident()

    def own(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return hook(args, output) if threading.get_ident() == owner else None

    return module.register_forward_hook(own)


def forward_once(model: PreTrainedModel, **inputs: Tensor) -> None:
    """One pass without cache and gradients, in evaluation mode; `EndOfPass` ends it."""
    with evaluating(model), torch.no_grad(), suppress(EndOfPass):
        model(**inputs, **uncached(model))


def final_hidden(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """The input of the language-model head, (windows, length, hidden), without running it."""
    caught: list[Tensor] = []

    def hook(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0])
        raise EndOfPass

    structure(model)  # raises for a model without a head
    with _entering(model.get_output_embeddings(), hook):
        forward_once(model, input_ids=windows.to(input_device(model)))
    if not caught:
        raise RuntimeError(f"{type(model).__name__} never called its output embeddings")
    return caught[0]


_PLAIN_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (…, vocabulary) of final hidden states (…, hidden), as the model computes them.

    A model may scale, cap or pad the logits after the output embeddings. So one token is passed
    through the model, and ``hidden`` replaces its final hidden state. If the first two states show
    no difference, only the output embeddings are called from then on.
    """
    if model not in _PLAIN_HEADS:
        states = hidden.flatten(0, -2)[:2]
        plain, full = model.get_output_embeddings()(states), _through(model, states)
        _PLAIN_HEADS[model] = plain.shape == full.shape and torch.equal(plain, full)
    logits: Tensor
    if _PLAIN_HEADS[model]:
        logits = model.get_output_embeddings()(hidden)
        return logits
    logits = _through(model, hidden.flatten(0, -2))
    return logits.view(*hidden.shape[:-1], logits.shape[-1])


def _through(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) of ``hidden`` (tokens, width), in a pass of the model."""
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    with _entering(
        model.get_output_embeddings(),
        lambda args, kwargs: ((hidden[None], *args[1:]), kwargs),
    ):
        logits: Tensor = model(input_ids=token, **uncached(model)).logits[0]
    return logits


def share(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of ``model``, reduced to the layers ``kept``, with the same weights in memory."""
    # Objects in the memo are not copied, so the copy shares the weights.
    memo: dict[int, Any] = {id(store): store for store in offload_stores(model)}
    for module in model.modules():
        # Some keep a tensor of their last pass, which may have a graph and cannot be copied.
        attributes = (module._parameters, module._buffers, vars(module))
        memo |= {id(v): v for names in attributes for v in names.values() if isinstance(v, Tensor)}
        # A module has a dozen empty dictionaries of hooks, which are faster to make than to copy.
        empty = (v for v in vars(module).values() if type(v) in (dict, OrderedDict) and not v)
        memo |= {id(v): type(v)() for v in empty}
    # Modules are slow to copy. The numbering of layers can be read off the first and the last.
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
    """The reason why ``layers`` cannot be removed from ``model`` together; empty if they can."""
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
    """Feed ``stream`` (windows, length, hidden) to the first layer in place of the embeddings.

    An `excerpt` thus continues a recorded pass.
    """

    def hook(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        state = to_state(stream.to(state), state, structure(model).layout)
        return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})

    with _entering(receiver(model, 0), hook, first=True):
        yield


@checked
def record(
    model: PreTrainedModel, windows: Tensor, indices: Iterable[int], **inputs: Tensor
) -> dict[int, Tensor]:
    """The streams that enter layers ``indices`` in one pass over a batch of windows.

    Returns:
        ``{index: (windows, length, hidden)}`` in the model's dtype; the number of layers stands for
        the final norm.
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
    """Observe the residual stream where it enters layers ``indices``.

    Inside the context, calling the yielded function runs the model up to the last index;
    ``on_stream(index, hidden)`` receives each stream (batch, tokens, hidden) on the way. The number
    of layers stands for the final norm. Forward pre-hooks are used because the last entry of
    ``output_hidden_states`` is taken after the final norm.

    Raises:
        ValueError: as `check_index`, or the layers do not pass on a stream (batch, tokens, hidden).
    """
    indices = sorted(set(indices))
    for index in indices:
        check_index(model, index)
    pending: list[int] = []
    layout = structure(model).layout

    def hook(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        if not isinstance(state, Tensor) or state.ndim != len(layout):
            got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(
                f"layer {index} of a {model_type(model)} receives {got}, no stream "
                "(batch, tokens, hidden): it cannot be pruned layer by layer"
            )
        # A layer skipped in this pass, as one for images in a pass over text, has the same input
        # as the next layer.
        while pending and pending[0] <= index:
            on_stream(pending.pop(0), to_stream(state, layout))
        if not pending:
            raise EndOfPass

    def run(**inputs: Tensor) -> None:
        pending[:] = indices
        forward_once(model, **inputs)

    def after_last(args: tuple[Any, ...], output: Any) -> None:
        hook(last, output if isinstance(output, tuple) else (output,), {})

    last = num_layers(model)
    with ExitStack() as stack:
        for index in range(indices[0], last + bool(structure(model).receiver)) if indices else ():
            stack.enter_context(_entering(receiver(model, index), partial(hook, index)))
        if indices and not structure(model).receiver:
            stack.enter_context(leaving(receiver(model, last - 1), after_last))
        yield run


def check_windows(model: PreTrainedModel, windows: Tensor, mask: Tensor | None = None) -> None:
    """Raise `ValueError` unless ``windows`` is a non-empty (windows, length) tensor of ids.

    The ids must be in the vocabulary, and the windows may not exceed `known_positions`. The mask
    must have their shape.
    """
    integers = isinstance(windows, Tensor) and is_integer(windows.new_zeros(()))
    if not integers or windows.ndim != 2:
        raise ValueError(
            f"windows must be a (windows, length) tensor of token ids, got {short_repr(windows)}"
        )
    if windows.numel() == 0:
        raise ValueError(f"windows hold no token: shape {tuple(windows.shape)}")
    low, high = int(windows.min()), int(windows.max())
    structure(model)
    size = vocabulary(model)
    if low < 0 or high >= size:
        raise ValueError(
            f"token ids {low} … {high} do not fit a vocabulary of {size}: "
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
    if mask is not None and (invalid := mask[(mask != 0) & (mask != 1)]).numel():
        raise ValueError(f"attention_mask must hold 1, and 0 at padding, got {invalid[0].item()}")


def check_scored(model: PreTrainedModel, windows: Tensor) -> None:
    """Refuse, by `ValueError`, windows that do not fit the model or that predict no token."""
    check_windows(model, windows)
    if windows.shape[1] < 2:
        raise ValueError("windows of one token predict nothing: use a length of at least 2")


def known_positions(model: PreTrainedModel) -> int | None:
    """Number of positions of the model; None if unlimited (ALiBi, dynamic rotary embeddings)."""
    config = text_config(model)
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = [rotary, *(part for part in rotary.values() if isinstance(part, dict))]
    if any(kind.get("rope_type") == "dynamic" for kind in kinds) or getattr(config, "alibi", False):
        return None
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    # RoBERTa and its like look positions up in a table, starting after that of padding.
    tables = {m for m in model.modules() if isinstance(m, nn.Embedding)}
    tables -= {model.get_input_embeddings()}
    padding = [t.padding_idx for t in tables if t.num_embeddings == positions]
    return positions - max((index + 1 for index in padding if index is not None), default=0)
