"""Excerpts: a stretch of a model's layers, run from a stream that was recorded before.

What removing a layer does not change need not be computed again: an excerpt of the layers behind it
is fed the stream that enters them. It shares every weight with the model it is taken from.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlib.calibration import tap
from ghostlib.models import keep_layers, num_layers, receiver
from ghostlib.placement import input_device, offload_stores, release_movers


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
