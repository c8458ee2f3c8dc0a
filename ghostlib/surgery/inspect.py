"""Inspection: a model's layers and the repairs that fit it, from its configuration alone."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ghostlib.common import checked
from ghostlib.models.architectures import (
    decoder_layers,
    hidden_size,
    layer_kinds,
    model_type,
    num_layers,
    structure,
    text_config,
    vocabulary,
)
from ghostlib.models.boundaries import spell
from ghostlib.models.layers import down_projection, embeddings, stream_norm, writers
from ghostlib.models.loading import EMBEDDED, check_reachable, check_source
from ghostlib.models.shapes import cached_tensors
from ghostlib.models.streams import refusal
from ghostlib.models.tiny import tiny_model
from ghostlib.operators.families import FAMILIES
from ghostlib.surgery.cut import check_dense, removed_layers
from ghostlib.text.assets import embedded_model_dir


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect`; prints as a short table.

    Attributes:
        type: model type of the configuration.
        width: width of the residual stream.
        vocabulary: number of token ids.
        kinds: kind of each layer, such as ``"full_attention"`` or ``"sliding_attention, experts"``.
        parameters: number of parameters of each layer.
        cache: cached numbers per token of each layer, or None if unknown.
        other: number of parameters outside the layers.
        removed: removed layers of the dense model; if there are any, no more can be removed.
        fixed: ``{layer: why it cannot be removed on its own}``.
        families: ``{family: why it does not fit, or ""}``.
    """

    type: str
    width: int
    vocabulary: int
    kinds: tuple[str, ...]
    parameters: tuple[int, ...]
    cache: tuple[int, ...] | None
    other: int
    removed: tuple[int, ...]
    fixed: Mapping[int, str]
    families: Mapping[str, str]

    def __str__(self) -> str:
        total = self.other + sum(self.parameters)
        lines = [
            f"{self.type}: {len(self.kinds)} layers, stream of {self.width}, vocabulary of "
            f"{self.vocabulary:,}, {total / 1e6:,.1f} million parameters",
            "",
            f"{'layers':<24} {'kind':<34} {'parameters':>12} {'cached per token':>17}",
        ]
        cached = ["–"] * len(self.kinds) if self.cache is None else self.cache
        rows = list(zip(self.kinds, self.parameters, cached, strict=True))
        for row in dict.fromkeys(rows):
            text = spell(index for index, other in enumerate(rows) if other == row)
            text = text if len(text) <= 24 else f"{text[:16]} … ({rows.count(row)})"
            lines.append(f"{text:<24} {row[0]:<34} {row[1]:>12,} {row[2]:>17}")
        if self.removed:
            removed = f"layers {spell(self.removed)} of the dense model are removed"
            return "\n".join([*lines, "", f"{removed}: {self.fixed[0]}"])
        by_reason: dict[str, list[str]] = {"": []}
        for name, reason in self.families.items():
            by_reason.setdefault(reason, []).append(name)
        lines += ["", f"repairs that fit: {', '.join(by_reason.pop(''))}"]
        lines += [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        if self.fixed:
            lines.append(f"not on their own: layers {spell(self.fixed)}")
            lines.append(next(iter(self.fixed.values())))
        return "\n".join(lines)


@checked
def inspect(model: PreTrainedModel | PretrainedConfig | str | Path, **options: Any) -> Inspection:
    """Describe the layers of a model and the repairs that fit it, without loading its weights.

    Args:
        model: a model, a configuration, a local folder, or an id of the Hugging Face hub;
            ``"smollm2"`` is the embedded model.
        options: passed to ``AutoConfig.from_pretrained`` (``revision``, …) for a folder or an id.

    Raises:
        ValueError: not a causal language model, one whose layers cannot be removed, or an option
            without effect.
        OSError: no model of that name.
        ConnectionError: a hub id that is not in the cache while the hub cannot be reached.

    >>> from transformers import LlamaConfig
    >>> llama = inspect(LlamaConfig(num_hidden_layers=4, hidden_size=64, intermediate_size=96))
    >>> llama.kinds[0], llama.parameters[0], llama.fixed
    ('attention', 34944, {})
    """
    unused = options
    if isinstance(model, str | Path):
        model = check_source(model)
        check_reachable(model)
        folder = embedded_model_dir() if model == EMBEDDED else model
        settings = options | {"return_unused_kwargs": True}
        model, unused = AutoConfig.from_pretrained(folder, **settings)
    if unused:
        raise ValueError(f"{', '.join(unused)}: no effect on an inspection, leave it out")
    if isinstance(model, PretrainedConfig):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model)
    structure(model)
    layers = decoder_layers(model)
    parameters = tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
    recovered = _reason(lambda: check_dense(model))
    return Inspection(
        type=model_type(model),
        width=hidden_size(model),
        vocabulary=vocabulary(model),
        kinds=_kinds(model),
        parameters=parameters,
        cache=_cache(model),
        other=sum(p.numel() for p in model.parameters()) - sum(parameters),
        removed=tuple(removed_layers(model)),
        fixed=dict.fromkeys(range(len(layers)), recovered) if recovered else _fixed(model),
        families=dict.fromkeys(FAMILIES, recovered) if recovered else _families(model),
    )


