"""The recovered model: an ordinary `PreTrainedModel` whose constructor installs its operators.

A recovered model belongs to a subclass of its model's own class, made here for each architecture:
``GhostedLlamaForCausalLM`` is a ``LlamaForCausalLM`` whose ``config.ghost`` lists the operators, so
they are saved, loaded, moved and cast like any other parameter. Importing this module registers
the subclasses with transformers; without it, loading fails for want of the model type.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME

from ghostlib.models.architectures import (
    ARCHITECTURES,
    GHOSTED,
    hidden_size,
    num_layers,
    receiver,
)
from ghostlib.statistics.features import FEATURES, STREAM
from ghostlib.surgery.previous import (
    Pass,
    current_pass,
    during,
    handing_on_padding,
    remembering,
    token_before,
)

_STREAM = STREAM.features


class BoundaryModule(nn.Module):
    """``x -> x + (what its matrix makes of x, or of several features of x side by side)``.

    Features of the token before are taken with the help of `ghostlib.surgery.previous`.

    Args:
        place: index of the layer that receives its output.
        features: names from `FEATURES`.
    """

    def __init__(self, place: int, features: Sequence[str] = ("x",)) -> None:
        super().__init__()
        self.place = place
        self.features = tuple(FEATURES[name] for name in features)
        self.looks_back = any(feature.previous for feature in self.features)

    def read(self, x: Tensor) -> Tensor:
        """The features of ``x`` (…, width), one token a row."""
        if self.features == _STREAM:
            return x.reshape(-1, x.shape[-1])
        before = token_before(self.place, x) if self.looks_back else x
        parts = [feature.of(before if feature.previous else x) for feature in self.features]
        return torch.cat(parts, -1).flatten(0, -2)


class LinearBoundary(BoundaryModule):
    """``x -> x + F M (+ b)``: one matrix product at the boundary (paper, eq. 8, with W = I + M).

    ``M`` is kept rather than ``W`` because in bfloat16 the rounding of a diagonal near one would be
    as large as the entries of ``M`` themselves.
    """

    def __init__(
        self, width: int, place: int, bias: bool = False, features: Sequence[str] = ("x",)
    ) -> None:
        super().__init__(place, features)
        self.M = nn.Parameter(torch.zeros(len(features) * width, width))
        self.b = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x`` (…, width)."""
        y = torch.addmm(x.reshape(-1, x.shape[-1]), self.read(x), self.M).view(x.shape)
        return y if self.b is None else y + self.b


