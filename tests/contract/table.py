"""The table of bad inputs: a line for each parameter and what it may be given by mistake.

A row of `ROWS` is a public function with arguments that are right; beside each of its parameters
stands the kind of value it takes, and every bad value of that kind is a case.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from conftest import LAYERS, WIDTH, tiny_model, tiny_tokenizer, tiny_windows

import ghostlib as gl
from ghostlib.evaluation.abilities import ProbeSet
from ghostlib.evaluation.tasks import Score
from ghostlib.statistics.features import FEATURES, Sources

NAN, INF = math.nan, math.inf
TOKENIZER = tiny_tokenizer()
MODEL = tiny_model("llama")
SPEAKER = tiny_model("llama", vocab_size=len(TOKENIZER))
OTHER = tiny_model("llama", hidden_size=8, intermediate_size=12, head_dim=2)
RECOVERED = gl.prune(MODEL, [2, 3])
IDS = tiny_windows(4, 24)
GAP = gl.Boundary(2, 4)
KNOWN = gl.calibrate(MODEL, IDS, [GAP, (1, 3)])
SIMILAR = gl.calibrate(MODEL, IDS, gl.contiguous(2, LAYERS), moments=False)
FOREIGN = gl.calibrate(tiny_model("llama", seed=1), IDS, gl.contiguous(2, LAYERS))
STATS, HELD_OUT = KNOWN[GAP], KNOWN[gl.Boundary(1, 3)]
STATS_OTHER = gl.calibrate(OTHER, IDS, [GAP])[GAP]
OPERATOR = gl.solve(STATS, relative_ridge=1e-3)
X, Y = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
TRIALS = gl.Trials(MODEL, IDS, probes=ProbeSet(MODEL, None, ["copying-16"], count=2))
SCORE = Score("quiz", 0.5, 0.1, None, None, [1, 0], None, "digest")


class Bad(NamedTuple):
    """A value that must be refused, and what the message must hold (a regular expression)."""

    value: Any
    words: str
    error: type[Exception] = ValueError


Kind = list[Bad]


def bad(words: str, *values: Any, error: type[Exception] = ValueError) -> Kind:
    """Values of one kind with the same words."""
    return [Bad(value, words, error) for value in values]


@dataclass(frozen=True)
class Row:
    """A public function, how it is called, and the kind of each of its parameters.

    Attributes:
        name: as a user writes it.
        call: the function.
        right: arguments by name; those that are tried are put in their place.
        kinds: bad values by parameter.
        free: parameters that take whatever they are given, such as a truth value.
    """

    name: str
    call: Callable[..., Any]
    right: Mapping[str, Any]
    kinds: Mapping[str, Kind]
    free: tuple[str, ...] = field(default=())


class Case(NamedTuple):
    """One call that must be refused."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    words: str
    value: Any


# ---------------------------------------------------------------- kinds of values


def count(name: str, least: int = 1, *, optional: bool = False) -> Kind:
    """A whole number of at least so much; None is right where it is optional."""
    wrong = [least - 1, -7, 2.5, NAN, INF, "4", "many", True, [3], 3 + 0j]
    return bad(rf"\b{name}\b", *wrong, *([] if optional else [None]))


def number(name: str, *wrong: Any) -> Kind:
    """A number in a range."""
    return bad(name, NAN, "much", None, [0.1], 1j, *wrong)


