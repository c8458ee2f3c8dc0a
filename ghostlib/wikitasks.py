"""Two zero-shot tasks made of the embedded Wikipedia introductions, for machines without a hub.

Each item shows a few words of an introduction and asks for the article's short description, or for
its topic, among four. Only articles of the corpus' test split are asked about: calibration on
``split="train"`` has seen none of them. The items depend on nothing but the seed.
"""

import json
import random
import re

from ghostlib.assets import asset
from ghostlib.items import Item
from ghostlib.splits import kept

ITEMS, CHOICES, WORDS = 300, 4, 20
SEED = 0
# The corpus' topics, each as one word (and one token of most vocabularies, whose four choices the
# harness scores in one forward pass); left out is "Uncategorized".
TOPICS = {
    "Arts": "art",
    "Biology and health sciences": "biology",
    "Everyday life": "life",
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
    """Choose an article's short description; the others are of articles on the same topic.

    The first sentence, which is all but the description, is not shown. No choice, right or wrong,
    shares a word with what is (common words aside, and words being equal that begin with the same
    five letters), so that copying is of no use.
    """
    rng, items = random.Random(seed), []
    articles = [a for a in _articles() if a["description"]]
    rng.shuffle(articles)
    described = [(a["topic"], a["description"], _words(a["description"])) for a in articles]
    for article, (topic, right, meant) in zip(articles, described, strict=True):
        rest = _sentences(article["extract"])[1:]
        query = f"{_beginning(' '.join(rest))}\n\nShort description of {article['title']}:"
        shown = _words(query)
        if not rest or shown & meant:
            continue
        wrong = {d for t, d, w in described if t == topic and w != meant and not shown & w}
        items.append(_item(query, right, rng.sample(sorted(wrong), CHOICES - 1), rng))
        if len(items) == ITEMS:
            break
    return items


def topics(seed: int = SEED) -> list[Item]:
    """Choose the word for an article's topic from how its introduction begins.

    Every topic is right equally often, and wrong equally often, so that a model gains nothing by
    preferring the name of one.
    """
    rng, items = random.Random(seed), []
    articles = _articles()
    rng.shuffle(articles)
    names = list(TOPICS)
    queue = {name: iter([a for a in articles if a["topic"] == name]) for name in names}
    for _ in range(ITEMS // len(names)):
        rng.shuffle(names)
        for place, name in enumerate(names):  # wrong are the next three of this round
            wrong = [TOPICS[names[(place + step) % len(names)]] for step in range(1, CHOICES)]
            query = f"{_beginning(next(queue[name])['extract'])}\n\nThis text is about"
            items.append(_item(query, TOPICS[name], wrong, rng))
    return items


def _articles() -> list[dict[str, str]]:
    """Articles of the test split that have a topic."""
    entries = list(json.loads(asset("wiki").read_text(encoding="utf-8")).values())
    by_title = {entry["title"]: entry for entry in entries}
    documents = ((e["title"], f"{e['title']}\n\n{e['extract']}") for e in entries)
    test = [by_title[title] for title, _ in kept(documents, "test")]
    return [article for article in test if article["topic"] in TOPICS]


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split()))


def _beginning(text: str) -> str:
    return " ".join(text.split()[:WORDS])


def _words(text: str) -> set[str]:
    return {word[:5] for word in re.findall(r"\w+", text.lower())} - _COMMON


def _item(query: str, right: str, wrong: list[str], rng: random.Random) -> Item:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "gold": choices.index(right)}
