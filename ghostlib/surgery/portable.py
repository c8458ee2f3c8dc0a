"""Portable: one readable file of code beside the weights, put together from the tested code.

A repair with a module at the boundary needs a class that transformers does not have. Its source,
and that of all it calls, is put together into a file that imports nothing of this package.
"""

import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from ghostlib.statistics import features
from ghostlib.surgery import ghosted, previous

FILE = "modeling_ghosted"

_HEADER = '''"""A {base} without some of its decoder layers, repaired at the gap by a linear operator.

Ghosted Layers, arXiv 2605.15491. Written by ghostlib; load it with ``trust_remote_code=True``.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from {config_module} import {config}
from {model_module} import {base}
'''

_FOOTER = """
class {ghosted_config}({config}):
    model_type = "{model_type}"


class {ghosted}(GhostedMixin, {base}):
    config_class = {ghosted_config}
    forward = remembering({base}.forward)
"""


def write_portable(model: PreTrainedModel, folder: Path) -> None:
    """Add the code of ``model``'s class to a folder it was saved to, and name it in the config."""
    cls: Any = type(model)
    base = next(parent for parent in cls.__mro__ if not parent.__name__.startswith("Ghosted"))
    config = next(
        parent for parent in type(model.config).__mro__ if not parent.__name__.startswith("Ghosted")
    )
    names = {
        "base": base.__name__,
        "model_module": base.__module__,
        "config": config.__name__,
        "config_module": config.__module__,
        "ghosted": cls.__name__,
        "ghosted_config": type(model.config).__name__,
        "model_type": model.config.model_type,
    }
    parts = [
        _HEADER.format(**names),
        *_sources(features, ["_wide", "_divide", "rms_norm", "standardise", "_same", "Feature"]),
        _features(),
        *_sources(features, ["previous"]),
        *_sources(previous, ["LastTokens", "_Pass"]),
        '_PASS: ContextVar[_Pass | None] = ContextVar("_PASS", default=None)\n',
        *_sources(previous, ["token_before", "_during", "remembering"]),
        *_sources(previous, ["_real", "_cache_in", "_recall"]),
        f"VARIANT = {ghosted.VARIANT!r}\n",
        *_sources(ghosted, ["BoundaryModule", "LinearBoundary", "LowRankBoundary"]),
        *_sources(ghosted, ["_receiving", "install_boundaries", "become", "GhostedMixin"]),
        _FOOTER.format(**names),
    ]
    text = "\n\n".join(part.strip("\n") + "\n" for part in parts)
    (folder / f"{FILE}.py").write_text(text, encoding="utf-8")
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["auto_map"] = {
        "AutoConfig": f"{FILE}.{names['ghosted_config']}",
        "AutoModelForCausalLM": f"{FILE}.{names['ghosted']}",
    }
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _sources(module: ModuleType, names: list[str]) -> list[str]:
    """The source of functions and classes, with whatever decorates them."""
    return [inspect.getsource(getattr(module, name)) for name in names]


def _features() -> str:
    """The table of features of the stream, as code."""
    lines = [
        f"    {f.name!r}: Feature({f.name!r}, {f.of.__name__}, "
        f"previous={f.previous}, norm={f.norm!r}),"
        for f in features.FEATURES.values()
        if f.source == "stream"
    ]
    return "\n".join(["FEATURES = {", *lines, "}"]) + "\n"