def _fixed(model: PreTrainedModel) -> dict[int, str]:
    """Layers that cannot be removed on their own, and why.

    A layer can depend on its entries in the configuration, on its number and on the number of
    layers. Removing the first layer renumbers all others, removing the last renumbers none: if both
    can be removed, and one layer of each kind, every layer can.
    """
    kinds, total = layer_kinds(model), num_layers(model)
    reasons = {index: refusal(model, [index]) for index in {0, total - 1, *kinds}}
    if any(reasons.values()):
        for index in sorted(set(range(total)) - set(reasons)):
            # Without either of two equal layers in a row the same model is left.
            alike = kinds[index] == kinds[index - 1]
            reasons[index] = reasons[index - 1] if alike else refusal(model, [index])
    return {index: reason for index, reason in sorted(reasons.items()) if reason}


def _kinds(model: PreTrainedModel) -> tuple[str, ...]:
    """Name of each layer's kind in the configuration, and whether it has experts."""
    types = getattr(text_config(model), "layer_types", None)
    kinds = []
    for index, layer in enumerate(decoder_layers(model)):
        experts = any("expert" in path.lower() for path, _ in layer.named_modules())
        kind = types[index] if types and len(types) == num_layers(model) else "attention"
        kinds.append(f"{kind}, experts" if experts else str(kind))
    return tuple(kinds)


def _cache(model: PreTrainedModel) -> tuple[int, ...] | None:
    """Numbers by which the cache of each layer grows per token; 0 for states of fixed size."""
    with suppress(Exception):  # some types compute on values, which meta tensors do not have
        two, three = (
            [sum(t.numel() for t in part) for part in cached_tensors(model, n)] for n in (2, 3)
        )
        growth = [after - before for before, after in zip(two, three, strict=True)]
        return tuple(growth[: num_layers(model)])
    return None


def _families(model: PreTrainedModel) -> dict[str, str]:
    """Why each family does not fit, or "", as tried on a small model with layers of all kinds."""
    small = tiny_model(model.config)
    layers = range(num_layers(small))
    norm = _reason(lambda: stream_norm(small))
    projection = _reason(lambda: [down_projection(small, i) for i in layers])
    writes = _reason(lambda: [embeddings(small), *(writers(small, i) for i in layers)])
    families = {}
    for name, family in FAMILIES.items():
        folds = family.regressor.reads_mlp or "down-projection" in family.install
        families[name] = (
            (norm if family.regressor.normalised else "")
            or (projection if folds else "")
            or (writes if family.install == "earlier-writes" else "")
        )
    return families


def _reason(attempt: Callable[[], Any]) -> str:
    """Message of the `ValueError` that ``attempt`` raises, or ""."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""
