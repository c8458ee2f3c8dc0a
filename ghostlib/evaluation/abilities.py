"""Abilities: generated probes of what a model can do.

Perplexity on running text says little about copying from the context, the ability that users of a
pruned model miss first. Every probe is one record in `PROBES`. Its items depend on the seed and the
tokenizer alone and are scored from the logits at a few positions of short rows of tokens.
"""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import Registry, at_least, checked, track
from ghostlib.evaluation.items import articles_with_topic
from ghostlib.evaluation.perplexity import NOT_FINITE
from ghostlib.models.architectures import check_model, text_config
from ghostlib.models.streams import final_hidden, head, known_positions
from ghostlib.text.corpora import token_windows
from ghostlib.text.tokens import bos_token, encode

NATS, RIGHT = "nats per token", "share right"
LOST, WEAKER, KEPT, PASSED, NOTHING = "lost", "weaker", "kept", "passed", "decides nothing"
_BATCH = 1024  # tokens of a forward pass
_CHUNK = 128  # positions whose logits exist at once, in float64
_NO_WRONG = -1  # the wrong answer where there is none


class LeftOut(ValueError):
    """The reason why a probe cannot be run on a model with a tokenizer."""


class Item(NamedTuple):
    """A row of tokens and the answers scored in it; its digest depends on these names.

    Attributes:
        ids: the row.
        places: positions whose logits are scored.
        right: the right next token at each position.
        wrong: a token that must be less likely there; empty where the loss of ``right`` is scored.
    """

    ids: Sequence[int]
    places: Sequence[int]
    right: Sequence[int]
    wrong: Sequence[int] = ()


