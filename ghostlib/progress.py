"""Progress bars for long work, switched off by the environment variable ``GHOSTLIB_PROGRESS=0``."""

import io
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def shown() -> bool:
    """Whether progress bars are wanted."""
    return os.environ.get("GHOSTLIB_PROGRESS", "1") != "0"


def track(items: Iterable[T], what: str, unit: str = "window") -> Iterable[T]:
    """Iterate over ``items`` under a progress bar that leaves no trace when done."""
    return tqdm(items, desc=what, unit=unit, leave=False, disable=not shown())


def quiet() -> AbstractContextManager[object]:
    """Other libraries' progress bars stay out of sight where ghostlib may not draw its own."""
    # Not all of them heed a switch of their own, but all of them write to the error stream.
    return nullcontext() if shown() else redirect_stderr(io.StringIO())
