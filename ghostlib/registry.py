"""A dictionary of named choices whose error for an unknown name suggests the known ones."""

from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """Names of one kind (operators, criteria, corpora …) and what they stand for.

    >>> Registry("operator", ghost=1)["gost"]
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