class Language(NamedTuple):
    """Vocabulary and tokenizer that items are written in.

    Attributes:
        vocabulary: ids that random tokens are drawn from.
        tokenizer: None allows only probes of random tokens.
    """

    vocabulary: Sequence[int]
    tokenizer: PreTrainedTokenizerBase | None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``.

        Raises:
            LeftOut: no tokenizer, or one without a token for a part of it.
        """
        if self.tokenizer is None:
            raise LeftOut("needs a tokenizer")
        ids: list[int] = encode(self.tokenizer, text)["input_ids"]
        if self.tokenizer.unk_token_id in ids:
            raise LeftOut(f"needs a token for each part of {text[-40:]!r}")
        return ids

    def choose(self, context: str, right: str, wrong: str) -> Item:
        """The choice between two continuations, by the first token in which they differ."""
        first, second = (self.encode(context + text) for text in (right, wrong))
        pairs = enumerate(zip(first, second, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), 0)
        if place == 0:
            raise LeftOut(f"needs a tokenizer that tells {right!r} from {wrong!r}")
        return Item(first[:place], [place - 1], [first[place]], [second[place]])


Generator = Callable[[random.Random, Language], Iterator[Item]]


@dataclass(frozen=True)
class Probe:
    """A test of one ability.

    Attributes:
        name: name of the ability.
        text: description of an item in one line.
        items: iterator of items, from a random generator and the `Language`.
        count: number of items.
        unit: `NATS`, lower is better; or `RIGHT`, of two answers, higher is better.
    """

    name: str
    text: str
    items: Generator
    count: int
    unit: str = RIGHT

    def chance(self, vocabulary: int) -> float:
        """The score of guessing: one half, or the entropy of a random token of the vocabulary."""
        return 0.5 if self.unit == RIGHT else math.log(vocabulary)


# ---------------------------------------------------------------- generators


def _copying(distance: int) -> Generator:
    def items(rng: random.Random, language: Language) -> Iterator[Item]:
        while True:
            ids = rng.choices(language.vocabulary, k=distance)
            yield Item([*ids, *ids], range(distance - 1, 2 * distance - 1), ids)

    return items


def _copying_words(rng: random.Random, language: Language) -> Iterator[Item]:
    while True:
        words = " ".join(rng.sample(_WORDS, 24))
        once, twice = language.encode(words), language.encode(f"{words}\n{words}")
        first = len(twice) - len(once) + 1  # the second word of the second list
        yield Item(twice, range(first - 1, len(twice) - 1), twice[first:])


def _bigrams(repeated: bool) -> Generator:
    """Tokens of running text that complete a pair seen before in the text, or a new one."""

    def items(rng: random.Random, language: Language) -> Iterator[Item]:
        language.encode("")  # raises without a tokenizer
        # without BOS, which `ProbeSet` adds to every item
        options: dict[str, Any] = {"split": "test", "seed": rng.randrange(2**31), "bos": False}
        for window in token_windows("wiki", language.tokenizer, length=256, count=8, **options):
            ids, seen, places = window.tolist(), set(), []
            for place, pair in enumerate(pairwise(ids)):
                if (pair in seen) is repeated:
                    places.append(place)
                seen.add(pair)
            if places:
                yield Item(ids, places, [ids[place + 1] for place in places])

    return items


def _look_up(rng: random.Random, language: Language) -> Iterator[Item]:
    while True:
        names, values = rng.sample(_FIRST, 4), rng.sample(_COLOURS, 4)
        table = "".join(f"{n}: {v}\n" for n, v in zip(names, values, strict=True))
        key, other = rng.sample(range(4), 2)
        yield language.choose(f"{table}{names[key]}:", f" {values[key]}", f" {values[other]}")


def _names(rng: random.Random, language: Language) -> Iterator[Item]:
    while True:
        people = list(zip(rng.sample(_FIRST, 2), rng.sample(_LAST, 2), strict=True))
        (first, last), (_, other) = rng.sample(people, 2)  # in random order
        meeting = rng.choice(_MEETINGS).format(*(" ".join(person) for person in people))
        yield language.choose(f"{meeting} {first}", f" {last}", f" {other}")


def _brackets(rng: random.Random, language: Language) -> Iterator[Item]:
    while True:
        (outer, closes), (inner, right) = rng.sample((("(", ")"), ("[", "]"), ("{", "}")), 2)
        a, b, c, d = rng.sample("abcdefghjkmnpqrstuvwxyz", 4)
        closed = f"{outer}{a}, {inner}{b}, {c}{right}, {d}"
        if rng.random() < 0.5:  # the inner pair is closed already
            yield language.choose(f"x = {closed}", closes, right)
        else:
            yield language.choose(f"x = {outer}{a}, {inner}{b}, {c}", right, closes)


def _sequences(rng: random.Random, language: Language) -> Iterator[Item]:
    while True:
        sequence = rng.choice(_SEQUENCES)
        start = rng.randrange(len(sequence) - 4)
        *shown, right = sequence[start : start + 4]
        wrong = rng.choice([word for word in sequence if word not in (*shown, right)])
        yield language.choose(f"{', '.join(shown)},", f" {right}", f" {wrong}")


def _sums(rng: random.Random, language: Language) -> Iterator[Item]:
    while True:
        (a, b), *examples = ((rng.randint(1, 5), rng.randint(1, 4)) for _ in range(4))
        solved = "".join(f"{x} + {y} = {x + y}\n" for x, y in examples)
        wrong = a + b + rng.choice((-1, 1) if a + b > 2 else (1,))
        if max(a + b, wrong) < 10:
            yield language.choose(f"{solved}{a} + {b} =", f" {a + b}", f" {wrong}")


def _agreement(rng: random.Random, language: Language) -> Iterator[Item]:
    while True:
        noun, between = rng.choice(_NOUNS), rng.choice(_BETWEEN)
        right, wrong = rng.sample(rng.choice(_VERBS), 2)
        plural = right in _PLURAL
        attractor = rng.choice(_NOUNS)[not plural]  # of the other number
        subject = f"The {noun[plural]} {between} the {attractor}"
        yield language.choose(subject, f" {right}", f" {wrong}")


def _facts(rng: random.Random, language: Language) -> Iterator[Item]:
    opening = re.compile(r"(.{3,60}? (?:is|was) (an?))( [a-z-]{4,}) ", re.IGNORECASE)
    texts = [" ".join(article["extract"].split()) for article in articles_with_topic()]
    matches = [match for match in map(opening.match, texts) if match]
    rng.shuffle(matches)
    for first, second in pairwise(matches):
        if first[3] != second[3] and first[2] == second[2]:
            yield language.choose(first[1], first[3], second[3])


_split = str.split
_WORDS = _split(
    "apple river window paper garden stone letter music winter table bridge market silver doctor "
    "island pencil forest kitchen ticket mirror button candle castle dragon engine finger guitar "
    "hammer jacket ladder magnet needle orange pepper rabbit saddle tunnel violin wagon yellow"
)
_COLOURS = _split("red blue green white black yellow brown pink")
_FIRST = _split(
    "Maria Thomas Anna Peter Laura Daniel Sarah David Emma Martin Julia Robert Helen Simon Alice "
    "Frank Clara Henry Nina Oscar"
)
_LAST = _split(
    "Keller Brown Miller Garcia Wilson Fischer Novak Turner Clark Lopez Baker Schmidt Cooper Evans "
    "Parker Rossi Hughes Morgan Weber Foster"
)
_MEETINGS = (
    "{} and {} met at the station. It was raining, so they shared a taxi into town. Later that "
    "evening, the phone rang in the hotel, and it was",
    "The prize was shared by {} and {}. The jury praised how clearly both had written. The first "
    "to give a speech was",
    "Two people applied for the job, {} and {}. Both had worked abroad for years. In the end the "
    "company chose",
)
_NOUNS = [
    *(("key", "keys"), ("book", "books"), ("teacher", "teachers"), ("car", "cars")),
    *(("house", "houses"), ("student", "students"), ("picture", "pictures"), ("cat", "cats")),
]
_BETWEEN = ("near", "behind", "next to", "above")
_VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
_PLURAL = {"are", "were", "have"}
_SEQUENCES = (
    _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    _split("January February March April May June July August September October November"),
    list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    _split("one two three four five six seven eight nine ten"),
    _split("1 2 3 4 5 6 7 8 9"),
)

COPYING = "copying"
BRIEF = (COPYING, "copying-words", "names", "brackets", "sequences", "agreement")
"""Probes that ``ghostlib recover`` runs, in a third of the time of all probes."""
PROBES: Registry[Probe] = Registry("probe")
"""Every probe, by name."""
# fmt: off
for _probe in (
    Probe(COPYING, "64 random tokens, repeated", _copying(64), 8, NATS),
    Probe("copying-16", "16 random tokens, repeated", _copying(16), 16, NATS),
    Probe("copying-256", "256 random tokens, repeated", _copying(256), 4, NATS),
    Probe("copying-words", "24 English words, repeated", _copying_words, 16, NATS),
    Probe("repeated-bigrams", "pairs of tokens seen before in the text", _bigrams(True), 8, NATS),
    Probe("new-bigrams", "pairs of tokens not seen before in the text", _bigrams(False), 8, NATS),
    Probe("names", "a surname after its first name, of two people introduced", _names, 60),
    Probe("look-up", "the value of a key, of four in the context", _look_up, 60),
    Probe("brackets", "the bracket that closes", _brackets, 60),
    Probe("sequences", "the next day, month, letter or number", _sequences, 60),
    Probe("sums", "sums below ten, after three examples", _sums, 60),
    Probe("agreement", "the verb's number, beside a noun of the other", _agreement, 60),
    Probe("facts", "title → the word that says what it is", _facts, 60),
):
    PROBES[_probe.name] = _probe
# fmt: on


# ---------------------------------------------------------------- probes in a model's tokens


class ProbeSet:
    """Probes in the tokens of a model, batched for its forward passes.

    Args:
        model: any causal LM, for its vocabulary and its number of positions.
        tokenizer: its tokenizer; None for probes of random tokens alone.
        probes: names in `PROBES`; all by default.
        seed: seed of the items.
        count: largest number of items of each probe; by default the probe's own.
        strict: refuse a probe that cannot be run, instead of leaving it out.

    Attributes:
        batches: (rows, length) token ids each, padded on the right, where causal attention does not
            look.
        left_out: probes that cannot be run, with the reason.
        digests: digests of the items of each probe.

    Raises:
        ValueError: an unknown probe, a count below 1, or with ``strict`` one that cannot be run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        probes: Iterable[str] | None = None,
        *,
        seed: int = 0,
        count: int | None = None,
        strict: bool = False,
    ) -> None:
        at_least(1, count=count)
        self.seed = seed
        self.left_out: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.vocabulary = text_config(model).vocab_size
        vocabulary: Sequence[int] = range(self.vocabulary)
        bos = None
        if tokenizer is not None:
            special = set(tokenizer.all_special_ids)
            size = min(len(tokenizer), self.vocabulary)
            vocabulary = [i for i in range(size) if i not in special]
            bos = tokenizer.bos_token_id if bos_token(tokenizer) else None
        language, positions = Language(vocabulary, tokenizer), known_positions(model)
        self._items: list[tuple[str, Item]] = []
        for probe in [PROBES[name] for name in (PROBES if probes is None else probes)]:
            # Probes whose names end alike use the same text.
            rng = random.Random(f"{seed} {probe.name.rpartition('-')[2]}")
            drawn = islice(probe.items(rng, language), min(count or probe.count, probe.count))
            try:
                items = [item if bos is None else _with_bos(bos, item) for item in drawn]
                longest = max((len(item.ids) for item in items), default=0)
                if positions is not None and longest > positions:
                    raise LeftOut(f"takes {longest} tokens, and the model knows {positions}")
                if not items:
                    raise LeftOut("finds no item in the text")
            except LeftOut as reason:
                if strict:
                    raise ValueError(f"probe {probe.name!r} cannot be run: it {reason}") from None
                self.left_out[probe.name] = str(reason)
            else:
                self._items += [(probe.name, item) for item in items]
                self.digests[probe.name] = hashlib.sha256(repr(items).encode()).hexdigest()[:12]
        self.batches, self._marks = _batched([item for _, item in self._items])

    def values(self, model: PreTrainedModel, hidden: Iterable[Tensor]) -> dict[str, np.ndarray]:
        """The score of each item of each probe: its loss in nats, or 1 for right and 0 for wrong.

        Args:
            model: the model whose head gives the logits.
            hidden: input of the head for each of `batches`, see
                `ghostlib.models.streams.final_hidden`.
        """
        totals, counts = np.zeros(len(self._items)), np.zeros(len(self._items))
        for h, marks in zip(hidden, self._marks, strict=True):
            for part in marks.split(_CHUNK):
                item, row, place, right, wrong = part.T
                index = item.numpy()  # a tensor of one element would be read as a scalar
                np.add.at(totals, index, _scores(model, h[row, place], right, wrong).cpu().numpy())
                np.add.at(counts, index, 1)
        means, names = totals / counts, np.array([name for name, _ in self._items])
        return {name: means[names == name] for name in dict.fromkeys(names.tolist())}

    def ask(self, model: PreTrainedModel) -> dict[str, np.ndarray]:
        """`values` from forward passes of the whole model.

        Raises:
            ValueError: a loss that is infinite or not a number.
        """
        batches = track(self.batches, "asking", unit="batch")
        scores = self.values(model, (final_hidden(model, ids) for ids in batches))
        for name, values in scores.items():
            if not np.isfinite(values).all():
                raise ValueError(f"probe {name!r} scores {values.sum()}; {NOT_FINITE}")
        return scores


