"""Excerpts: a stretch of a model's layers, run from a stream that was recorded before.

What removing a layer does not change need not be computed again: an excerpt of the layers behind it
is fed the stream that enters them. It shares every weight with the model it is taken from.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlib.models.architectures import keep_layers, mlp_output, num_layers, receiver
from ghostlib.models.placement import input_device, offload_stores, release_movers


class EndOfPass(Exception):
    """Raised in a hook to end a forward pass once all that is wanted of it has been seen."""


@torch.no_grad()
def final_hidden(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """What the language-model head would receive, (windows, length, hidden), without running it."""
    caught: list[Tensor] = []

    def hook(module: nn.Module, args: tuple) -> None:
        caught.append(args[0])
        raise EndOfPass

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        model(input_ids=windows.to(input_device(model)), use_cache=False)
    except EndOfPass:
        return caught[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} never called its output embeddings")


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model``'s modules around the very same weights."""
    # Copying the modules but not what is in the memo shares every weight with the model.
    shared = (*model.parameters(), *model.buffers(), *offload_stores(model))
    memo: dict[int, Any] = {id(kept): kept for kept in shared}
    copied: PreTrainedModel = copy.deepcopy(model, memo)
    release_movers(copied, model)
    return copied


def excerpt(model: PreTrainedModel, start: int, stop: int | None = None) -> PreTrainedModel:
    """Layers ``start … stop - 1`` of ``model`` as a model that shares its weights; see `feed`."""
    part = share(model)
    keep_layers(part, range(num_layers(model))[start:stop])
    return part


@contextmanager
def feed(model: PreTrainedModel, stream: Tensor) -> Iterator[None]:
    """Let ``stream`` (windows, length, hidden) enter the first layer in place of the embeddings.

    So an `excerpt` goes on from where another pass has been before.
    """

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (stream.to(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": stream.to(kwargs["hidden_states"])}

    handle = receiver(model, 0).register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def record(
    model: PreTrainedModel, windows: Tensor, indices: Iterable[int], **inputs: Tensor
) -> dict[int, Tensor]:
    """The streams that enter layers ``indices`` in one pass over a batch of windows.

    Returns:
        ``{index: (windows, length, hidden)}`` in the model's dtype; the layer count stands for the
        final norm.
    """
    streams: dict[int, Tensor] = {}
    with tap(model, indices, streams.__setitem__) as run:
        run(input_ids=windows.to(input_device(model)), **inputs)
    return streams


@contextmanager
def tap(
    model: PreTrainedModel, indices: Iterable[int], on_stream: Callable[[int, Tensor], None]
) -> Iterator[Callable[..., None]]:
    """Watch the residual stream where it enters layers ``indices`` (the layer count: final norm).

    Inside the context, calling the yielded function runs the model as far as the last index and no
    further; ``on_stream(index, hidden)`` receives each stream (batch, tokens, hidden) on the way.
    Forward pre-hooks are used because ``output_hidden_states`` gives its last entry after the final
    norm. The hooks are removed whatever happens.
    """
    wanted = sorted(set(indices))

    def hook_for(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            on_stream(index, args[0] if args else kwargs["hidden_states"])
            if index == wanted[-1]:
                raise EndOfPass

        return hook

    def run(**inputs: Tensor) -> None:
        try:
            with torch.no_grad():
                model(**inputs, use_cache=False)
        except EndOfPass:
            pass

    handles = []
    try:
        for index in wanted:
            module = receiver(model, index)
            handles.append(module.register_forward_pre_hook(hook_for(index), with_kwargs=True))
        yield run
    finally:
        for handle in handles:
            handle.remove()


def check_windows(model: PreTrainedModel, windows: Tensor, mask: Tensor | None = None) -> None:
    """Raise `ValueError` unless ``windows`` is a non-empty (windows, length) tensor of ids."""
    if not isinstance(windows, Tensor) or windows.ndim != 2 or windows.is_floating_point():
        got = tuple(windows.shape) if isinstance(windows, Tensor) else type(windows).__name__
        raise ValueError(f"windows must be a (windows, length) tensor of token ids, got {got}")
    if windows.numel() == 0:
        raise ValueError(f"windows hold no token: shape {tuple(windows.shape)}")
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"token ids {low} … {high} do not fit a vocabulary of {model.config.vocab_size}: "
            "were the windows made with another model's tokenizer?"
        )
    if mask is not None and mask.shape != windows.shape:
        raise ValueError(
            f"attention_mask must have the windows' shape {tuple(windows.shape)}, "
            f"got {tuple(mask.shape)}"
        )


@contextmanager
def listen(
    model: PreTrainedModel, starts: Iterable[int], on_mlp: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Watch the last down-projection before each of ``starts``: ``on_mlp(start, read, returned)``.

    ``read`` (…, intermediate) is its input, ``returned`` (…, width) what it adds to the stream.
    """
    handles = []
    try:
        for start in starts:
            handles.append(
                mlp_output(model, start - 1).register_forward_hook(
                    lambda module, args, output, start=start: on_mlp(start, args[0], output)
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
