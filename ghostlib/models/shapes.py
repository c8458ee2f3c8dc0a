"""Shapes: a pass without weights, which computes nothing but the shapes of tensors."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ghostlib.models.architectures import cached, model_type
from ghostlib.models.configuration import twin


def without_weights(model: PreTrainedModel) -> Any:
    """A model of the same modules and dtype on the meta device, with plain matrix products."""
    copied: Any = twin(model)
    # Some models search the ids for padding; some configurations refuse None for it.
    vars(copied.config)["pad_token_id"] = None
    copied.set_attn_implementation("eager")  # fused kernels are not counted
    copied.set_experts_implementation("batched_mm")  # a product per token and expert
    return copied.eval()


@torch.no_grad()
def read(
    copied: PreTrainedModel, tokens: int, cache: DynamicCache, *, batch_size: int = 1, logits: int
) -> None:
    """Extend ``cache`` by ``tokens`` tokens and compute the logits of the last ``logits``.

    Raises:
        ValueError: the pass depends on values (as of a router of experts), or the model has a
            cache of its own.
    """
    ids = torch.zeros(batch_size, tokens, dtype=torch.long, device="meta")
    try:
        copied(ids, **cached(copied, cache), use_cache=True, logits_to_keep=logits)
    except (NotImplementedError, ValueError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        if isinstance(error, NotImplementedError):
            reason = "what it computes depends on values"
        raise ValueError(
            f"operations and cache of a {model_type(copied)} cannot be counted: {reason}"
        ) from error


def cached_tensors(model: PreTrainedModel, tokens: int, batch_size: int = 1) -> list[list[Tensor]]:
    """Tensors in a cache after ``tokens`` tokens: of each layer, then of all boundaries.

    Keys and values, their indices, and the states of convolutions and recurrences.

    Raises:
        ValueError: as `read`, or the cache stays empty.
    """
    cache: Any = DynamicCache(config=model.config)
    read(without_weights(model), tokens, cache, batch_size=batch_size, logits=1)
    tensors = [list(_tensors(part)) for part in (*cache.layers, cache)]
    if not any(tensors):
        raise ValueError(f"a {model_type(model)} keeps nothing in the cache of transformers")
    return tensors


def _tensors(part: Any) -> Iterator[Tensor]:
    for value in vars(part).values():
        for item in value.values() if isinstance(value, dict) else (value,):
            if isinstance(item, Tensor) and item.is_floating_point():
                yield item
