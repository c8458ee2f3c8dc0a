"""Portable: one file of code that loads a recovered model without this package.

A repair with a module at the boundary needs a class that transformers does not have. The file is
assembled from the source of that class and of everything it calls.
"""

import ast
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedModel

from ghostlib.models import architectures
from ghostlib.statistics import features
from ghostlib.surgery import ghosted, previous

FILE = "modeling_ghosted"
_FEATURES = ("_wide", "_divide", "rms_norm", "standardise", "_same", "Feature", "previous")
_REGISTRATION = ("ghosted_class", "_OUTER_TYPES", "save_stock")

_HEADER = '''"""A {base.__name__} without some decoder layers, with linear operators at the gaps.

Ghosted Layers, arXiv 2605.15491. Written by ghostlib; load it with ``trust_remote_code=True``.
"""

from {config_base.__module__} import {config_base.__name__}
from {base.__module__} import {base.__name__}
'''

_FOOTER = """
class {config.__name__}(GhostedConfigMixin, {config_base.__name__}):
    model_type = "{config.model_type}"


class {cls.__name__}(GhostedMixin, {base.__name__}):
    config_class = {config.__name__}
    forward = keep_last_tokens({base.__name__}.forward)
    prepare_inputs_for_generation = pass_padding({base.__name__}.prepare_inputs_for_generation)
"""


def write_portable(model: PreTrainedModel, folder: Path) -> None:
    """Add the code of ``model``'s class to its saved folder, and its name to the configuration."""
    cls, config = type(model), type(model.config)
    _, base = cls.__bases__
    _, config_base = config.__bases__
    names = {"cls": cls, "base": base, "config": config, "config_base": config_base}
    parts = [
        *_definitions(features, only=_FEATURES),
        _feature_table(),
        *_definitions(previous),
        *_definitions(architectures, only=["to_stream", "to_state"]),
        *_definitions(ghosted, exclude=_REGISTRATION),
    ]
    imports = sorted({line for m in (features, previous, ghosted) for line in _imports(m)})
    parts = [_HEADER.format(**names) + "\n".join(imports), *parts, _FOOTER.format(**names)]
    text = "\n\n".join(part.strip("\n") + "\n" for part in parts)
    (folder / f"{FILE}.py").write_text(text, encoding="utf-8")
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["auto_map"] = {
        "AutoConfig": f"{FILE}.{config.__name__}",
        "AutoModelForCausalLM": f"{FILE}.{cls.__name__}",
    }
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _definitions(
    module: ModuleType, *, only: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Iterator[str]:
    """Source of the top-level definitions of a module, without its docstring and comments."""
    source = inspect.getsource(module)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
            segment = inspect.getsource(getattr(module, name))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            segment = ast.get_source_segment(source, node) or ""
        else:
            continue
        if (not only or name in only) and name not in exclude:
            yield segment


def _imports(module: ModuleType) -> Iterator[str]:
    """Imports of a module, except from this package."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Import | ast.ImportFrom) and "ghostlib" not in ast.unparse(node):
            yield ast.unparse(node)


def _feature_table() -> str:
    """Table of the features of the stream, as code."""
    lines = [
        f"    {f.name!r}: Feature({f.name!r}, {f.of.__name__}, "
        f"previous={f.previous}, norm={f.norm!r}),"
        for f in features.FEATURES.values()
        if f.source == "stream"
    ]
    return "\n".join(["FEATURES = {", *lines, "}"])
