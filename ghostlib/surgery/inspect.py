"""What is found in a model before anything is done to it, from its configuration alone."""

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
from ghostlib.models.shapes import held
from ghostlib.models.streams import refusal
from ghostlib.models.tiny import tiny_model
from ghostlib.operators.families import FAMILIES
from ghostlib.surgery.cut import check_dense, removed_before
from ghostlib.text.assets import embedded_model_dir


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; printed, it is a short table.

    Attributes:
        type: model type of its configuration.
        width: of the residual stream.
        vocabulary: number of token ids.
        kinds: of every layer, such as ``"full_attention"`` or ``"sliding_attention, MoE"``.
        parameters: of every layer.
        cache: numbers that every layer keeps of one token, or None where that is not known.
        other: parameters outside the layers.
        removed: layers of the dense model that are gone; then no more of them can be removed.
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
            gone = f"layers {spell(self.removed)} of the dense model are removed"
            return "\n".join([*lines, "", f"{gone}: {self.fixed[0]}"])
        by_reason: dict[str, list[str]] = {"": []}
        for name, why in self.families.items():
            by_reason.setdefault(why, []).append(name)
        lines += ["", f"repairs that fit: {', '.join(by_reason.pop(''))}"]
        lines += [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]
        if self.fixed:
            lines.append(f"not on their own: layers {spell(self.fixed)}")
            lines.append(next(iter(self.fixed.values())))
        return "\n".join(lines)


@checked
def inspect(model: PreTrainedModel | PretrainedConfig | str | Path, **options: Any) -> Inspection:
    """What `ghostlib` finds in a model, and what can be done to it, without loading its weights.

    Args:
        model: a model, a configuration, a local folder, or an id of the Hugging Face hub;
            ``"smollm2"`` is the embedded model.
        options: passed on to ``AutoConfig.from_pretrained`` (``revision``, …), by which a folder or
            an id is read.

    Raises:
        ValueError: it is no causal language model, or one whose layers cannot be removed; or an
            option that has no effect.
        OSError: nothing was found under that name.
        ConnectionError: a hub id that is not in the cache, and no hub.

    >>> from transformers import LlamaConfig
    >>> found = inspect(LlamaConfig(num_hidden_layers=4, hidden_size=64, intermediate_size=96))
    >>> found.kinds[0], found.parameters[0], found.fixed
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
        raise ValueError(f"{', '.join(unused)}: no effect on what is found here, leave it out")
    if isinstance(model, PretrainedConfig):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model)
    structure(model)
    layers = decoder_layers(model)
    parameters = tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
    recovered = _why(lambda: check_dense(model))
    return Inspection(
        type=model_type(model),
        width=hidden_size(model),
        vocabulary=vocabulary(model),
        kinds=_kinds(model),
        parameters=parameters,
        cache=_cache(model),
        other=sum(p.numel() for p in model.parameters()) - sum(parameters),
        removed=tuple(removed_before(model)),
        fixed=dict.fromkeys(range(len(layers)), recovered) if recovered else _fixed(model),
        families=dict.fromkeys(FAMILIES, recovered) if recovered else _families(model),
    )


def _fixed(model: PreTrainedModel) -> dict[int, str]:
    """Layers that cannot be removed on their own, and why.

    What a layer is can depend on its entries in the configuration, its number and how many layers
    there are. Without the first one every other has a new number, without the last one all keep
    theirs: where both can go, and one of each kind, any can.
    """
    same, last = layer_kinds(model), num_layers(model) - 1
    found = {index: refusal(model, [index]) for index in {0, last, *same}}
    if any(found.values()):
        for index in range(num_layers(model)):
            if index not in found and same[index] == same[index - 1]:
                found[index] = found[index - 1]  # one of two alike that follow each other
            elif index not in found:
                found[index] = refusal(model, [index])
    return {index: why for index, why in sorted(found.items()) if why}


def _kinds(model: PreTrainedModel) -> tuple[str, ...]:
    """Of each layer, what its configuration calls it, and whether it has experts."""
    named = getattr(text_config(model), "layer_types", None)
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        experts = any("expert" in path.lower() for path, _ in layer.named_modules())
        kind = named[index] if named and len(named) == num_layers(model) else "attention"
        found.append(f"{kind}, experts" if experts else str(kind))
    return tuple(found)


def _cache(model: PreTrainedModel) -> tuple[int, ...] | None:
    """Numbers by which each layer's part of the cache grows with a token; states do not grow."""
    with suppress(Exception):  # some types look at values to go on
        two, three = (
            [sum(t.numel() for t in part) for part in held(model, tokens)] for tokens in (2, 3)
        )
        grown = [after - before for before, after in zip(two, three, strict=True)]
        return tuple(grown[: num_layers(model)])
    return None


def _families(model: PreTrainedModel) -> dict[str, str]:
    """For each family, why it does not fit: tried on a small model of the same kinds."""
    small = tiny_model(model.config)
    layers = range(num_layers(small))
    reasons = {
        "norm": _why(lambda: stream_norm(small)),
        "down-projection": _why(lambda: [down_projection(small, index) for index in layers]),
        "earlier-writes": _why(lambda: (embeddings(small), *(writers(small, i) for i in layers))),
    }
    found = {}
    for name, family in FAMILIES.items():
        needs = {
            "norm": family.regressor.normalised,
            "down-projection": family.regressor.reads_mlp or "down-projection" in family.install,
            "earlier-writes": family.install == "earlier-writes",
        }
        found[name] = next((reasons[n] for n, needed in needs.items() if needed and reasons[n]), "")
    return found


def _why(needed: Callable[[], Any]) -> str:
    try:
        needed()
    except ValueError as error:
        return str(error)
    return ""
