"""Progress bars for long work, switched off by the environment variable ``GHOSTLIB_PROGRESS=0``."""

import os
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def shown() -> bool:
    """Whether progress bars are wanted."""
    return os.environ.get("GHOSTLIB_PROGRESS", "1") != "0"


def track(items: Iterable[T], what: str, unit: str = "window") -> Iterable[T]:
    """Iterate over ``items`` under a progress bar that leaves no trace when done."""
    return tqdm(items, desc=what, unit=unit, leave=False, disable=not shown())
