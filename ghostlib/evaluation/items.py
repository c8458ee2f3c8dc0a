"""Multiple-choice questions: read from a file, or made from the embedded Wikipedia introductions.

The embedded tasks need no hub. Each item shows a few words of an introduction and asks for the
article's short description, or for its topic, among four. All articles are of the corpus' test
split, which calibration on ``split="train"`` has not seen. The items depend only on the seed.
"""

import json
import random
import re
from pathlib import Path
from typing import Any, TypedDict

from ghostlib.text.assets import asset
from ghostlib.text.documents import jsonl, kept


class Item(TypedDict):
    """A multiple-choice question: ``choices[gold]`` is the right answer to ``query``."""

    query: str
    choices: list[str]
    gold: int


def read_items(path: str | Path) -> list[Item]:
    """Questions of a ``.jsonl`` of ``{"query": text, "choices": [text, …], "gold": index}`` lines.

    Raises:
        ValueError: an invalid line, by its number, or no line; the message has the reason.
        FileNotFoundError: no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such task file: {path}")
    items = []
    for where, record in jsonl(path):
        try:
            items.append(_checked(record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not items:
        raise ValueError(f"{path} has no items: give one {{query, choices, gold}} a line")
    return items


def _checked(record: Any) -> Item:
    """The fields of an item; `ValueError` with the reason if they are invalid."""
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


ITEMS, CHOICES, WORDS = 300, 4, 20
SEED = 0
# The corpus' topics, each as one word (and one token in most vocabularies: the harness then scores
# the four choices in one forward pass). "Uncategorized" is left out.
TOPICS = {
    "Arts": "art",
    "Biology and health sciences": "biology",
    "Everyday life": "lifestyle",  # not "life", which biology is the study of
    "Geography": "geography",
    "History": "history",
    "Mathematics": "mathematics",
    "People": "biography",
    "Philosophy and religion": "religion",
    "Physical sciences": "physics",
    "Society and social sciences": "society",
    "Technology": "technology",
}
# Words too common to give an answer away.
_COMMON = set(
    re.findall(r"\w+", "a an and as at by for from in into is it its of on or the to with")
)


def descriptions(seed: int = SEED) -> list[Item]:
    """The short description of an article, among descriptions of articles on the same topic.

    The first sentence, which nearly states the description, is not shown. No choice, right or
    wrong, shares a word with the text shown, so that copying does not help. (Common words are
    ignored, and words with the same first five letters are equal.)
    """
    rng, items = random.Random(seed), []
    articles = [a for a in articles_with_topic() if a["description"]]
    rng.shuffle(articles)
    described = [(a["topic"], a["description"], _words(a["description"])) for a in articles]
    for article, (topic, right, words) in zip(articles, described, strict=True):
        extract = " ".join(article["extract"].split())
        rest = re.split(r"(?<=[.!?])\s+(?=[A-Z])", extract)[1:]
        query = f"{_beginning(' '.join(rest))}\n\nShort description of {article['title']}:"
        shown = _words(query)
        if not rest or shown & words:
            continue
        wrong = {d for t, d, w in described if t == topic and w != words and not shown & w}
        items.append(_item(query, right, rng.sample(sorted(wrong), CHOICES - 1), rng))
        if len(items) == ITEMS:
            break
    return items


def topics(seed: int = SEED) -> list[Item]:
    """The word for the topic of an article, from the first words of its introduction.

    Every topic is right equally often, and wrong equally often: preferring one gains nothing.
    """
    rng, items = random.Random(seed), []
    articles = articles_with_topic()
    rng.shuffle(articles)
    names = list(TOPICS)
    queue = {name: iter([a for a in articles if a["topic"] == name]) for name in names}
    for _ in range(ITEMS // len(names)):
        rng.shuffle(names)
        for index, name in enumerate(names):  # wrong are the next three of this round
            wrong = [TOPICS[names[(index + step) % len(names)]] for step in range(1, CHOICES)]
            query = f"{_beginning(next(queue[name])['extract'])}\n\nThis text is about"
            items.append(_item(query, TOPICS[name], wrong, rng))
    return items


def articles_with_topic() -> list[dict[str, str]]:
    """Articles of the test split that have a topic."""
    entries = json.loads(asset("wiki").read_text(encoding="utf-8")).values()
    articles = {entry["title"]: entry for entry in entries}
    documents = ((e["title"], f"{e['title']}\n\n{e['extract']}") for e in entries)
    test = [articles[title] for title, _ in kept(documents, "test")]
    return [article for article in test if article["topic"] in TOPICS]


def _beginning(text: str) -> str:
    return " ".join(text.split()[:WORDS])


def _words(text: str) -> set[str]:
    return {word[:5] for word in re.findall(r"\w+", text.lower())} - _COMMON


def _item(query: str, right: str, wrong: list[str], rng: random.Random) -> Item:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "gold": choices.index(right)}
