"""Shapes: a pass without weights, which computes nothing and shows how large everything is."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ghostlib.models.architectures import cached, model_type
from ghostlib.models.configuration import twin


def without_weights(model: PreTrainedModel) -> Any:
    """A model of the same modules and dtype, all on the meta device, in plain matrix products."""
    copied: Any = twin(model)
    # Some models look for padding among the ids; some configurations refuse None for it.
    vars(copied.config)["pad_token_id"] = None
    copied.set_attn_implementation("eager")  # the counter does not look into fused kernels
    copied.set_experts_implementation("batched_mm")  # one product a token and expert
    return copied.eval()


@torch.no_grad()
def read(
    copied: PreTrainedModel, tokens: int, cache: DynamicCache, *, batch_size: int = 1, logits: int
) -> None:
    """Extend ``cache`` by ``tokens`` tokens, with the logits of the last ``logits``.

    Raises:
        ValueError: what the model does depends on values (which experts a token goes to), or it
            keeps what it has read in a cache of its own.
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


def held(model: PreTrainedModel, tokens: int, batch_size: int = 1) -> list[list[Tensor]]:
    """What a cache keeps after ``tokens`` tokens: of each layer, and of all boundaries at the end.

    Keys and values, what indexes them, and the states of convolutions and recurrences.

    Raises:
        ValueError: as `read`, and of a model that keeps nothing in the cache.
    """
    cache: Any = DynamicCache(config=model.config)
    read(without_weights(model), tokens, cache, batch_size=batch_size, logits=1)
    kept = [list(_tensors(part)) for part in (*cache.layers, cache)]
    if not any(kept):
        raise ValueError(f"a {model_type(model)} keeps nothing in the cache of transformers")
    return kept


def _tensors(part: Any) -> Iterator[Tensor]:
    for value in vars(part).values():
        for each in value.values() if isinstance(value, dict) else (value,):
            if isinstance(each, Tensor) and each.is_floating_point():
                yield each
