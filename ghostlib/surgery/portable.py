"""Portable: one readable file of code beside the weights, put together from the tested code.

A repair with a module at the boundary needs a class that transformers does not have. Its source,
and that of all it calls, is put together into a file that imports nothing of this package.
"""

import ast
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from ghostlib.models import architectures
from ghostlib.statistics import features
from ghostlib.surgery import ghosted, previous

FILE = "modeling_ghosted"
_FEATURES = ("_wide", "_divide", "rms_norm", "standardise", "_same", "Feature")
_REGISTRATION = ("ghosted_class", "_INSIDE", "save_stock")

_HEADER = '''"""A {base} without some decoder layers, repaired at the gap by a linear operator.

Ghosted Layers, arXiv 2605.15491. Written by ghostlib; load it with ``trust_remote_code=True``.
"""

from {config_module} import {config}
from {model_module} import {base}
'''

_FOOTER = """
class {ghosted_config}(GhostedConfigMixin, {config}):
    model_type = "{model_type}"


class {ghosted}(GhostedMixin, {base}):
    config_class = {ghosted_config}
    forward = remembering({base}.forward)
    prepare_inputs_for_generation = handing_on_padding({base}.prepare_inputs_for_generation)
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
        *_definitions(features, only=_FEATURES),
        _table(),
        *_definitions(features, only=["previous"]),
        *_definitions(previous),
        *_definitions(architectures, only=["to_stream", "to_state"]),
        *_definitions(ghosted, leave_out=_REGISTRATION),
    ]
    imports = sorted({line for m in (features, previous, ghosted) for line in _imports(m)})
    parts = [_HEADER.format(**names) + "\n".join(imports), *parts, _FOOTER.format(**names)]
    text = "\n\n".join(part.strip("\n") + "\n" for part in parts)
    (folder / f"{FILE}.py").write_text(text, encoding="utf-8")
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["auto_map"] = {
        "AutoConfig": f"{FILE}.{names['ghosted_config']}",
        "AutoModelForCausalLM": f"{FILE}.{names['ghosted']}",
    }
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _definitions(
    module: ModuleType, *, only: Sequence[str] = (), leave_out: Sequence[str] = ()
) -> Iterator[str]:
    """The source of a module's top-level definitions, comments and docstring left out."""
    source = inspect.getsource(module)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
            segment = inspect.getsource(getattr(module, node.name))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            segment = ast.get_source_segment(source, node) or ""
        else:
            continue
        if (not only or names[0] in only) and names[0] not in leave_out:
            yield segment


def _imports(module: ModuleType) -> Iterator[str]:
    """The imports of a module, this package's own left out."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            line = ast.unparse(node)
            if "ghostlib" not in line:
                yield line


def _table() -> str:
    """The table of features of the stream, as code."""
    lines = [
        f"    {f.name!r}: Feature({f.name!r}, {f.of.__name__}, "
        f"previous={f.previous}, norm={f.norm!r}),"
        for f in features.FEATURES.values()
        if f.source == "stream"
    ]
    return "\n".join(["FEATURES = {", *lines, "}"])
