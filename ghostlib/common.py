"""What every room uses: names with a helpful error, progress bars, warnings to the caller."""

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
"""What stands before the model type of a recovered model."""

DENSE, PRUNED, AUTO, SEQUENTIAL = "dense", "pruned", "auto", " sequential"
"""Names that stand where an operator is named, and are no families: the model as it was, layers
removed without repair, what the recipe chooses; and what is written behind an operator that is
fitted to what the earlier ones let through."""


class Registry(dict[str, T]):
    """Names of one kind (operators, criteria, corpora …) and what they stand for.

    >>> registry = Registry("operator")
    >>> registry["ghost"] = 1
    >>> registry["gost"]
    Traceback (most recent call last):
    ValueError: unknown operator 'gost'; did you mean 'ghost'? Known: ghost
    """

    def __init__(self, kind: str, **entries: T) -> None:
        super().__init__(**entries)
        self.kind = kind

    def __missing__(self, name: str) -> T:
        close = get_close_matches(str(name), self, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        asked = one_line(repr(name))
        raise ValueError(f"unknown {self.kind} {asked}{hint} Known: {', '.join(self)}")


def one_line(name: object, length: int = 300) -> str:
    """A name as a terminal may show it: without control characters, and not too long."""
    text = str(name)
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def shown() -> bool:
    """Whether progress bars are wanted: not where ``GHOSTLIB_PROGRESS=0``."""
    return os.environ.get("GHOSTLIB_PROGRESS", "1") != "0"


def track(items: Iterable[T], what: str, unit: str = "window") -> Iterable[T]:
    """Iterate over ``items`` under a progress bar that leaves no trace when done."""
    from tqdm.auto import tqdm

    bar: Iterable[T] = tqdm(items, desc=what, unit=unit, leave=False, disable=not shown())
    return bar


def quiet() -> AbstractContextManager[object]:
    """Other libraries' progress bars stay out of sight where ghostlib may not draw its own."""
    # Not all of them heed a switch of their own, but all of them write to the error stream.
    return nullcontext() if shown() else redirect_stderr(io.StringIO())


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, in the name of the first caller outside this package, however deep the call is."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] == "ghostlib":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def versions(*packages: str) -> dict[str, str]:
    """Those of the packages that are installed."""
    from importlib import metadata

    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of ``path`` once it is whole, or leaves it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def existing(path: Path) -> Path:
    """The file or folder itself, or the nearest one above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def hub_trouble() -> str:
    """Why the Hugging Face hub cannot be reached, after one try; empty where it can."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of another library in each release of huggingface_hub
        return str(error) or type(error).__name__
    return ""


@contextmanager
def without_retries() -> Iterator[str]:
    """Where the hub is out of reach, what is in the cache is found at once, and the rest missed.

    Otherwise every file costs half a minute of retries. Yields `hub_trouble`.
    """
    trouble = hub_trouble()
    known = (sys.modules.get(name) for name in ("huggingface_hub.constants", "datasets.config"))
    places: list[Any] = [place for place in known if place and trouble]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield trouble
    finally:
        for place, offline in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = offline


# ---------------------------------------------------------------- arguments


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Refuse arguments of another kind than the annotations say, in one line, before any work.

    Models are left to `ghostlib.models.architectures.check_model`, ranges to the function itself.

    Raises:
        ValueError: such an argument; the message has its name, its value and what is allowed.
    """
    signature = inspect.signature(function)
    known = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in known and not fits(value, known[name]):
                raise ValueError(f"{name} must be {_described(known[name])}, got {told(value)}")
        return function(*args, **kwargs)

    return call


def at_least(least: int, **sizes: int | None) -> None:
    """Refuse a size below ``least``, by name; None is for those that may be left out."""
    for name, value in sizes.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated kind; of what has no say in it, everything is."""
    parts, origin = get_args(kind), get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if kind is int:
        return whole(value)
    if kind is float:
        number = value.item() if getattr(value, "ndim", None) == 0 else value  # of a tensor
        return isinstance(number, Real) and not isinstance(number, bool)
    if origin is tuple and parts[-1] is not Ellipsis:
        pair = isinstance(value, tuple | list) and len(value) == len(parts)
        return pair and all(map(fits, value, parts))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(item, parts[1]) for item in value.values())
    if isinstance(origin, type) and issubclass(origin, Iterable):
        if not isinstance(value, Iterable) or isinstance(value, str):
            return False
        # what can be iterated but once is left to the function
        return not isinstance(value, Collection) or all(fits(item, parts[0]) for item in value)
    if origin is not None:
        return not isinstance(origin, type) or isinstance(value, origin)
    free = not isinstance(kind, type) or kind in (Any, bool, inspect.Parameter.empty)
    return free or kind.__name__ == "PreTrainedModel" or isinstance(value, kind)


def whole(value: Any) -> bool:
    """Whether ``value`` is a whole number, of Python or of a tensor library, and no truth value."""
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


def _described(kind: Any) -> str:
    parts, origin = get_args(kind), get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_described, parts)))
    name = (origin or kind).__name__
    if name in ("Iterable", "Sequence", "Collection") or Ellipsis in parts:
        return f"a list (each {_described(parts[0])})"
    return _KINDS.get(name, f"a {name}")


def told(value: Any) -> str:
    """A value as an error message shows it: in one line, and not too long."""
    shape = getattr(value, "shape", None)
    kind = f"{type(value).__name__} of {getattr(value, 'dtype', 'items')}"
    text = repr(value) if shape is None else f"a {kind}, {tuple(shape)}"
    return text if text.isprintable() and len(text) <= 80 else f"a {type(value).__name__}"
