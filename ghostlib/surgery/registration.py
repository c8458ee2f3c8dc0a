"""Registration: transformers' Auto classes load recovered models after a bare `import ghostlib`.

To keep that import cheap, the classes are registered lazily: the first look-up of the type of a
recovered model imports `ghostlib.surgery.ghosted`, which makes and registers its class.
"""

import sys
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ghostlib.common import GHOSTED

_AUTO = "transformers.models.auto.configuration_auto"


class _Registered(dict[str, Any]):
    """Registered configurations by model type; those of recovered models on first look-up."""

    def __contains__(self, model_type: object) -> bool:
        name = str(model_type)
        if name.startswith(GHOSTED) and not super().__contains__(name):
            with suppress(KeyError):  # a type that transformers does not know
                import_module("ghostlib.surgery.ghosted").ghosted_class(name.removeprefix(GHOSTED))
        return super().__contains__(name)


class _Finder(MetaPathFinder):
    """Import hook that extends transformers' table of configurations once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _extend(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _extend(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _Registered(mapping._extra_content)


def register_lazily() -> None:
    """Make transformers look up recovered models, now or as soon as it is imported."""
    if _AUTO in sys.modules:
        _extend(sys.modules[_AUTO])
    else:
        sys.meta_path.insert(0, _Finder())
