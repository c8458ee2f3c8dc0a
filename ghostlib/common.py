"""Helpers of every subpackage: registries, progress bars, warnings, checks of arguments."""

import inspect
import io
import operator
import os
import sys
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    suppress,
)
from difflib import get_close_matches
from functools import wraps
from numbers import Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

T = TypeVar("T")
P = ParamSpec("P")

GHOSTED = "ghosted_"
"""Prefix of the model type of a recovered model."""

DENSE, PRUNED, AUTO, SEQUENTIAL = "dense", "pruned", "auto", " sequential"
"""Names used in place of an operator's: the dense model, layers removed without a repair, the
recipe's choice; and the suffix of an operator that is fitted sequentially."""


class Registry(dict[str, T]):
    """Entries of one kind (operators, criteria, corpora …) by name.

    >>> registry = Registry("operator")
    >>> registry["ghost"] = 1
    >>> registry["gost"]
    Traceback (most recent call last):
    ValueError: unknown operator 'gost'; did you mean 'ghost'? Known: ghost
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __missing__(self, name: str) -> T:
        close = get_close_matches(str(name), self, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        quoted = one_line(repr(name))
        raise ValueError(f"unknown {self.kind} {quoted}{hint} Known: {', '.join(self)}")


def one_line(name: object, length: int = 300) -> str:
    """``name`` for a terminal: without control characters, cut after ``length`` characters."""
    text = str(name)
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def shown() -> bool:
    """Whether progress bars are shown: unless ``GHOSTLIB_PROGRESS=0``."""
    return os.environ.get("GHOSTLIB_PROGRESS", "1") != "0"


def track(items: Iterable[T], description: str, unit: str = "window") -> Iterable[T]:
    """Iterate over ``items`` with a progress bar that disappears at the end."""
    from tqdm.auto import tqdm

    bar: Iterable[T] = tqdm(items, description, unit=unit, leave=False, disable=not shown())
    return bar


def quiet() -> AbstractContextManager[object]:
    """Hide the progress bars of other libraries where ghostlib shows none either."""
    # Not all of them can be switched off, but all of them write to the error stream.
    return nullcontext() if shown() else redirect_stderr(io.StringIO())


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the first caller outside this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] == "ghostlib":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def versions(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    from importlib import metadata

    installed = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces ``path`` on success and is deleted on failure."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def nearest_existing(path: Path) -> Path:
    """``path`` itself, or its nearest parent that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def hub_trouble() -> str:
    """Why the Hugging Face hub cannot be reached, by a single request; empty if it can."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # its class depends on the release of huggingface_hub
        return str(error) or type(error).__name__
    return ""


@contextmanager
def without_retries() -> Iterator[str]:
    """Read from the cache alone if the hub cannot be reached. Yields `hub_trouble`.

    Otherwise every file costs half a minute of retries.
    """
    from unittest.mock import patch

    trouble = hub_trouble()
    with ExitStack() as stack:
        for name in ("huggingface_hub.constants", "datasets.config"):
            if trouble and sys.modules.get(name):
                stack.enter_context(patch(f"{name}.HF_HUB_OFFLINE", True))
        yield trouble


# ---------------------------------------------------------------- arguments


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Refuse arguments of another kind than their annotations, before any work.

    Models are left to `ghostlib.models.architectures.check_model`, ranges to the function itself.

    Raises:
        ValueError: another kind; the message has the name, the value and what is allowed.
    """
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    kinds = {parameter.name: parameter.annotation for parameter in parameters}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in kinds and not is_kind(value, kinds[name]):
                raise ValueError(
                    f"{name} must be {_description(kinds[name])}, got {short_repr(value)}"
                )
        return function(*args, **kwargs)

    return call


def at_least(least: int, **sizes: int | None) -> None:
    """Refuse a size below ``least``; None, an optional size, passes."""
    for name, value in sizes.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def is_kind(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of the annotated ``kind``; true if the annotation says nothing."""
    parts, origin = get_args(kind), get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(is_kind(value, part) for part in parts)
    if kind is int:
        return is_integer(value)
    if kind is float:
        number = value.item() if getattr(value, "ndim", None) == 0 else value  # a scalar tensor
        return isinstance(number, Real) and not isinstance(number, bool)
    if origin is tuple and parts[-1] is not Ellipsis:
        pair = isinstance(value, tuple | list) and len(value) == len(parts)
        return pair and all(map(is_kind, value, parts))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            is_kind(item, parts[1]) for item in value.values()
        )
    if isinstance(origin, type) and issubclass(origin, Iterable):
        if not isinstance(value, Iterable) or isinstance(value, str):
            return False
        # an iterator is left to the function: looking into it would exhaust it
        return not isinstance(value, Collection) or all(is_kind(item, parts[0]) for item in value)
    if origin is not None:
        return not isinstance(origin, type) or isinstance(value, origin)
    unchecked = not isinstance(kind, type) or kind in (Any, bool, inspect.Parameter.empty)
    return unchecked or kind.__name__ == "PreTrainedModel" or isinstance(value, kind)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer of Python or of a tensor library, and not a boolean."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return "bool" not in str(getattr(value, "dtype", type(value)))


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "Path": "a path",
    "PathLike": "a path",
    "Callable": "a function",
    "Mapping": "a dictionary",
    "NoneType": "None",
    "tuple": "a pair",
}


def _description(kind: Any) -> str:
    parts, origin = get_args(kind), get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_description, parts)))
    name = (origin or kind).__name__
    if name in ("Iterable", "Sequence", "Collection") or Ellipsis in parts:
        return f"a list (each {_description(parts[0])})"
    return _KINDS.get(name, f"a {name}")


def short_repr(value: Any) -> str:
    """``value`` for an error message, in one short line."""
    shape = getattr(value, "shape", None)
    kind = f"{type(value).__name__} of {getattr(value, 'dtype', 'items')}"
    text = repr(value) if shape is None else f"a {kind}, {tuple(shape)}"
    return text if text.isprintable() and len(text) <= 80 else f"a {type(value).__name__}"
