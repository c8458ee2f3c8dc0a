"""Abilities: what a model can do, by short probes that are generated.

Perplexity on running text says little about copying from the context, which a user of a pruned
model misses first. Every probe is one record in `PROBES`. Its items depend on the seed and the
tokenizer alone, and all are scored from the logits at a few places of short rows of tokens.
"""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
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
_CHUNK = 128  # places whose logits exist at once, in float64
_ALONE = -1  # in place of a wrong answer where there is none


class LeftOut(ValueError):
    """A probe cannot be asked of this model with this tokenizer; the message says why."""


class Item(NamedTuple):
    """A row of tokens, and what is asked of it.

    Attributes:
        ids: the row.
        places: positions whose logits are scored.
        right: the token that should follow each.
        wrong: a token that must be less likely there; none where the loss of ``right`` is the
            score.
    """

    ids: Sequence[int]
    places: Sequence[int]
    right: Sequence[int]
    wrong: Sequence[int] = ()


class Language(NamedTuple):
    """What items are written in.

    Attributes:
        vocabulary: ids that random tokens are drawn from.
        tokenizer: None where there is none; then only probes of random tokens can be made.
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
        """Whether ``right`` is the likelier to follow, by the first token in which they differ."""
        one, other = (self.encode(context + text) for text in (right, wrong))
        pairs = enumerate(zip(one, other, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), 0)
        if place == 0:
            raise LeftOut(f"needs a tokenizer that tells {right!r} from {wrong!r}")
        return Item(one[:place], [place - 1], [one[place]], [other[place]])


Generator = Callable[[random.Random, Language], Iterator[Item]]


@dataclass(frozen=True)
class Probe:
    """One ability and how it is asked for.

    Attributes:
        name: what people call it.
        text: what an item is, in a line.
        items: writes one after another, from a random generator and the `Language`.
        count: how many are asked.
        unit: `NATS`, lower is better; or `RIGHT`, of two answers, higher is better.
    """

    name: str
    text: str
    items: Generator
    count: int
    unit: str = RIGHT

    def chance(self, vocabulary: int) -> float:
        """What guessing scores: one half, or the entropy of a token drawn from the vocabulary."""
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
        listed = " ".join(rng.sample(_WORDS, 24))
        once, twice = language.encode(listed), language.encode(f"{listed}\n{listed}")
        first = len(twice) - len(once) + 1  # of the second list, but for its first word
        yield Item(twice, range(first - 1, len(twice) - 1), twice[first:])


def _bigrams(repeated: bool) -> Generator:
    """Tokens of running text that follow the token before them for the second time, or first."""

    def items(rng: random.Random, language: Language) -> Iterator[Item]:
        language.encode("")  # refuses to do without a tokenizer
        # without BOS, which is put before every item
        drawn: dict[str, Any] = {"split": "test", "seed": rng.randrange(2**31), "bos": False}
        for window in token_windows("wiki", language.tokenizer, length=256, count=8, **drawn):
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
        listed = "".join(f"{n}: {v}\n" for n, v in zip(names, values, strict=True))
        asked, other = rng.sample(range(4), 2)
        yield language.choose(f"{listed}{names[asked]}:", f" {values[asked]}", f" {values[other]}")


def _names(rng: random.Random, language: Language) -> Iterator[Item]:
    while True:
        people = list(zip(rng.sample(_FIRST, 2), rng.sample(_LAST, 2), strict=True))
        (first, last), (_, other) = rng.sample(people, 2)  # either may be asked for
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
        listed = rng.choice(_SEQUENCES)
        start = rng.randrange(len(listed) - 4)
        *shown, right = listed[start : start + 4]
        wrong = rng.choice([word for word in listed if word not in (*shown, right)])
        yield language.choose(f"{', '.join(shown)},", f" {right}", f" {wrong}")


def _sums(rng: random.Random, language: Language) -> Iterator[Item]:
    while True:
        (a, b), *shown = ((rng.randint(1, 5), rng.randint(1, 4)) for _ in range(4))
        worked = "".join(f"{x} + {y} = {x + y}\n" for x, y in shown)
        wrong = a + b + rng.choice((-1, 1) if a + b > 2 else (1,))
        if max(a + b, wrong) < 10:
            yield language.choose(f"{worked}{a} + {b} =", f" {a + b}", f" {wrong}")


def _agreement(rng: random.Random, language: Language) -> Iterator[Item]:
    while True:
        (one, many), between = rng.choice(_NOUNS), rng.choice(_BETWEEN)
        forms = rng.sample(rng.choice(_VERBS), 2)
        plural = forms[0] in _PLURAL
        attractor = rng.choice(_NOUNS)[0 if plural else 1]  # of the other number
        yield language.choose(
            f"The {many if plural else one} {between} the {attractor}",
            f" {forms[0]}",
            f" {forms[1]}",
        )


def _facts(rng: random.Random, language: Language) -> Iterator[Item]:
    opening = re.compile(r"(.{3,60}? (?:is|was) (an?))( [a-z-]{4,}) ", re.IGNORECASE)
    texts = [" ".join(article["extract"].split()) for article in articles_with_topic()]
    known = [found for found in map(opening.match, texts) if found]
    rng.shuffle(known)
    for one, other in pairwise(known):
        if one[3] != other[3] and one[2] == other[2]:
            yield language.choose(one[1], one[3], other[3])


_listed = str.split
_WORDS = _listed(
    "apple river window paper garden stone letter music winter table bridge market silver doctor "
    "island pencil forest kitchen ticket mirror button candle castle dragon engine finger guitar "
    "hammer jacket ladder magnet needle orange pepper rabbit saddle tunnel violin wagon yellow"
)
_COLOURS = _listed("red blue green white black yellow brown pink")
_FIRST = _listed(
    "Maria Thomas Anna Peter Laura Daniel Sarah David Emma Martin Julia Robert Helen Simon Alice "
    "Frank Clara Henry Nina Oscar"
)
_LAST = _listed(
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
    _listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    _listed("January February March April May June July August September October November"),
    list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    _listed("one two three four five six seven eight nine ten"),
    _listed("1 2 3 4 5 6 7 8 9"),
)

COPYING = "copying"
BRIEF = (COPYING, "copying-words", "names", "brackets", "sequences", "agreement")
"""What ``ghostlib recover`` asks of the model it makes, in a third of the time of all probes."""
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
    """Probes written out in a model's tokens: rows to pass through it, and where they are scored.

    Args:
        model: any causal LM; of it the vocabulary and the positions it knows are read.
        tokenizer: its tokenizer; None for probes of random tokens alone.
        probes: names in `PROBES`; all by default.
        seed: of the items.
        count: items of each probe at most; by default as many as each has.
        strict: refuse a probe that cannot be asked, instead of leaving it out.

    Attributes:
        batches: (rows, length) token ids each, padded on the right, where causal attention does not
            look.
        left_out: the probes that cannot be asked, and why.
        digests: of the items of each probe, equal for the same ones.

    Raises:
        ValueError: an unknown probe, a count below 1, or with ``strict`` one that cannot be asked.
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
        drawn: Sequence[int] = range(self.vocabulary)
        first = None if tokenizer is None else bos_token(tokenizer)
        if tokenizer is not None:
            special = set(tokenizer.all_special_ids)
            drawn = [i for i in range(min(len(tokenizer), self.vocabulary)) if i not in special]
        language, positions = Language(drawn, tokenizer), known_positions(model)
        self._items: list[tuple[str, Item]] = []
        for probe in [PROBES[name] for name in (PROBES if probes is None else probes)]:
            # Probes whose names end alike are asked of the same text.
            rng = random.Random(f"{seed} {probe.name.rpartition('-')[2]}")
            items: list[Item] = []
            most = min(count or probe.count, probe.count)
            try:
                for item in probe.items(rng, language):
                    items.append(item if first is None else _after(tokenizer, item))
                    if positions is not None and len(items[-1].ids) > positions:
                        long = len(items[-1].ids)
                        raise LeftOut(f"takes {long} tokens, and the model knows {positions}")
                    if len(items) == most:
                        break
                if not items:
                    raise LeftOut("finds no item in the text")
            except LeftOut as reason:
                if strict:
                    raise ValueError(f"probe {probe.name!r} cannot be asked: it {reason}") from None
                self.left_out[probe.name] = str(reason)
            else:
                self._items += [(probe.name, item) for item in items]
                self.digests[probe.name] = hashlib.sha256(repr(items).encode()).hexdigest()[:12]
        self.batches, self._marks = _laid_out([item for _, item in self._items])

    def values(self, model: PreTrainedModel, hidden: Iterable[Tensor]) -> dict[str, np.ndarray]:
        """The score of each item of each probe: its loss in nats, or 1 for right and 0 for wrong.

        Args:
            model: whose head is asked.
            hidden: what the head receives of each of `batches`, see
                `ghostlib.models.streams.final_hidden`.
        """
        totals, places = np.zeros(len(self._items)), np.zeros(len(self._items))
        for h, marks in zip(hidden, self._marks, strict=True):
            for part in marks.split(_CHUNK):
                item, row, place, right, wrong = part.T
                np.add.at(totals, item, _scores(model, h[row, place], right, wrong).cpu().numpy())
                np.add.at(places, item, 1)
        means, names = totals / places, np.array([name for name, _ in self._items])
        return {name: means[names == name] for name in dict.fromkeys(names.tolist())}

    def ask(self, model: PreTrainedModel) -> dict[str, np.ndarray]:
        """`values` of a model that is passed as a whole.

        Raises:
            ValueError: a loss that is infinite or not a number.
        """
        passes = track(self.batches, "asking", unit="batch")
        found = self.values(model, (final_hidden(model, ids) for ids in passes))
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise ValueError(f"probe {name!r} scores {values.sum()}; {NOT_FINITE}")
        return found