MODELS = bad("causal language model", None, 3, "smollm2", torch.nn.Linear(2, 2), [MODEL])
DENSE = [*MODELS, *bad("recovered before", gl.recover(MODEL, IDS, [2]), RECOVERED)]
TOKENIZERS = bad("tokenizer", None, 3, "smollm2", [TOKENIZER])
WINDOWS = [
    *bad("windows", None, "wiki", 3, [[3, 4]], {}, IDS[0], IDS[None], IDS.float(), IDS[:, :0]),
    *bad("windows", IDS > 3, IDS.to(torch.complex64)),
    *bad("vocabulary", IDS - 50, IDS + 1000),
    Bad(tiny_windows(2, 200), "128 positions"),
]
SCORED = [*WINDOWS, Bad(IDS[:, :1], "at least 2")]
MASKS = bad(
    "attention_mask",
    *["ones", 1, [1, 1], IDS[:, :3] * 0 + 1, torch.full(IDS.shape, 0.5)],
    *[torch.full(IDS.shape, NAN), torch.full(IDS.shape, 2), torch.full(IDS.shape, -1)],
)
BOUNDARIES = bad(
    "boundar",
    *[None, 5, "2-4", [], [5], [(2,)], [(2, 4, 6)], ["24"], [(2.5, 4)], [(4, 2)], [(2, 2)]],
    *[[(-1, 3)], [(2, 99)], [(NAN, 3)], [(None, 3)], [(True, 3)]],
)
LAYER_SETS = bad(
    "layer",
    *[None, "2-3", "23", [], [2.5], [NAN], ["2"], [None], [[2]], [True, False], [2, 2]],
    *[[-1], [LAYERS], [10**30], range(LAYERS), torch.tensor([True, False]), {2: "a", "b": 3}],
)
OPERATORS = [
    *bad("unknown operator", "gost", "", "PRUNED", None, 3, 2.5, ["ghost"], "<script>"),
    *bad("unknown (feature|weight)", "x, y", "x; 1/z", "x,"),
    Bad("x, x", "twice"),
    Bad("h, x", "no module at the gap"),
]
CRITERIA = bad("unknown criterion", "cosin", "", None, 3, ["cosine"], "a\nb")
REGRESSORS = [
    *bad("regressors", None, 5),
    *bad("unknown feature", ["y"], [""], [None], [3]),
    Bad(["x; 2"], "unknown weight"),
]
MOMENTS = [
    *bad("moments", None, 3, "wiki", X, {}, [1]),
    Bad(gl.Moments(WIDTH), "hold no tokens"),
]
HELD = [*MOMENTS, Bad(STATS_OTHER, "one width")]
RIDGES = [
    *bad("ridge", *[[0.0], [-1.0], [NAN], [INF], ["much"], [None], []]),
    *bad("ridges", None, 0.1, 3),
]
PATHS = bad("path|file|folder|No such file", None, 3, ["a"], "", "a\0b")
CORPUS = [
    *bad("unknown corpus", "wikki", "", "a b", "wiki\n", "<script>", "x" * 10_000),
    *bad("corpus", None, 3, ["wiki"], {}),
    Bad("none.txt", "no such corpus file", FileNotFoundError),
    Bad("../../none.jsonl", "no such corpus file", FileNotFoundError),
    Bad(Path("none.bin"), "no such corpus file", FileNotFoundError),
    Bad(Path(__file__), r"is no \.txt"),
]
SPLITS = bad("split", "dev", "", None, 3, ["train"])
COLUMNS = bad("text_column", None, 3, ["text"])
SEEDS = bad("seed", 0.5, NAN, "0", None, [0])


def activations(name: str) -> Kind:
    """(tokens, C) real and finite."""
    wrong = [None, 3, "X", X.tolist(), X[0], X[None], X[:, :3], X[:4], X + NAN, X + INF, X + 0j]
    return bad(rf"{name}|widths?\b", *wrong)


def by_token(name: str) -> Kind:
    """(tokens,) of something."""
    return bad(name, 3, "all", [1.0], X, X[:3, 0])


MATRICES = bad(
    "matrix|shape|operator", None, 3, "W", torch.eye(3), torch.ones(8), torch.eye(8) + NAN
)
READINGS = {"length": count("length"), "count": count("count", optional=True), "seed": SEEDS}
READINGS |= {"split": SPLITS, "text_column": COLUMNS}
SOLVER = [
    *bad("no option", {"rigde": 1.0}, {"rank": 3}, {"pooled": True}),
    Bad({"ridge": 1.0, "rcond": 0.1}, "choose one"),
    *bad("rcond", *({"rcond": value} for value in (0, 1, -1, NAN, INF, "x", [0.1]))),
    *bad("ridge", *({"ridge": value} for value in (0, -1, NAN, INF, "x", [0.1]))),
    *bad("ridge", *({"relative_ridge": value} for value in (0, -1, NAN, INF, "x", [], [1.0, 2.0]))),
    *bad("around", {"around": "one"}, {"around": None}),
]


def solver(call: Callable[..., Any], right: Mapping[str, Any]) -> Callable[..., Any]:
    """``call`` with a dictionary of the solver's options as one argument."""
    return lambda options=None, **changed: call(**{**right, **changed}, **(options or {}))


def field_of(name: str) -> Callable[..., Any]:
    """`Specification` of one field, of a model and corpora that are there."""
    return lambda **given: gl.Specification(
        **({"calibration": "pydoc", "perplexity": "pydoc"} | given)
    )


def row(
    name: str, call: Callable[..., Any], right: Any = None, /, free: str = "", **kinds: Kind
) -> Row:
    return Row(name, call, right or {}, kinds, tuple(free.split()))


# ---------------------------------------------------------------- the table

