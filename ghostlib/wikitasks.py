"""Two zero-shot tasks made of the embedded Wikipedia introductions, for machines without a hub.

Each item shows the beginning of an introduction and asks for its short description, or for its
topic, among four. Only articles of the corpus' test split are asked about: calibration on
``split="train"`` has seen none of them. The items depend on nothing but the seed.
"""

import json
import random
import re

from ghostlib.assets import asset
from ghostlib.items import Item
from ghostlib.splits import kept

ITEMS, CHOICES, WORDS = 300, 4, 40
SEED = 0
# Words too common to give an answer away.
_COMMON = set(
    re.findall(r"\w+", "a an and as at by for from in into is it its of on or the to with")
)


def descriptions(seed: int = SEED) -> list[Item]:
    """Choose an article's short description; the others are of articles on the same topic.

    No choice, right or wrong, shares a word with the text shown (compared by their first five
    letters, common words aside), so that copying is of no use.
    """
    articles, rng = _articles(), random.Random(seed)
    items: list[Item] = []
    rng.shuffle(articles)
    for article in articles:
        text = _opening(article["extract"])
        shown = _words(text)
        apart = [
            other["description"]
            for other in articles
            if other["topic"] == article["topic"] and not shown & _words(other["description"])
        ]
        right = article["description"]
        wrong = sorted({d for d in apart if _words(d) != _words(right)})
        if right in apart and len(wrong) >= CHOICES - 1:
            query = f"{text}\n\nShort description of {article['title']}:"
            items.append(_item(query, right, rng.sample(wrong, CHOICES - 1), rng))
        if len(items) == ITEMS:
            break
    return items


def topics(seed: int = SEED) -> list[Item]:
    """Choose an article's topic; every topic is right equally often, and wrong equally often.

    Hence a model that merely prefers some topic's name gains nothing by it.
    """
    articles, rng = _articles(), random.Random(seed)
    items: list[Item] = []
    rng.shuffle(articles)
    names = sorted({article["topic"] for article in articles})
    of = {name: iter([a for a in articles if a["topic"] == name]) for name in names}
    while len(items) < ITEMS:
        rng.shuffle(names)
        for place, name in enumerate(names):  # a round: each topic is right once, wrong 3 times
            text = _opening(next(of[name])["extract"])
            wrong = [names[(place + step) % len(names)] for step in range(1, CHOICES)]
            items.append(_item(f"{text}\n\nTopic:", name, wrong, rng))
    return items[:ITEMS]


def _articles() -> list[dict[str, str]]:
    """Articles of the test split that have a description and a topic."""
    entries = json.loads(asset("wiki").read_text(encoding="utf-8")).values()
    by_title = {entry["title"]: entry for entry in entries}
    pairs = ((e["title"], f"{e['title']}\n\n{e['extract']}") for e in entries)
    test = [by_title[title] for title, _ in kept(pairs, "test")]
    return [a for a in test if a["description"] and a["topic"] not in ("", "Uncategorized")]


def _opening(extract: str) -> str:
    """The first sentences of a text, up to `WORDS` words; a longer first sentence is cut there."""
    words = " ".join(extract.split()).split(" ")[:WORDS]
    ends = [i for i, word in enumerate(words) if i > WORDS // 2 and word.endswith(".")]
    return " ".join(words[: ends[-1] + 1] if ends else words)


def _words(text: str) -> set[str]:
    return {word[:5] for word in re.findall(r"\w+", text.lower())} - _COMMON


def _item(query: str, right: str, wrong: list[str], rng: random.Random) -> Item:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "gold": choices.index(right)}