def _after(tokenizer: Any, item: Item) -> Item:
    """The item behind the token that every text of this tokenizer begins with."""
    places = [place + 1 for place in item.places]
    return item._replace(ids=[tokenizer.bos_token_id, *item.ids], places=places)


def _laid_out(items: Sequence[Item]) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of about one length together; and for each batch (places, 5) of what is scored there.

    Items of one text share a row.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(items)), key=lambda index: len(items[index].ids)):
        sharing.setdefault(tuple(items[index].ids), []).append(index)
    groups: list[list[tuple[int, ...]]] = []
    for ids in sharing:
        if not groups or len(ids) * (len(groups[-1]) + 1) > _BATCH:
            groups.append([])
        groups[-1].append(ids)
    batches, marks = [], []
    for group in groups:
        rows = torch.zeros(len(group), len(group[-1]), dtype=torch.long)
        scored = []
        for row, ids in enumerate(group):
            rows[row, : len(ids)] = torch.tensor(ids)
            for index in sharing[ids]:
                item = items[index]
                wrong = item.wrong or [_ALONE] * len(item.places)
                answers = zip(item.places, item.right, wrong, strict=True)
                scored += [(index, row, *answer) for answer in answers]
        batches.append(rows)
        marks.append(torch.tensor(scored))
    return batches, marks


