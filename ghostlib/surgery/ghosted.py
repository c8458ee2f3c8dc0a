"""The recovered model: an ordinary `PreTrainedModel` whose constructor installs its operators.

A recovered model belongs to a subclass of its model's own class, made here for each architecture:
``GhostedLlamaForCausalLM`` is a ``LlamaForCausalLM`` whose ``config.ghost`` lists the operators, so
they are saved, loaded, moved and cast like any other parameter. The class is made, and registered
with transformers, when a model is recovered or loaded (`ghostlib.surgery.registration`). Without
this package, loading fails for want of the model type.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import psutil
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

from ghostlib.common import GHOSTED
from ghostlib.models.architectures import to_state, to_stream
from ghostlib.statistics.features import FEATURES
from ghostlib.surgery.previous import (
    Pass,
    current_pass,
    during,
    handing_on_padding,
    remembering,
    token_before,
)


class BoundaryModule(nn.Module):
    """``x -> x + F M (+ b)``: one matrix product at the boundary (paper, eq. 8, with W = I + M).

    ``F`` are features of ``x``, those of the token before by `ghostlib.surgery.previous`. ``M`` is
    kept rather than ``W`` because in bfloat16 the rounding of a diagonal near one would be as large
    as the entries of ``M`` themselves; of rank r as ``A B``, for one feature ``2 C r`` numbers.

    Args:
        width: of the stream, C.
        place: index of the layer that receives its output.
        bias: whether there is a ``b``.
        rank: of ``M``; None for a matrix that is kept as it is.
        features: names from `FEATURES`.
    """

    def __init__(
        self,
        width: int,
        place: int,
        *,
        bias: bool = False,
        rank: int | None = None,
        features: Sequence[str] = ("x",),
    ) -> None:
        super().__init__()
        self.place, self.rank = place, rank
        self.features = tuple(FEATURES[name] for name in features)
        self.plain = list(features) == ["x"]
        self.looks_back = any(feature.previous for feature in self.features)
        if rank is None:
            self.M = nn.Parameter(torch.zeros(len(features) * width, width))
        else:
            self.A = nn.Parameter(torch.zeros(len(features) * width, rank))
            self.B = nn.Parameter(torch.zeros(rank, width))
        self.b = nn.Parameter(torch.zeros(width)) if bias else None

    def read(self, x: Tensor) -> Tensor:
        """The features of ``x`` (…, width), one token a row."""
        if self.plain:
            return x.reshape(-1, x.shape[-1])
        before = token_before(self.place, x) if self.looks_back else x
        parts = [feature.of(before if feature.previous else x) for feature in self.features]
        return torch.cat(parts, -1).flatten(0, -2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x`` (…, width)."""
        F, M = self.read(x), self.M if self.rank is None else self.B
        if self.rank is not None:
            F = F @ self.A.to(x.dtype)
        # Some models (Mamba) keep a stream in float32 beside weights in half precision.
        y = torch.addmm(x.reshape(-1, x.shape[-1]), F, M.to(x.dtype)).view(x.shape)
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
            stream = to_stream(hidden_states, self.layout)
            repaired = to_state(self.boundary(stream), hidden_states, self.layout)
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


_ENTRY: dict[str, tuple[type, ...]] = {
    "module": (str,),
    "receiver": (int,),
    "width": (int,),
    "bias": (bool,),
    "rank": (int, type(None)),
    "features": (list,),
    "layout": (str,),
}


def _is_entry(entry: Any) -> bool:
    """Whether it says the place and the shape of an operator."""
    if not isinstance(entry, dict):
        return False
    if not all(key in entry and type(entry[key]) in kinds for key, kinds in _ENTRY.items()):
        return False
    sizes = [entry["width"], 1 if entry["rank"] is None else entry["rank"], len(entry["features"])]
    return min(sizes) > 0 and all(type(name) is str for name in entry["features"])


def install_boundaries(model: PreTrainedModel) -> None:
    """Give every module named in ``config.ghost`` its (still empty) operator.

    Raises:
        ValueError: it names no operator, one without its shape, or a module twice or that the model
            does not have.
    """
    entries = getattr(model.config, "ghost", None)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"a recovered model lists its operators in config.ghost, got {entries!r}")
    for entry in entries:
        if not _is_entry(entry):
            raise ValueError(f"an entry of config.ghost holds {', '.join(_ENTRY)}, got {entry!r}")
    paths = [entry["module"] for entry in entries]
    known = dict(model.named_modules())
    if len(set(paths)) < len(paths) or not set(paths) <= set(known):
        raise ValueError(
            f"config.ghost puts operators before {', '.join(paths)}, each of which must be another "
            "module of the model: was config.json edited by hand?"
        )
    for entry in entries:
        module: Any = known[entry["module"]]
        plain: Any = type(module)
        become(module, _receiving(plain))
        shape = {name: entry[name] for name in ("bias", "rank", "features")}
        module.boundary = BoundaryModule(entry["width"], entry["receiver"], **shape)
        module.layout = entry["layout"]
    # Found once: a forward pass should not search all modules for what is rarely there.
    boundaries = [known[path].boundary for path in paths]
    model.looking_back = tuple(b.place for b in boundaries if b.looks_back)


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
        settings: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return settings | {"transformers_weights": _REFUSAL}

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
        install_boundaries(self)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        # With a static cache, `generate` compiles into CUDA graphs, which reuse the memory that a
        # boundary's last token is kept in.
        if self.looking_back:
            return False
        return super()._valid_auto_compile_criteria(*args, **kwargs)  # type: ignore[misc,no-any-return]

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: all that transformers computes while it loads is computed by the stock class."""
        return False

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
        check_new(folder, empty=not training)
        if kwargs.get("push_to_hub"):
            options.setdefault("repo_id", folder.name)
        with whole(folder) as fresh:
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
                raise ValueError(f"the saved model {complaint}, such as {lost[0]}: save it again")
        return (model, info) if wants_info else model


def check_new(folder: Path, *, empty: bool = True) -> None:
    """Refuse, by `FileExistsError`, a folder that is a file, or that holds something already."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output folder {folder} is a file: name a folder")
    if empty and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"output folder {folder} exists and is not empty: name a new one")


def save_stock(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    """As `PreTrainedModel.save_pretrained`, which would log a file of that name and save nothing.

    Raises:
        FileExistsError: there is a file of that name.
    """
    check_new(Path(save_directory), empty=False)
    type(model).save_pretrained(model, save_directory, *args, **kwargs)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` once all has been written to it.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        known = re.compile(rf"\.+{re.escape(folder.name)}(?:\.\d+\.tmp)*\.(\d+)\.tmp")
        for left in folder.parent.iterdir() if folder.parent.exists() else ():
            found = known.fullmatch(left.name)
            if found and (int(found[1]) == os.getpid() or not psutil.pid_exists(int(found[1]))):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
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


_INSIDE = {"emu3_text_model": "emu3", "mllama_text_model": "mllama"}
"""Configurations of a text model whose class transformers lists under the whole one's type."""


@cache
def ghosted_class(model_type: str) -> type[PreTrainedModel]:
    """The recovered class for a model type, registered so that `AutoModelForCausalLM` finds it."""
    config_base: type = CONFIG_MAPPING[model_type]
    whole: type = CONFIG_MAPPING[_INSIDE.get(model_type, model_type)]
    model_base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[whole]
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
    AutoConfig.register(GHOSTED + model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return model_class
