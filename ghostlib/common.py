"""What every room uses: names with a helpful error, progress bars, warnings to the caller."""

import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")

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
        raise ValueError(f"unknown {self.kind} {name!r}{hint} Known: {', '.join(self)}")


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