@torch.no_grad()
def _scores(model: PreTrainedModel, hidden: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Of each place (places, hidden): the loss of ``right``, or whether it beats ``wrong``."""
    logits = head(model, hidden).double()
    right, wrong = right.to(logits.device)[:, None], wrong.to(logits.device)[:, None]
    margin = logits.gather(1, right) - logits.gather(1, wrong.clamp_min(0))
    beaten = torch.where(margin.isnan(), margin, (margin > 0).double())
    losses = logits.logsumexp(1, keepdim=True) - logits.gather(1, right)
    return torch.where(wrong == _ALONE, losses, beaten)[:, 0]


# ---------------------------------------------------------------- profiles


@dataclass(frozen=True)
class Ability:
    """What a model scored on one probe.

    Attributes:
        probe: its name.
        unit: of the score.
        score: mean over items.
        low: lower end of its 95 % interval.
        high: upper end.
        chance: what guessing scores.
        dense: the dense model's score on the same items; None without a reference.
        kept: 1 where the model scores what the dense one does, 0 at chance; None as ``dense``, and
            where nothing is decided.
        verdict: *decides nothing* where the dense model (without a reference, this model) is no
            better than chance. Otherwise *passed* without a reference; with one *lost*: worse, and
            less than half is kept; *weaker*: worse, by the 95 % interval of the paired difference;
            or *kept*.
        values: the items' scores, in their order.
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
        """From the scores of items, and what the dense model scored on the same ones."""
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
        found = (score, low, high, chance, dense, kept, verdict, values.tolist())
        return cls(probe.name, probe.unit, *found)

    def __str__(self) -> str:
        """One line such as ``lost copying: 2.60 -> 11.9 nats per token``."""
        before = "" if self.dense is None else f"{self.dense:#.3g} -> "
        return f"{self.verdict} {self.probe}: {before}{self.score:#.3g} {self.unit}"


def _interval(probe: Probe, values: np.ndarray) -> tuple[float, float, float]:
    """Mean over items and its 95 % interval: Wilson's for shares, Student's t otherwise."""
    if probe.unit == RIGHT:
        found = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return float(values.mean()), float(found.low), float(found.high)
    return t_interval(values)


def t_interval(values: Sequence[float] | np.ndarray | Tensor) -> tuple[float, float, float]:
    """A mean and its 95 % interval by Student's t; that of a single value is NaN."""
    each = np.asarray(values, dtype=float)
    mean, half = float(each.mean()), math.nan
    if len(each) > 1:
        half = float(stats.t.ppf(0.975, len(each) - 1) * stats.sem(each))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Profile:
    """What a model scored on every probe; see `abilities`.

    Attributes:
        abilities: by name of the probe.
        left_out: probes that could not be asked, and why.
        seed: of the items.
        digests: of the items of each probe, as in `ProbeSet`.
    """

    abilities: Mapping[str, Ability]
    left_out: Mapping[str, str]
    seed: int
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each probe."""
        rows = []
        for name, ability in self.abilities.items():
            row = asdict(ability) | {"items": len(ability.values), "what": PROBES[name].text}
            rows.append(row)
        columns = ["what", "unit", "score", "low", "high", "chance", "dense", "kept", "items"]
        table = pd.DataFrame(rows, columns=["probe", *columns, "verdict"]).set_index("probe")
        return table.astype(dict.fromkeys(("dense", "kept"), float))

    @property
    def lost(self) -> list[str]:
        """A line for each ability that was lost."""
        return [str(ability) for ability in self.abilities.values() if ability.verdict == LOST]

    def to_json(self) -> str:
        """The profile as JSON, items included; what is not finite becomes null."""
        plain = {name: finite(asdict(ability)) for name, ability in self.abilities.items()}
        content = {"seed": self.seed, "left_out": dict(self.left_out), "abilities": plain}
        content["digests"] = dict(self.digests)
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
    odd = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    return {**record, **dict.fromkeys(odd)}


@checked
def abilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int = 0,
    probes: Iterable[str] | None = None,
    reference: "Profile | PreTrainedModel | None" = None,
) -> Profile:
    """What ``model`` can do, by probes that are generated.

    Copying from the context, look-up, names, brackets, sequences, sums, agreement and facts.

    Args:
        model: any causal LM, dense, pruned or repaired; it is given back as it was.
        tokenizer: its tokenizer. Without one only random tokens can be copied.
        seed: of the items.
        probes: names in `PROBES`; all by default.
        reference: the dense model, or its profile with the same seed and tokenizer.

    Returns:
        `Profile`: a table in a notebook, ``.to_json()``, ``.lost``; probes that cannot be asked
        (words the tokenizer lacks, rows longer than the model's context) are ``.left_out`` by name.

    Raises:
        ValueError: an unknown probe, a loss that is not finite, or a reference of other items.
    """
    check_model(model)
    asked = ProbeSet(model, tokenizer, probes, seed=seed)
    if not isinstance(reference, Profile | None):
        check_model(reference)
        reference = _profile(asked, asked.ask(reference), None)
    return _profile(asked, asked.ask(model), reference)


def _profile(
    asked: ProbeSet, found: Mapping[str, np.ndarray], reference: Profile | None
) -> Profile:
    scored = {}
    for name, values in found.items():
        known = None
        if reference is not None:
            known = reference.abilities.get(name)
            sizes = None if known is None else len(known.values)
            same = reference.digests.get(name, asked.digests[name]) == asked.digests[name]
            if reference.seed != asked.seed or sizes != len(values) or not same:
                raise ValueError(
                    f"the reference has other items of {name!r} (seed {reference.seed}, "
                    f"{sizes or 0} items) than seed {asked.seed}, {len(values)} items: profile the "
                    "dense model with the same arguments and tokenizer"
                )
        chance = PROBES[name].chance(asked.vocabulary)
        scored[name] = Ability.of(PROBES[name], values, chance, known)
    return Profile(scored, asked.left_out, asked.seed, asked.digests)