PASS = {"attention_mask": MASKS, "skip_leading": count("skip_leading", 0)}
PASS |= {"batch_size": count("batch_size")}
MAYBE = {name: [b for b in kind if b.value is not None] for name, kind in PASS.items()}
SEEN = {"model": MODEL, "windows": IDS}
TRAINED = {"train": STATS, "held_out": HELD_OUT}

ROWS = [
    # text
    row(
        "documents",
        lambda **a: next(gl.documents(**a)),
        {"corpus": "pydoc"},
        corpus=CORPUS,
        split=SPLITS,
        seed=SEEDS,
        text_column=COLUMNS,
    ),
    row(
        "token_windows",
        gl.token_windows,
        {"corpus": "pydoc", "tokenizer": TOKENIZER, "length": 8, "count": 2},
        corpus=CORPUS,
        tokenizer=TOKENIZERS,
        **READINGS,
        bos=bad("bos", 1, "yes", [True]),
    ),
    # models
    row(
        "load_model",
        gl.load_model,
        {"name": "smollm2"},
        name=[
            *bad("model", None, 3, ["smollm2"], "", "a b", "a\0b", "<script>"),
            Bad("./nope", "no such model folder", FileNotFoundError),
            Bad("../../../x", "no such model folder", FileNotFoundError),
            Bad("x" * 10_000, "model"),
        ],
        dtype=bad("dtype", "float33", "nn", "", 16, NAN, ["float32"]),
        device=bad("device", "nowhere", "", 3.5, ["cpu"]),
        free="options",
    ),
    *[
        row(name, getattr(gl, name), {"model": MODEL}, model=MODELS)
        for name in ("decoder_layers", "count_parameters", "weight_bytes")
    ],
    row(
        "receiver",
        gl.receiver,
        {"model": MODEL, "index": 2},
        model=MODELS,
        index=bad("index", -1, LAYERS + 1, 2.5, "2", None, NAN, [2]),
    ),
    row(
        "record",
        gl.record,
        SEEN | {"indices": [2]},
        model=MODELS,
        windows=WINDOWS,
        indices=bad("ind(ex|ices)", None, 3, "2", [-1], [LAYERS + 1], [2.5], ["2"], [None]),
        free="inputs",
    ),
    row(
        "tap",
        lambda **a: gl.tap(**a).__enter__(),
        {"model": MODEL, "indices": [2], "on_stream": print},
        model=MODELS,
        indices=bad("ind(ex|ices)", None, 3, "2", [-1], [LAYERS + 1], [2.5], ["2"], [None]),
        on_stream=bad("on_stream", None, 3, "print"),
    ),
    row(
        "runs",
        gl.runs,
        {"layers": [2, 3], "num_layers": LAYERS},
        layers=LAYER_SETS,
        num_layers=count("num_layers"),
    ),
    row(
        "contiguous",
        gl.contiguous,
        {"n": 2, "num_layers": LAYERS},
        n=[*count("n"), Bad(LAYERS, "between 1 and 5")],
        num_layers=count("num_layers"),
    ),
    row(
        "spell",
        gl.spell,
        {"layers": [2]},
        layers=bad("layer", None, 3, "2-3", [2.5], ["2"], [-1], [2, 2], [NAN], [True]),
    ),
    row(
        "inspect",
        gl.inspect,
        {"model": MODEL},
        model=[
            *bad("model", None, 3, [MODEL], torch.nn.Linear(2, 2)),
            Bad("./nope", "no such model folder", FileNotFoundError),
        ],
        free="options",
    ),
    # statistics
    row(
        "calibrate",
        gl.calibrate,
        SEEN | {"boundaries": [GAP]},
        model=MODELS,
        windows=WINDOWS,
        boundaries=BOUNDARIES,
        regressors=REGRESSORS,
        free="moments",
        **PASS,
    ),
    row(
        "calibrate_distributed",
        gl.calibrate_distributed,
        SEEN | {"boundaries": [GAP]},
        model=bad("causal language model", None, 3, error=RuntimeError),
        windows=[
            *bad("windows", None, [[3]], IDS.float(), error=RuntimeError),
            Bad(IDS[:0], "no windows"),
        ],
        boundaries=[*bad("boundar", [], [(4, 2)], error=RuntimeError), *bad("boundar", None, 5)],
        free="options",
    ),
    row(
        "calibration_bytes",
        gl.calibration_bytes,
        {"model": 64, "boundaries": [GAP]},
        model=bad("width|causal language model", 0, -1, 2.5, NAN, "wide", None, [3], True),
        boundaries=[b for b in BOUNDARIES if b.value != [(2, 99)]],
        length=count("length"),
        batch_size=count("batch_size"),
        regressors=REGRESSORS,
        hidden=count("hidden", optional=True),
        free="moments",
    ),
    row("shard", gl.shard, {"windows": IDS}, windows=bad("windows", None, 3, "wiki", [[3, 4]])),
    row(
        "Calibration.of",
        KNOWN.of,
        {"regressor": "x"},
        regressor=[
            *bad("unknown feature", "y", "", None, 3),
            Bad("x, n(x)", r"regressors=\["),
            Bad("x; 2", "unknown weight"),
        ],
    ),
    row(
        "Moments",
        gl.Moments,
        {"width": 8},
        width=count("width"),
        hidden=count("hidden", optional=True),
        regressor=[*bad("unknown feature", "y", "", None, 3), Bad("h", "pass hidden=")],
        boundary=bad("boundary", 5, "24", (2,), (2, 3, 4), (2.5, 4), (4, 2), (-1, 2)),
        device=bad("device", "nowhere", "", 2.5, ["cpu"]),
        free="bias model",
    ),
    row(
        "Moments.update",
        gl.Moments(8).update,
        {"X_pre": X, "X_post": Y},
        X_pre=activations("X_pre"),
        X_post=activations("X_post"),
        weight=[*by_token("weight"), *bad("weight", -X[:, 0].abs(), X[:, 0] * NAN, X[:, 0] + 0j)],
        real=by_token("real"),
        used=by_token("used"),
        hidden=bad("hidden", 3, "h", X[:3], X + NAN),
        output=bad("output", 3, "f", X[:3], X + NAN),
    ),
    *[
        row(
            f"Moments.{name}",
            getattr(gl.Moments(8).update(X, Y), name),
            {"repair": torch.eye(8)},
            repair=MATRICES,
        )
        for name in ("error", "relative_error")
    ],
    row(
        "Moments.part",
        STATS.part,
        regressor=[*bad("unknown feature", "y", None, 3), Bad("x, n(x)", "do not hold")],
    ),
    row("Moments.to", STATS.to, device=bad("device", "nowhere", None, 2.5)),
    row(
        "Moments.load",
        gl.Moments.load,
        path=[
            *bad("path", None, 3, ["a"]),
            Bad("none", "none", FileNotFoundError),
            Bad(__file__, "cannot be read as moments"),
            Bad("/", "cannot be read"),
        ],
    ),
    row(
        "Moments.save",
        STATS.save,
        path=[*bad("path", None, 3, ["a"]), Bad("/none/none/a", "none", OSError)],
    ),
    row(
        "Moments.__add__",
        lambda other: STATS + other,
        other=bad("different", STATS_OTHER, HELD_OUT),
    ),
    row(
        "Regressor.parse",
        gl.Regressor.parse,
        spelling=[
            *bad("unknown feature", "y", "", None, 3, ["x"]),
            *bad("twice", "x, x"),
            *bad("unknown weight", "x; 2"),
        ],
    ),
    row(
        "Regressor",
        gl.Regressor,
        features=bad(
            "feature", (), gl.Regressor.parse("x").features * 2, None, "x", ["y"], [FEATURES["x"]]
        ),
        free="weight",
    ),
    row(
        "Regressor.widths",
        gl.Regressor.parse("h").widths,
        {"width": 8, "hidden": 4},
        width=count("width"),
        hidden=bad("hidden", 0, -1, 2.5, "4", None),
    ),
    row(
        "Regressor.design",
        gl.Regressor.parse("x, n(prev)").design,
        {"sources": Sources(X)},
        sources=bad("previous token", Sources(X[0])),
        real=bad("mask", 3, "all", X, X[:3, 0]),
        p=bad("p must be|columns", 3, "all", 2.5),
    ),
    row(
        "Regressor.resolve", gl.Regressor.parse("n(x)").resolve, norm=bad("norm", "batch", None, 3)
    ),
    row(
        "Regressor.contains",
        gl.Regressor.parse("x").contains,
        other=bad("unknown feature", None, "y", 3),
    ),
    # operators
    row(
        "solve",
        solver(gl.solve, {"moments": STATS}),
        {},
        moments=MOMENTS,
        name=[*OPERATORS, Bad("two-branch", "calibrate"), Bad("low-rank", "rank")],
        options=SOLVER,
    ),
    row(
        "solve(low-rank)",
        gl.solve,
        {"moments": STATS, "name": "low-rank", "rank": 3},
        rank=bad("rank", 0, -1, WIDTH + 1, 2.5, NAN, "3", None, [3], True),
    ),
    row(
        "Operator.of",
        gl.Operator.of,
        {"W": torch.eye(8)},
        W=bad(
            "matrix",
            None,
            3,
            "W",
            torch.ones(8),
            torch.ones(2, 3),
            torch.eye(3) + 0j,
            torch.eye(3) * NAN,
        ),
        family=[*OPERATORS[:8], *bad("no single W", "two-branch", "identity", "magnitude")],
        free="residual",
    ),
    row(
        "Operator.apply",
        OPERATOR.apply,
        {"X": torch.ones(5, WIDTH)},
        X=bad(
            "activations",
            None,
            3,
            "X",
            torch.ones(WIDTH, dtype=int),
            torch.ones(3),
            torch.tensor(1.0),
        ),
        real=bad("mask", 3, "all", X),
        hidden=bad("hidden", 3, "h"),
        output=bad("output", 3, "f"),
    ),
    row(
        "antisymmetric_share",
        gl.antisymmetric_share,
        M=bad("matrix", None, 3, "M", torch.ones(3), torch.ones(2, 3), torch.eye(2) * NAN),
    ),
    row("Family.of", gl.Family.of, spelling=OPERATORS),
    row(
        "Family.check_place",
        gl.OPERATORS["refit"].check_place,
        gaps=bad("gap|boundar", None, 3, [gl.Boundary(0, 2)], ["a"]),
    ),
    row(
        "ridge_path",
        gl.ridge_path,
        TRAINED,
        train=MOMENTS,
        ridges=RIDGES,
        held_out=[b for b in HELD if b.value is not None],
    ),
    row(
        "cross_validate",
        gl.cross_validate,
        {"folds": [STATS, STATS]},
        ridges=RIDGES,
        folds=bad("folds|moments", None, 3, [], [STATS], [STATS, STATS_OTHER], [STATS, None], "ab"),
    ),
    row(
        "choose_ridge",
        gl.choose_ridge,
        TRAINED,
        train=[b for b in MOMENTS if b.value != {}],
        ridges=RIDGES,
        held_out=[b for b in HELD if b.value is not None],
    ),
    row(
        "choose_ridges",
        gl.choose_ridges,
        TRAINED,
        train=MOMENTS,
        held_out=HELD,
        ridges=RIDGES,
        start=number("ridge", 0.0, -1.0, INF),
    ),
    row("rank_path", gl.rank_path, TRAINED, train=MOMENTS, held_out=HELD, free="options"),
    row(
        "choose_rank",
        gl.choose_rank,
        TRAINED,
        train=MOMENTS,
        held_out=HELD,
        tolerance=number("tolerance", -0.1, INF),
        free="options",
    ),
    row(
        "check_family",
        gl.check_family,
        {"family": "scalar"},
        family=OPERATORS,
        contains=bad("contains|unknown", 3, ["gost"], [None]),
        exempt=bad("exempt|unknown rule", 3, {"rotations": ""}, "rotation"),
        seed=SEEDS,
        device=bad("device", "nowhere", 2.5),
        free="options",
    ),
    # selection, surgery, recovery
    row(
        "select_layers",
        gl.select_layers,
        {"model": MODEL, "calibration": IDS, "n": 2},
        model=MODELS,
        calibration=bad("calibration|windows", None, "wiki", 3, [[3]], {}, IDS.float(), IDS[0]),
        n=[*count("n"), Bad(LAYERS, "between 1 and 5")],
        criterion=CRITERIA,
        tries=count("tries", optional=True),
        **MAYBE,
        weight=number("weight", -1.0, INF),
    ),
    row(
        "select_layers(residual)",
        gl.select_layers,
        {"model": MODEL, "calibration": IDS, "n": 2, "criterion": "residual"},
        operator=OPERATORS[:9],
        calibration=bad("boundaries|moments|collected on", KNOWN, SIMILAR, FOREIGN),
        keep=bad("keep must be", None, 3),
    ),
    row(
        "select_layers(perplexity)",
        gl.select_layers,
        {"model": MODEL, "calibration": IDS, "n": 1, "criterion": "perplexity"},
        windows=[b for b in SCORED if b.value is not None],
        skip_leading=bad("leave it out", 0, 1, -1),
    ),
    row(
        "select_layers(taylor)",
        gl.select_layers,
        {"model": MODEL, "calibration": IDS, "n": 1, "criterion": "taylor"},
        windows=[b for b in SCORED if b.value is not None],
        attention_mask=bad("leave it out", torch.ones_like(IDS)),
        skip_leading=bad("leave it out", 0, 1, -1),
        batch_size=bad("batch_size", 0, -1),
    ),
    row(
        "select_layers(statistics)",
        gl.select_layers,
        {"model": MODEL, "calibration": SIMILAR, "n": 2},
        attention_mask=bad("leave it out", torch.ones_like(IDS)),
        skip_leading=bad("leave it out", 0, 1),
        batch_size=bad("leave it out|batch_size", 1, 0),
    ),
    row(
        "Selection.first",
        gl.select_layers(MODEL, IDS, 2).first,
        n=[*count("n"), Bad(99, "no set of 99")],
    ),
    row(
        "Trials",
        gl.Trials,
        SEEN,
        model=MODELS,
        windows=[*SCORED[1:], Bad(None, "give windows, probes")],
        batch_size=count("batch_size"),
        probes=bad("probes", 3, "copying"),
        starts=bad("start|index", 3, "2", [-1], [LAYERS + 1], [2.5], ["2"], [None]),
    ),
    *[
        row(
            f"Trials.{name}",
            getattr(TRIALS, name),
            {"layers": (2, 3)},
            layers=[b for b in LAYER_SETS if b.value != []],
            operators=bad("operator|boundary", 3, "ghost", {GAP: 3}, {GAP: "ghost"}),
        )
        for name in ("losses", "loss", "rebase", "abilities")
    ],
    row(
        "prune",
        gl.prune,
        {"model": MODEL, "layers": [2]},
        model=DENSE,
        layers=LAYER_SETS,
        free="share",
    ),
    row(
        "install",
        gl.install,
        {"model": MODEL, "operators": {GAP: OPERATOR}},
        model=DENSE,
        free="at_gap share",
        operators=bad(
            "operator|boundar|no layer",
            None,
            3,
            "ghost",
            [OPERATOR],
            {GAP: 3},
            {GAP: "ghost"},
            {(4, 2): None},
            {(0, LAYERS): None},
            {"24": None},
            {3: None},
            {(2, 3): None, (3, 4): None},
            {GAP: gl.solve(STATS_OTHER, relative_ridge=1.0)},
        ),
    ),
    row(
        "recover",
        solver(gl.recover, {"model": MODEL, "calibration": IDS, "layers": [2, 3]}),
        {},
        model=DENSE,
        calibration=bad(
            "calibration|windows|moments",
            None,
            "wiki",
            3,
            [[3]],
            {},
            IDS.float(),
            IDS[0],
            KNOWN[GAP],
            {GAP: 3},
            {GAP: STATS_OTHER},
        ),
        layers=[*LAYER_SETS, Bad(3, "select_layers")],
        operator=[
            *OPERATORS,
            Bad({GAP: OPERATOR}, "install"),
            Bad("pruned", "unknown operator"),
            Bad("low-rank", "rank"),
        ],
        fit=bad("fit", "student", "", None, 3),
        options=SOLVER,
        free="share verbose",
        **MAYBE,
    ),
    row(
        "recover(auto)",
        gl.recover,
        {"model": MODEL, "calibration": IDS, "layers": [2], "operator": "auto", "verbose": False},
        fit=bad("leave out", "sequential"),
        layers=[*bad("n = ", 0, LAYERS, -1, np.int64(LAYERS)), *LAYER_SETS],
        budget=bad("unknown budget", "all", "", None, 3),
        candidates=bad("candidate|unknown|ridge", ["gost"], 3, ["scalar"], []),
        relative_ridge=bad("no option", [1.0]),
        skip_leading=bad("skip_leading must be", "1"),
    ),
    row(
        "fit_sequential",
        solver(gl.fit_sequential, SEEN | {"boundaries": [(1, 2), (3, 4)]}),
        {},
        model=MODELS,
        windows=WINDOWS,
        boundaries=[*BOUNDARIES, Bad([(3, 4), (1, 2)], "order"), Bad([(1, 3), (2, 4)], "overlap")],
        operator=OPERATORS,
        streams=bad("streams", 3, {}, {1: X}, "x"),
        options=SOLVER,
        **PASS,
    ),
    row(
        "Recipe",
        gl.Recipe,
        SEEN,
        model=MODELS,
        windows=[*WINDOWS, Bad(IDS[:1], "at least 2")],
        batch_size=count("batch_size"),
        budget=bad("unknown budget", "all", "", None, 3, ["none"]),
        candidates=bad("candidate|unknown|ridge", ["gost"], 3, ["scalar"], []),
        keep=bad("unknown probe|keep", "copyin", 3, ["copying"]),
        weight=number("weight", -1.0, INF),
    ),
    row(
        "Recipe.choose",
        gl.Recipe(MODEL, IDS).choose,
        {"layers": [2]},
        layers=[*bad("n = ", 0, LAYERS, -1), *LAYER_SETS],
        among=bad("unknown candidate|among", ["gost"], ["replaceme", "gost"], 3, [3]),
    ),
    row(
        "Recipe.fit",
        gl.Recipe(MODEL, IDS, candidates=["ghost"]).fit,
        {"layers": [2], "repair": "ghost"},
        layers=LAYER_SETS,
        repair=bad("unknown candidate", "gost", "", None, 3, ["ghost"]),
    ),
    row(
        "Recipe.shortlist", gl.Recipe(MODEL, IDS).shortlist, n=[*count("n"), Bad(LAYERS, "between")]
    ),
    row(
        "Recipe.collect",
        gl.Recipe(MODEL, IDS).collect,
        choices=bad("layer", [[99]], [[2.5]], ["ab"], 3, None),
    ),
    row(
        "save",
        gl.save,
        {"model": RECOVERED, "folder": "new"},
        model=bad("causal language model", None, 3, "smollm2"),
        folder=[
            *bad("folder", None, 3, ["a"]),
            Bad(__file__, "is a file", FileExistsError),
            Bad(Path(__file__).parent, "not empty", FileExistsError),
            Bad(f"{__file__}/below", "is a file", NotADirectoryError),
        ],
        tokenizer=bad("tokenizer", 3, "smollm2"),
        facts=bad("facts", 3, "text", ["a"]),
        free="portable",
    ),
    row(
        "check_repaired_model",
        gl.check_repaired_model,
        {"model": RECOVERED},
        model=MODELS,
        partner=bad("causal language model", 3, "smollm2"),
        checks=bad("check", ["statics cache"], [None], 3, "beams"),
    ),
    # evaluation
    *[
        row(
            name,
            getattr(gl, name),
            SEEN,
            model=MODELS,
            windows=SCORED,
            batch_size=count("batch_size"),
        )
        for name in ("perplexity", "window_losses")
    ],
    row(
        "abilities",
        gl.abilities,
        {"model": SPEAKER, "tokenizer": TOKENIZER},
        model=MODELS,
        tokenizer=bad("tokenizer", 3, "smollm2"),
        seed=SEEDS,
        probes=bad("unknown probe|probes", ["copyin"], 3, "copying", [None]),
        reference=bad("causal language model", 3, "smollm2", {}),
    ),
    row(
        "gap_closed",
        gl.gap_closed,
        {"dense": 10, "pruned": 40, "recovered": 20},
        dense=number("dense", 0, -1, INF),
        pruned=number("pruned", 0, -1, INF, 10, 5),
        recovered=number("recovered", 0, -1, INF),
    ),
    row(
        "corpus_perplexity",
        solver(
            gl.corpus_perplexity,
            {"model": SPEAKER, "tokenizer": TOKENIZER, "corpus": "pydoc", "length": 8, "count": 2},
        ),
        {},
        model=MODELS,
        tokenizer=TOKENIZERS,
        corpus=CORPUS,
        batch_size=count("batch_size"),
        options=bad("legnth", {"legnth": 3}, error=TypeError),
    ),
    row(
        "generate",
        gl.generate,
        {"model": SPEAKER, "tokenizer": TOKENIZER, "prompts": "a"},
        model=MODELS,
        tokenizer=TOKENIZERS,
        prompts=bad(
            "prompt", None, 3, [], [3], [None], "", ["a", ""], [{"role": "user", "content": "a"}]
        ),
        max_new_tokens=count("max_new_tokens"),
        chat=bad("chat template", True),
    ),
    row(
        "cache_bytes",
        gl.cache_bytes,
        {"model": MODEL, "tokens": 4},
        model=MODELS,
        tokens=count("tokens", 0),
        batch_size=count("batch_size"),
    ),
    row(
        "flops",
        gl.flops,
        {"model": MODEL, "tokens": 4},
        model=MODELS,
        tokens=count("tokens"),
        context=count("context", 0),
        batch_size=count("batch_size"),
        logits=[*count("logits", 0), Bad(5, "at most tokens = 4")],
    ),
    row(
        "latency",
        gl.latency,
        {"models": {"a": MODEL}, "prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "warmup": 0},
        models=bad("model", None, 3, {}, {"a": None}, {"a": 3}, MODEL),
        prompt_tokens=[*count("prompt_tokens"), Bad(200, "exceed the 128")],
        new_tokens=count("new_tokens"),
        batch_size=count("batch_size"),
        warmup=count("warmup", 0),
        repeats=count("repeats"),
        seed=SEEDS,
    ),
    row(
        "zero_shot",
        gl.zero_shot,
        {"model": SPEAKER, "tokenizer": TOKENIZER, "tasks": "none.jsonl"},
        model=MODELS,
        tokenizer=TOKENIZERS,
        tasks=[
            Bad("none.jsonl", "no such task file", FileNotFoundError),
            *bad("task", [], None, 3, [None]),
        ],
        limit=count("limit", optional=True),
        batch_size=count("batch_size"),
    ),
    row(
        "paired",
        gl.paired,
        {"first": SCORE, "second": SCORE},
        confidence=number("confidence", 0, 1, -1, 2, INF),
        normed=bad("acc_norm", True),
        first=bad("first|Score", None, 3),
        second=bad("second|Score", None, 3),
    ),
    row(
        "published",
        gl.published,
        model=bad("nothing published", "gpt", "", None, 3),
        colour=bad("no column", "blue"),
        free="filters",
    ),
    # experiments
    row(
        "Specification",
        field_of("model"),
        {},
        model=[
            *bad("model", None, 3, "", ["smollm2"]),
            Bad("./nope", "no such model folder", FileNotFoundError),
        ],
        dtype=bad("dtype", "float33", "nn", "", 16),
        device_map=bad("device", "nowhere", "", 3.5),
        criteria=[
            *bad("unknown criterion", "cosin", [None], [3]),
            *bad("criteri", ["cosine"] * 2, 3),
        ],
        n=[*bad(r"\bn\b", 0, -1, 2.5, NAN, [0], [2.5], ["2"], [2, 2], [None]), Bad("2", r"\bn\b")],
        layers=bad("layer", 3, "3-", "x", [[2.5]], [[]], [[2, 2]], [[-1]], ["2-3", "2-3"], [None]),
        starts=count("starts", optional=True),
        operators=[
            *bad("unknown", "gost", [None], ["x, y"]),
            *bad("rank", "low-rank"),
            *bad("twice", ["ghost"] * 2),
            *bad("leave out", "refit sequential"),
        ],
        calibration=[
            *bad("corpus", "wikki", [None], [3], []),
            Bad("none.txt", "no such corpus", FileNotFoundError),
            *bad("twice", ["pydoc"] * 2),
        ],
        split=SPLITS,
        perplexity=[
            *bad("corpus", "wikki", [None]),
            Bad("none.txt", "no such corpus", FileNotFoundError),
        ],
        test_split=[b for b in SPLITS if b.value not in (None, "")],
        windows=count("windows"),
        length=count("length"),
        selection_windows=count("selection_windows"),
        selection_length=[
            *count("selection_length", 2, optional=True),
            Bad(10**6, "at most length"),
        ],
        test_windows=count("test_windows", optional=True),
        test_length=count("test_length", 2),
        tasks=[Bad("quiz.jsonl", "no such task file", FileNotFoundError)],
        limit=count("limit", optional=True),
        batch_size=count("batch_size"),
        seed=count("seed", 0),
        probes=[*bad("unknown probe", "copyin", [None], [3]), *bad("twice", ["copying"] * 2)],
        probe_items=count("probe_items", optional=True),
        bos=bad("bos", 1, "yes", [True]),
    ),
    row(
        "run_experiment",
        gl.run_experiment,
        {
            "specification": gl.Specification(calibration="pydoc", perplexity=()),
            "output": "none/a.jsonl",
        },
        specification=bad("specification", None, 3, "ghost", {}),
        output=[
            *bad("output|path", None, 3, ["a"]),
            Bad("/", "cannot be written", PermissionError),
        ],
        model=[*bad("model", 3, "smollm2"), Bad(SPEAKER, "together")],
        tokenizer=[*bad("tokenizer", 3, "smollm2"), Bad(TOKENIZER, "together")],
        shard=bad("shard", "3/2", "0/2", "x", "", None, 3, "1/2/3"),
    ),
    row(
        "read_results",
        gl.read_results,
        path=[
            *bad("path", None, 3, ["a"]),
            Bad("none.jsonl", "none.jsonl", FileNotFoundError),
            Bad("/", "directory", OSError),
            Bad(__file__, "no results file"),
        ],
    ),
    row("Results", gl.Results, path=bad("path", None, 3, ["a"])),
]


def cases() -> Iterator[Case]:
    """Every line of the table."""
    for each in ROWS:
        for parameter, kind in each.kinds.items():
            for value, words, error in kind:
                call = lambda r=each, p=parameter, v=value: r.call(**{**r.right, p: v})  # noqa: E731
                told = rf"{words}|^{parameter} (must be|= )"
                yield Case(f"{each.name}({parameter}={short(value)})", call, error, told, value)


def short(value: Any) -> str:
    """A value as the name of a case shows it."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    text = value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)
    return text if len(text) < 40 else f"{text[:30]}…"


CASES = list(cases())
