"""The recovered model: an ordinary `PreTrainedModel` whose constructor installs its operators.

A recovered model belongs to a subclass of its model's own class, made here for each architecture:
``GhostedLlamaForCausalLM`` is a ``LlamaForCausalLM`` whose ``config.ghost`` lists the operators, so
they are saved, loaded, moved and cast like any other parameter. The class is made, and registered
with transformers, when a model is recovered or loaded (`ghostlib.surgery.registration`). Without
this package, loading fails: the model type is unknown.
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
    as_current,
    current_pass,
    empty_instance,
    keep_last_tokens,
    pass_padding,
    previous_tokens,
)


class BoundaryModule(nn.Module):
    """``x -> x + F M (+ b)``: one matrix product at the boundary (paper, eq. 8, with W = I + M).

    ``F`` are features of ``x`` and of the previous token (`ghostlib.surgery.previous`). ``M`` is
    stored, not ``W``, because bfloat16 would round the diagonal of ``W`` by as much as the entries
    of ``M``. With a rank r it is stored as ``A B``: ``2 C r`` numbers for one feature.

    Args:
        width: width of the stream, C.
        place: index of the layer that receives the output.
        bias: whether there is a ``b``.
        rank: rank of ``M``; None to store ``M`` itself.
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
        earlier = previous_tokens(self.place, x) if self.looks_back else x
        parts = [feature.of(earlier if feature.previous else x) for feature in self.features]
        return torch.cat(parts, -1).flatten(0, -2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x`` (…, width)."""
        F, M = self.read(x), self.M if self.rank is None else self.B
        if self.rank is not None:
            F = F @ self.A.to(x.dtype)
        # Some models (Mamba) have a stream in float32 and weights in half precision.
        y = torch.addmm(x.reshape(-1, x.shape[-1]), F, M.to(x.dtype)).view(x.shape)
        return y if self.b is None else y + self.b


@cache
def _receiver_class(cls: Any) -> Any:
    """Subclass of a decoder layer or norm that passes its input through ``self.boundary`` first.

    It keeps the name of its parent, by which device placement knows what must not be split.
    """

    def forward(
        self: Any, hidden_states: Tensor, *args: Any, state: Pass | None = None, **kwargs: Any
    ) -> Any:
        with nullcontext() if state is None else as_current(state):
            stream = to_stream(hidden_states, self.layout)
            repaired = to_state(self.boundary(stream), hidden_states, self.layout)
        return cls.forward(self, repaired, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Gradient checkpointing runs `forward` again after the pass has ended.
        if self.boundary.looks_back:
            kwargs["state"] = current_pass()
        return cls.__call__(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return empty_instance, (_receiver_class, cls), vars(self)

    body = {"forward": forward, "__call__": call, "__reduce_ex__": reduce, "__module__": __name__}
    return type(cls.__name__, (cls,), body)


_ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    "module": (str,),
    "receiver": (int,),
    "width": (int,),
    "bias": (bool,),
    "rank": (int, type(None)),
    "features": (list,),
    "layout": (str,),
}


def _is_entry(entry: Any) -> bool:
    """Whether ``entry`` has the place and the shape of an operator."""
    if not isinstance(entry, dict):
        return False
    if not all(key in entry and type(entry[key]) in kinds for key, kinds in _ENTRY_TYPES.items()):
        return False
    sizes = [entry["width"], 1 if entry["rank"] is None else entry["rank"], len(entry["features"])]
    return min(sizes) > 0 and all(type(name) is str for name in entry["features"])


def install_boundaries(model: PreTrainedModel) -> None:
    """Install an operator, still zero, at every module named in ``config.ghost``.

    Raises:
        ValueError: ``config.ghost`` is empty, has an incomplete entry, or names a module twice or
            one that the model does not have.
    """
    entries = getattr(model.config, "ghost", None)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"a recovered model lists its operators in config.ghost, got {entries!r}")
    for entry in entries:
        if not _is_entry(entry):
            keys = ", ".join(_ENTRY_TYPES)
            raise ValueError(f"an entry of config.ghost holds {keys}, got {entry!r}")
    paths = [entry["module"] for entry in entries]
    modules = dict(model.named_modules())
    if len(set(paths)) < len(paths) or not set(paths) <= set(modules):
        raise ValueError(
            f"config.ghost puts operators before {', '.join(paths)}, each of which must be another "
            "module of the model: was config.json edited by hand?"
        )
    for entry in entries:
        module: Any = modules[entry["module"]]
        cls: Any = type(module)
        change_class(module, _receiver_class(cls))
        shape = {name: entry[name] for name in ("bias", "rank", "features")}
        module.boundary = BoundaryModule(entry["width"], entry["receiver"], **shape)
        module.layout = entry["layout"]
    # Collected once, so that no forward pass searches all modules.
    boundaries = [modules[path].boundary for path in paths]
    model.looking_back = tuple(b.place for b in boundaries if b.looks_back)


def change_class(module: Any, cls: type) -> None:
    """Make ``module``, in place, an instance of ``cls``."""
    # A hook of accelerate binds the forward of the old class to the instance.
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(module)
        vars(module).pop("forward", None)
    module.__class__ = cls
    if hook is not None:
        add_hook_to_module(module, hook)


_MISSING_WEIGHTS = "import-ghostlib-first.safetensors"
"""A weights file that does not exist, named in ``config.json`` and ignored by the recovered class:
the stock class stops there instead of loading every weight but the operators."""


class GhostedConfigMixin:
    """Mixin for the configuration of a recovered model."""

    def to_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig.to_dict`, with a weights file that does not exist."""
        settings: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return settings | {"transformers_weights": _MISSING_WEIGHTS}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`, without that file."""
        settings = {k: v for k, v in config_dict.items() if k != "transformers_weights"}
        return super().from_dict(settings, **kwargs)  # type: ignore[misc]


class GhostedMixin:
    """Mixin for the class of a recovered model."""

    looking_back: tuple[int, ...]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_boundaries(self)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        # With a static cache, `generate` compiles into CUDA graphs, which reuse the memory of a
        # boundary's last token.
        return not self.looking_back and super()._valid_auto_compile_criteria(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers loads the model as it loads its stock class."""
        return False

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, in one step, into a folder that is new or empty.

        A training loop, recognised by ``is_main_process`` or ``state_dict``, may save into the
        folder of its checkpoints.

        Raises:
            FileExistsError: the folder is a file, or is not empty.
            OSError: the folder cannot be written; nothing was.
        """
        folder = Path(save_directory).absolute()
        # Weights are named as in the modules: the other names that some architectures have in files
        # (GPT-NeoX) are translated back for the stock model type alone.
        options: dict[str, Any] = {"save_original_format": False} | kwargs
        if not kwargs.get("is_main_process", True):
            super().save_pretrained(folder, **options)  # type: ignore[misc]
            return
        training = "is_main_process" in kwargs or "state_dict" in kwargs
        check_new(folder, empty=not training)
        if kwargs.get("push_to_hub"):
            options.setdefault("repo_id", folder.name)
        with atomic_folder(folder) as temporary:
            super().save_pretrained(temporary, **options)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the weights do not match the configuration.
        """
        return_info = kwargs.pop("output_loading_info", False)
        options = kwargs | {"output_loading_info": True}
        model, info = super().from_pretrained(*args, **options)  # type: ignore[misc]
        for kind, mismatch in (
            ("missing_keys", "lacks weights that its config.json calls for"),
            ("unexpected_keys", "has weights that its config.json does not name"),
        ):
            if names := sorted(info[kind]):
                raise ValueError(f"the saved model {mismatch}, such as {names[0]}: save it again")
        return (model, info) if return_info else model


def check_new(folder: Path, *, empty: bool = True) -> None:
    """Refuse, by `FileExistsError`, a folder that is a file or, if ``empty``, has files."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output folder {folder} is a file: name a folder")
    if empty and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"output folder {folder} exists and is not empty: name a new one")


def save_stock(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    """As `PreTrainedModel.save_pretrained`, which only logs that the folder is a file.

    Raises:
        FileExistsError: the folder is a file.
    """
    check_new(Path(save_directory), empty=False)
    type(model).save_pretrained(model, save_directory, *args, **kwargs)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files go to ``folder`` when all of them are written.

    Raises:
        OSError: the folder cannot be written; nothing remains of it.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        pattern = re.compile(rf"\.+{re.escape(folder.name)}(?:\.\d+\.tmp)*\.(\d+)\.tmp")
        for path in folder.parent.iterdir() if folder.parent.exists() else ():
            match = pattern.fullmatch(path.name)
            if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
                shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        if not folder.exists():
            temporary.rename(folder)
            return
        for shard in folder.glob("model*.safetensors*"):  # there may be fewer new ones
            shard.unlink()
        # The configuration last: without it the folder does not pass for a model.
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} could not be written, nothing was saved: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_OUTER_TYPES = {"emu3_text_model": "emu3", "mllama_text_model": "mllama"}
"""Types of text models whose class transformers lists under the type of the outer model."""


@cache
def ghosted_class(model_type: str) -> type[PreTrainedModel]:
    """The recovered class for a model type, made and registered with transformers."""
    config_base: type = CONFIG_MAPPING[model_type]
    outer: type = CONFIG_MAPPING[_OUTER_TYPES.get(model_type, model_type)]
    model_base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[outer]
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
            "forward": keep_last_tokens(model_base.forward),
            "prepare_inputs_for_generation": pass_padding(model_base.prepare_inputs_for_generation),
            "__module__": __name__,
        },
    )
    # Pickle looks the classes up here.
    globals().update({c.__name__: c for c in (config_class, model_class)})
    AutoConfig.register(GHOSTED + model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return model_class