def _with_bos(bos: int, item: Item) -> Item:
    return item._replace(ids=[bos, *item.ids], places=[place + 1 for place in item.places])


def _batched(items: Sequence[Item]) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of rows of similar length; for each (positions, 5): item, row, position and answers.

    Items with the same ids share a row.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(items)), key=lambda index: len(items[index].ids)):
        rows.setdefault(tuple(items[index].ids), []).append(index)
    groups: list[list[tuple[int, ...]]] = []
    for ids in rows:
        if not groups or len(ids) * (len(groups[-1]) + 1) > _BATCH:
            groups.append([])
        groups[-1].append(ids)
    batches, marks = [], []
    for group in groups:
        scored = []
        for row, ids in enumerate(group):
            for index in rows[ids]:
                item = items[index]
                wrong = item.wrong or [_NO_WRONG] * len(item.places)
                answers = zip(item.places, item.right, wrong, strict=True)
                scored += [(index, row, *answer) for answer in answers]
        batches.append(pad_sequence([torch.tensor(ids) for ids in group], batch_first=True))
        marks.append(torch.tensor(scored))
    return batches, marks


@torch.no_grad()
def _scores(model: PreTrainedModel, hidden: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """The loss of ``right`` at each position (positions, hidden), or whether it beats ``wrong``."""
    logits = head(model, hidden).double()
    right, wrong = right.to(logits.device)[:, None], wrong.to(logits.device)[:, None]
    margin = logits.gather(1, right) - logits.gather(1, wrong.clamp_min(0))
    beaten = torch.where(margin.isnan(), margin, (margin > 0).double())
    losses = logits.logsumexp(1, keepdim=True) - logits.gather(1, right)
    return torch.where(wrong == _NO_WRONG, losses, beaten)[:, 0]


# ---------------------------------------------------------------- profiles


@dataclass(frozen=True)
class Ability:
    """Score of a model on one probe.

    Attributes:
        probe: name of the probe.
        unit: unit of the score.
        score: mean over items.
        low: lower end of its 95 % interval.
        high: upper end.
        chance: score of guessing.
        dense: the dense model's score on the same items; None without a reference.
        kept: 1 for the score of the dense model, 0 for chance; None without a reference, and where
            the probe decides nothing.
        verdict: *decides nothing* where the dense model (without a reference, this model) is no
            better than chance. Otherwise *passed* without a reference; with one *lost*: worse, and
            less than half is kept; *weaker*: worse, by the 95 % interval of the paired difference;
            or *kept*.
        values: scores of the items, in order.
    """

    probe: str
    unit: str
    score: float
    low: float
    high: float
    chance: float
    dense: float | None
    kept: float | None
    verdict: str
    values: Sequence[float]

    @classmethod
    def of(
        cls, probe: Probe, values: np.ndarray, chance: float, reference: "Ability | None" = None
    ) -> "Ability":
        """From the scores of items, and the dense model's `Ability` on the same items."""
        score, low, high = _interval(probe, values)
        sign = 1 if probe.unit == RIGHT else -1
        least, most = (low, high) if reference is None else (reference.low, reference.high)
        passes = least > chance if sign > 0 else most < chance
        kept, verdict = None, PASSED if passes else NOTHING
        if reference is not None and passes:
            kept = (score - chance) / (reference.score - chance)
            worse = t_interval(sign * (values - np.asarray(reference.values)))[2] < 0
            verdict = KEPT if not worse else LOST if kept < 0.5 else WEAKER
        dense = None if reference is None else reference.score
        scores = (score, low, high, chance, dense, kept, verdict, values.tolist())
        return cls(probe.name, probe.unit, *scores)

    def __str__(self) -> str:
        """One line such as ``lost copying: 2.60 -> 11.9 nats per token``."""
        before = "" if self.dense is None else f"{self.dense:#.3g} -> "
        return f"{self.verdict} {self.probe}: {before}{self.score:#.3g} {self.unit}"


def _interval(probe: Probe, values: np.ndarray) -> tuple[float, float, float]:
    """Mean over items and its 95 % interval: Wilson's for shares, Student's t otherwise."""
    if probe.unit == RIGHT:
        wilson = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return float(values.mean()), float(wilson.low), float(wilson.high)
    return t_interval(values)


def t_interval(values: Sequence[float] | np.ndarray | Tensor) -> tuple[float, float, float]:
    """A mean and its 95 % interval by Student's t, NaN for a single value."""
    sample = np.asarray(values, dtype=float)
    mean, half = float(sample.mean()), math.nan
    if len(sample) > 1:
        half = float(stats.t.ppf(0.975, len(sample) - 1) * stats.sem(sample))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Profile:
    """Scores of a model on every probe; see `abilities`.

    Attributes:
        abilities: the `Ability` by name of the probe.
        left_out: probes that cannot be run, with the reason.
        seed: seed of the items.
        digests: digests of the items of each probe.
    """

    abilities: Mapping[str, Ability]
    left_out: Mapping[str, str]
    seed: int
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each probe."""
        rows = [
            asdict(ability) | {"items": len(ability.values), "what": PROBES[name].text}
            for name, ability in self.abilities.items()
        ]
        columns = ["what", "unit", "score", "low", "high", "chance", "dense", "kept", "items"]
        table = pd.DataFrame(rows, columns=["probe", *columns, "verdict"]).set_index("probe")
        return table.astype(dict.fromkeys(("dense", "kept"), float))

    @property
    def lost(self) -> list[str]:
        """A line for each lost ability."""
        return [str(ability) for ability in self.abilities.values() if ability.verdict == LOST]

    def to_json(self) -> str:
        """The profile as JSON, with the scores of items; numbers that are not finite are null."""
        content = {
            "seed": self.seed,
            "left_out": dict(self.left_out),
            "abilities": {name: finite(asdict(each)) for name, each in self.abilities.items()},
            "digests": dict(self.digests),
        }
        return json.dumps(content, ensure_ascii=False, allow_nan=False)

    def _repr_html_(self) -> str:
        return str(self.table.to_html(float_format=lambda value: f"{value:.3g}", na_rep=""))

    def __str__(self) -> str:
        shown = self.table.drop(columns=["what"]).dropna(axis=1, how="all")
        lines = [shown.to_string(float_format=lambda value: f"{value:.3g}", na_rep="")]
        lines += [f"left out {name}: it {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` with None in place of numbers that JSON does not have."""
    nonfinite = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    return {**record, **dict.fromkeys(nonfinite)}


@checked
def abilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int = 0,
    probes: Iterable[str] | None = None,
    reference: "Profile | PreTrainedModel | None" = None,
) -> Profile:
    """Score ``model`` on generated probes of its abilities.

    Copying from the context, look-up, names, brackets, sequences, sums, agreement and facts.

    Args:
        model: any causal LM, dense, pruned or repaired; it is not changed.
        tokenizer: its tokenizer. Without one only random tokens can be copied.
        seed: seed of the items.
        probes: names in `PROBES`; all by default.
        reference: the dense model, or its profile with the same seed and tokenizer.

    Returns:
        `Profile`: a table in a notebook, ``.to_json()``, ``.lost``; probes that cannot be run
        (words the tokenizer lacks, rows longer than the model's context) are ``.left_out`` by name.

    Raises:
        ValueError: an unknown probe, a loss that is not finite, or a reference of other items.
    """
    check_model(model)
    probe_set = ProbeSet(model, tokenizer, probes, seed=seed)
    if not isinstance(reference, Profile | None):
        check_model(reference)
        reference = _profile(probe_set, reference, None)
    return _profile(probe_set, model, reference)


def _profile(probe_set: ProbeSet, model: PreTrainedModel, reference: Profile | None) -> Profile:
    scores, seed, digests = {}, probe_set.seed, probe_set.digests
    for name, values in probe_set.ask(model).items():
        dense = None
        if reference is not None:
            dense = reference.abilities.get(name)
            count = 0 if dense is None else len(dense.values)
            same = reference.digests.get(name, digests[name]) == digests[name]
            if reference.seed != seed or count != len(values) or not same:
                raise ValueError(
                    f"the reference has other items of {name!r} (seed {reference.seed}, "
                    f"{count} items) than seed {seed}, {len(values)} items: profile the dense "
                    "model with the same arguments and tokenizer"
                )
        chance = PROBES[name].chance(probe_set.vocabulary)
        scores[name] = Ability.of(PROBES[name], values, chance, dense)
    return Profile(scores, probe_set.left_out, seed, digests)
