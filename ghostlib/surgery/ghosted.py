"""The recovered model: an ordinary `PreTrainedModel` whose constructor installs its operators.

A recovered model belongs to a subclass of its model's own class, made here for each architecture:
``GhostedLlamaForCausalLM`` is a ``LlamaForCausalLM`` whose ``config.ghost`` lists the operators, so
they are saved, loaded, moved and cast like any other parameter. Importing this module registers
the subclasses with transformers; without it, loading fails for want of the model type.
"""

import os
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from ghostlib.common import GHOSTED
from ghostlib.models.architectures import ARCHITECTURES
from ghostlib.statistics.features import FEATURES
from ghostlib.surgery.previous import remembering, token_before

VARIANT = "ghosted"
"""Recovered weights are saved as ``model.ghosted.safetensors``: the stock class finds no file there
instead of loading every weight but the operators."""


class BoundaryModule(nn.Module):
    """``x -> x + (what its matrix makes of x, or of several features of x side by side)``.

    Features of the token before are taken with the help of `ghostlib.surgery.previous`.
    """

    def __init__(self, features: Sequence[str] = ("x",)) -> None:
        super().__init__()
        self.features = tuple(FEATURES[name] for name in features)
        self.plain = list(features) == ["x"]
        self.looks_back = any(feature.previous for feature in self.features)

    def read(self, x: Tensor) -> Tensor:
        """The features of ``x`` (…, width), one token a row."""
        if self.plain:
            return x.reshape(-1, x.shape[-1])
        before = token_before(self, x) if self.looks_back else x
        parts = [feature.of(before if feature.previous else x) for feature in self.features]
        return torch.cat(parts, -1).flatten(0, -2)


class LinearBoundary(BoundaryModule):
    """``x -> x + F M (+ b)``: one matrix product at the boundary (paper, eq. 8, with W = I + M).

    ``M`` is kept rather than ``W`` because in bfloat16 the rounding of a diagonal near one would be
    as large as the entries of ``M`` themselves.
    """

    def __init__(self, width: int, bias: bool = False, features: Sequence[str] = ("x",)) -> None:
        super().__init__(features)
        self.M = nn.Parameter(torch.zeros(len(features) * width, width))
        self.b = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x`` (…, width)."""
        y = torch.addmm(x.reshape(-1, x.shape[-1]), self.read(x), self.M).view(x.shape)
        return y if self.b is None else y + self.b


class LowRankBoundary(BoundaryModule):
    """``x -> x + (F A) B (+ b)`` with ``M = A B`` of rank r: for one feature ``2 C r`` numbers."""

    def __init__(
        self, width: int, rank: int, bias: bool = False, features: Sequence[str] = ("x",)
    ) -> None:
        super().__init__(features)
        self.A = nn.Parameter(torch.zeros(len(features) * width, rank))
        self.B = nn.Parameter(torch.zeros(rank, width))
        self.b = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x`` (…, width)."""
        flat = x.reshape(-1, x.shape[-1])
        y = torch.addmm(flat, self.read(x) @ self.A, self.B).view(x.shape)
        return y if self.b is None else y + self.b


@cache
def _receiving(cls: Any) -> Any:
    """Subclass of a decoder layer or norm that passes its input through ``self.boundary`` first.

    It keeps the name of its parent, by which device placement knows what must not be split.
    """

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, self.boundary(hidden_states), *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": __name__})


def install_boundaries(model: PreTrainedModel) -> None:
    """Give every module named in ``config.ghost`` its (still empty) operator."""
    for entry in model.config.ghost:
        module: Any = model.get_submodule(entry["module"])
        plain: Any = type(module)
        become(module, _receiving(plain))
        rank = entry["rank"]
        kind: Any = partial(LowRankBoundary, rank=rank) if rank else LinearBoundary
        module.boundary = kind(entry["width"], bias=entry["bias"], features=entry["features"])
    boundaries = (m for m in model.modules() if isinstance(m, BoundaryModule))
    # Found once: a forward pass should not search all modules for what is rarely there.
    model.looking_back = [m for m in boundaries if m.looks_back]  # type: ignore[assignment]


def become(module: Any, cls: type) -> None:
    """Make ``module``, in place, an instance of ``cls``."""
    # Where accelerate placed it, the instance carries a forward that is bound to the old class.
    placement = getattr(module, "_hf_hook", None)
    if placement is not None:
        remove_hook_from_module(module)
        vars(module).pop("forward", None)
    module.__class__ = cls
    if placement is not None:
        add_hook_to_module(module, placement)


class GhostedMixin:
    """What a recovered model adds to its model's own class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_boundaries(self)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, into a folder that must be new or empty.

        Raises:
            FileExistsError: the folder holds something already.
        """
        if os.path.isdir(save_directory) and os.listdir(save_directory):
            raise FileExistsError(
                f"output folder {save_directory} exists and is not empty: name a new one"
            )
        # Weights under their modules' own names: some architectures' files have others (GPT-NeoX),
        # which transformers translates back for the stock model type alone.
        options = {"variant": VARIANT, "save_original_format": False, **kwargs}
        super().save_pretrained(save_directory, **options)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the file lacks an operator that the configuration names.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        options = {"variant": VARIANT, **kwargs, "output_loading_info": True}
        model, info = super().from_pretrained(*args, **options)  # type: ignore[misc]
        if lost := sorted(key for key in info["missing_keys"] if ".boundary." in key):
            raise ValueError(
                f"the saved model lacks its operators {lost}: save it again from ghostlib"
            )
        return (model, info) if wants_info else model


@cache
def ghosted_class(model_type: str) -> type[PreTrainedModel]:
    """The recovered class for a model type, registered so that `AutoModelForCausalLM` finds it."""
    config_base: type = CONFIG_MAPPING[model_type]
    model_base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_base]
    config_class = type(
        f"Ghosted{config_base.__name__}",
        (config_base,),
        {"model_type": GHOSTED + model_type, "__module__": __name__},
    )
    model_class = type(
        f"Ghosted{model_base.__name__}",
        (GhostedMixin, model_base),
        {
            "config_class": config_class,
            "forward": remembering(model_base.forward),
            "__module__": __name__,
        },
    )
    globals().update(
        {c.__name__: c for c in (config_class, model_class)}
    )  # so that pickle finds them
    AutoConfig.register(GHOSTED + model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return model_class


for _model_type in ARCHITECTURES:
    ghosted_class(_model_type)
