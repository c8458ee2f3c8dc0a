"""Multiple-choice questions, and the local files that hold them."""

import json
from pathlib import Path
from typing import Any, TypedDict

from ghostlib.textfiles import decode


class Item(TypedDict):
    """A multiple-choice question: ``choices[gold]`` is the right answer to ``query``."""

    query: str
    choices: list[str]
    gold: int


def read_items(path: str | Path) -> list[Item]:
    """Questions of a ``.jsonl``: ``{"query": text, "choices": [text, …], "gold": index}`` a line.

    Raises:
        ValueError: a line that is none, by its number and what is wrong with it; or no line at all.
        FileNotFoundError: no such file.
    """
    path, items = Path(path).expanduser(), []
    if not path.exists():
        raise FileNotFoundError(f"no such task file: {path}")
    # Not splitlines(): JSON strings may hold other line separators, such as U+2028, unescaped.
    for number, line in enumerate(decode(path).split("\n"), start=1):
        if line.strip():
            try:
                items.append(_checked(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{path} has no items: give one {{query, choices, gold}} a line")
    return items


def _checked(record: Any) -> Item:
    """The fields of an item, or a ValueError that says what is wrong with them."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not an object with query, choices and gold")
    for key in ("query", "choices", "gold"):
        if key not in record:
            raise ValueError(f"no key {key!r} (it has: {', '.join(record)})")
    query, choices, gold = record["query"], record["choices"], record["gold"]
    if not isinstance(query, str) or not query.strip():
        raise ValueError("query must be a text that is not empty")
    texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not texts or len(choices) < 2:
        raise ValueError("choices must be two or more texts that are not empty")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(
            f"gold = {json.dumps(gold)} is no index into {len(choices)} choices: "
            f"use 0 … {len(choices) - 1}"
        )
    return {"query": query, "choices": choices, "gold": gold}