class LowRankBoundary(BoundaryModule):
    """``x -> x + (F A) B (+ b)`` with ``M = A B`` of rank r: for one feature ``2 C r`` numbers."""

    def __init__(
        self,
        width: int,
        place: int,
        rank: int,
        bias: bool = False,
        features: Sequence[str] = ("x",),
    ) -> None:
        super().__init__(place, features)
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

    def forward(
        self: Any, hidden_states: Tensor, *args: Any, begun: Pass | None = None, **kwargs: Any
    ) -> Any:
        with nullcontext() if begun is None else during(begun):
            repaired = self.boundary(hidden_states)
        return cls.forward(self, repaired, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Gradient checkpointing runs `forward` again when the pass is long over, so it comes along.
        if self.boundary.looks_back:
            kwargs["begun"] = current_pass()
        return cls.__call__(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return _empty_receiver, (cls,), vars(self)  # this class is made, not imported

    body = {"forward": forward, "__call__": call, "__reduce_ex__": reduce, "__module__": __name__}
    return type(cls.__name__, (cls,), body)


def _empty_receiver(cls: type) -> Any:
    kind = _receiving(cls)
    return kind.__new__(kind)


_ENTRY = ("receiver", "bias", "rank", "features")


def install_boundaries(model: PreTrainedModel) -> None:
    """Give every receiver named in ``config.ghost`` its (still empty) operator.

    Raises:
        ValueError: it names no operator, one without its shape, or a receiver twice or out of
            range.
    """
    entries = getattr(model.config, "ghost", None)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"a recovered model lists its operators in config.ghost, got {entries!r}")
    for entry in entries:
        if not isinstance(entry, dict) or not all(key in entry for key in _ENTRY):
            raise ValueError(f"an entry of config.ghost holds {', '.join(_ENTRY)}, got {entry!r}")
    places = [entry["receiver"] for entry in entries]
    if len(set(places)) < len(places) or not set(places) <= set(range(num_layers(model) + 1)):
        raise ValueError(
            f"config.ghost puts operators before layers {places}, each of which must be another "
            f"one of 0 … {num_layers(model)}: was config.json edited by hand?"
        )
    for place, entry in zip(places, entries, strict=True):
        module: Any = receiver(model, place)
        become(module, _receiving(type(module)))
        width, rank = hidden_size(model), entry["rank"]
        kind: Any = partial(LowRankBoundary, rank=rank) if rank else LinearBoundary
        module.boundary = kind(width, place, bias=entry["bias"], features=entry["features"])
    # Found once: a forward pass should not search all modules for what is rarely there.
    model.looking_back = tuple(  # type: ignore[assignment]
        place for place in places if cast(Any, receiver(model, place)).boundary.looks_back
    )


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


_REFUSAL = "import-ghostlib-first.safetensors"
"""Weights file that ``config.json`` names to everyone but the recovered class, and that does not
exist: the stock class stops there instead of loading every weight but the operators."""


class GhostedConfigMixin:
    """What the configuration of a recovered model adds to its model's own."""

    def to_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig.to_dict`, with the weights' file that only ghostlib ignores."""
        return super().to_dict() | {"transformers_weights": _REFUSAL}  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`."""
        known = {k: v for k, v in config_dict.items() if k != "transformers_weights"}
        return super().from_dict(known, **kwargs)  # type: ignore[misc]


class GhostedMixin:
    """What a recovered model adds to its model's own class."""

    looking_back: tuple[int, ...]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_boundaries(self)  # type: ignore[arg-type]

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        # With a static cache, `generate` compiles into CUDA graphs, which reuse the memory that a
        # boundary's last token is kept in.
        if self.looking_back:
            return False
        return super()._valid_auto_compile_criteria(*args, **kwargs)  # type: ignore[misc,no-any-return]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, into a folder that must be new or empty.

        It is written under another name and renamed once it is whole. A training loop, known by
        ``is_main_process`` or ``state_dict``, may save into a folder that holds its checkpoints.

        Raises:
            FileExistsError: there is a file of that name, or a folder that holds something.
            OSError: it could not be written, and nothing was.
        """
        folder = Path(save_directory).absolute()
        # Weights under their modules' own names: some architectures' files have others (GPT-NeoX),
        # which transformers translates back for the stock model type alone.
        options: dict[str, Any] = {"save_original_format": False} | kwargs
        if not kwargs.get("is_main_process", True):
            super().save_pretrained(folder, **options)  # type: ignore[misc]
            return
        training = "is_main_process" in kwargs or "state_dict" in kwargs
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"output {folder} is a file: name a new folder")
        if not training and folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"output folder {folder} exists and is not empty: name a new one")
        if kwargs.get("push_to_hub"):
            options.setdefault("repo_id", folder.name)
        with _whole(folder) as fresh:
            super().save_pretrained(fresh, **options)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the weights and the configuration do not belong together.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        options = kwargs | {"output_loading_info": True}
        model, info = super().from_pretrained(*args, **options)  # type: ignore[misc]
        for kind, complaint in (
            ("missing_keys", "lacks weights that its config.json calls for"),
            ("unexpected_keys", "has weights that its config.json does not name"),
        ):
            if lost := sorted(info[kind]):
                raise ValueError(
                    f"the saved model {complaint}, such as {lost[0]}: save it again from ghostlib"
                )
        return (model, info) if wants_info else model


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` once all has been written to it."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if not folder.exists():
            fresh.rename(folder)
            return
        for old in folder.glob("model*.safetensors*"):  # as many shards as last time, or none
            old.unlink()
        # without its configuration nobody takes the folder for a model
        for file in sorted(fresh.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} could not be written, nothing was saved: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@cache
def ghosted_class(model_type: str) -> type[PreTrainedModel]:
    """The recovered class for a model type, registered so that `AutoModelForCausalLM` finds it."""
    config_base: type = CONFIG_MAPPING[model_type]
    model_base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_base]
    config_class = type(
        f"Ghosted{config_base.__name__}",
        (GhostedConfigMixin, config_base),
        {"model_type": GHOSTED + model_type, "__module__": __name__},
    )
    model_class = type(
        f"Ghosted{model_base.__name__}",
        (GhostedMixin, model_base),
        {
            "config_class": config_class,
            "forward": remembering(model_base.forward),
            "prepare_inputs_for_generation": handing_on_padding(
                model_base.prepare_inputs_for_generation
            ),
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
