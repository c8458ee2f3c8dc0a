"""The command line: fetch the embedded files, or recover a model and save it.

ghostlib fetch
ghostlib recover smollm2 out-folder --n 7 --operator ghost --corpus wiki
ghostlib recover smollm2 out-folder --n 7 --operator auto
ghostlib grid results/grid.json --n 3 5 7
ghostlib evaluate results/evaluation.json --n 5 7 9 --limit 100
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

import ghostlib as gl
from ghostlib.evaluation.tasks import EMBEDDED, PAPER_TASKS
from ghostlib.experiments.grid import REPAIRS, Grid, Plan, blocks
from ghostlib.experiments.results import Results
from ghostlib.experiments.spec import Settings
from ghostlib.experiments.tables import report
from ghostlib.models.architectures import num_layers
from ghostlib.models.boundaries import read_layers
from ghostlib.recovery.recipe import AUTO
from ghostlib.text import assets
from ghostlib.tutorial.stored import table


def parser() -> argparse.ArgumentParser:
    """The parser of ``ghostlib``."""
    top = argparse.ArgumentParser(
        prog="ghostlib", description="Remove decoder layers from a causal LM and repair the gap."
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="fetch and check the embedded model and corpus")
    make = commands.add_parser(
        "recover",
        help="prune, recover, score and save a model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    make.add_argument("model", help="smollm2 (embedded), a local folder, or a hub id")
    make.add_argument("output", help="new folder for the recovered model and its tokenizer")
    make.add_argument("--n", type=int, default=7, help="number of layers to remove")
    names = ", ".join(gl.CRITERIA)
    make.add_argument("--criterion", help=f"{names}; by default cosine, with auto the recipe's own")
    make.add_argument("--layers", type=int, nargs="+", help="remove these instead of choosing")
    names = ", ".join(gl.OPERATORS)
    text = f"{names}; or auto: a recipe chooses on calibration windows kept out of the fit"
    make.add_argument("--operator", default="ghost", help=text)
    make.add_argument("--relative-ridge", type=float, help="ridge in units of the mean eigenvalue")
    make.add_argument("--rank", type=int, help="of low-rank and branch operators")
    make.add_argument("--fit", default="teacher", help="teacher or sequential, for several gaps")
    make.add_argument("--corpus", default="wiki", help=f"{', '.join(gl.CORPORA)}, hub id or file")
    make.add_argument("--windows", type=int, default=16, help="calibration windows")
    make.add_argument("--length", type=int, default=2048, help="tokens of a window")
    make.add_argument("--test-windows", type=int, default=8, help="held-out windows to score")
    make.add_argument("--seed", type=int, default=0, help="which windows are drawn")
    make.add_argument("--dtype", help="float32, bfloat16, …; by default as the model was saved")
    make.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    _add_grid(commands)
    _add_evaluate(commands)
    return top


def _add_grid(commands: Any) -> None:
    plan = Plan()
    make = commands.add_parser(
        "grid",
        help="score every criterion with every repair; a run that was stopped goes on",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    make.add_argument("output", help="results file, made or gone on with")
    make.add_argument("--model", default="smollm2", help="smollm2, a local folder, or a hub id")
    make.add_argument("--n", type=int, nargs="+", default=[3, 5, 7, 9, 11], help="layers to remove")
    make.add_argument("--criteria", nargs="+", default=list(gl.CRITERIA), help="how to choose them")
    make.add_argument(
        "--repairs",
        nargs="+",
        default=list(REPAIRS),
        help="how to close the gaps: none, operators, features such as 'x, n(x); 1/|y|', auto",
    )
    make.add_argument("--starts", type=int, help="score every block of this many layers instead")
    make.add_argument("--layers", nargs="+", help="score these instead, such as 12-18 12-15,17")
    make.add_argument("--corpora", nargs="+", default=list(plan.corpora), help="for all windows")
    make.add_argument("--test-corpora", nargs="+", help="for test windows, where they differ")
    for name, what in (
        ("calibration", "the statistics are computed from"),
        ("selection", "searches score, of the same split"),
        ("test", "are held out"),
    ):
        for part, meaning in (
            ("count", "windows of each corpus"),
            ("length", "tokens of a window"),
        ):
            default = getattr(plan, f"{name}_{part}")
            text = f"{meaning} that {what}"
            make.add_argument(f"--{name}-{part}", type=int, default=default, help=text)
    make.add_argument("--seed", type=int, default=0, help="which windows are drawn")
    make.add_argument("--dtype", help="float32, bfloat16, …; by default as the model was saved")
    make.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _add_evaluate(commands: Any) -> None:
    plain = Settings()
    make = commands.add_parser(
        "evaluate",
        help="score repairs on corpora and zero-shot tasks; a run that was stopped goes on",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, text: str, kind: Callable[[str], Any] = str, several: str = "") -> None:
        default = getattr(plain, name)
        shown = list(default) if several else default
        flag = f"--{name.replace('_', '-')}"
        make.add_argument(flag, type=kind, nargs=several or None, default=shown, help=text)

    make.add_argument("output", help="results file, made or gone on with")
    add("model", "smollm2 (embedded), a local folder, or a hub id")
    add("dtype", "float32, bfloat16, …; by default as the model was saved")
    add("device_map", "as for transformers; by default auto where there is a GPU")
    add("criterion", f"how to choose layers: {', '.join(gl.CRITERIA)}")
    add("n", "how many layers to remove, each in turn", int, "+")
    names = f"pruned (no repair), {', '.join(gl.OPERATORS)}, auto (a recipe chooses)"
    add("operators", names, several="+")
    add("calibration", f"train splits of {', '.join(gl.CORPORA)}, hub id or file", several="+")
    add("windows", "calibration windows, which the corpora share evenly", int)
    add("length", "tokens of a calibration window", int)
    add("selection_windows", "of these, how many choose the layers; by default all", int)
    add("perplexity", "corpora to score", several="*")
    add("test_windows", "of each; by default as published, and 8 of other corpora", int)
    add("test_length", "tokens of a window to score", int)
    tasks = f"{', '.join(EMBEDDED)}, those of lm-eval by name, or .jsonl files"
    add("tasks", f"{tasks}; the paper's: {' '.join(PAPER_TASKS)}", several="*")
    add("limit", "the first so many items of each task; by default all", int)
    add("batch_size", "sequences in a forward pass of a task", int)
    add("seed", "which windows are drawn", int)
    make.add_argument("--normed", action="store_true", help="print acc_norm of tasks that have it")


def evaluate(options: argparse.Namespace) -> None:
    """Carry out ``ghostlib evaluate``; prints the tables."""
    known = {field.name for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in vars(options).items() if name in known})
    model, tokenizer = settings.load()
    results = gl.evaluate(model, tokenizer, settings, options.output)
    print(report(results.cells, normed=options.normed))


def grid(options: argparse.Namespace) -> None:
    """Carry out ``ghostlib grid``; prints the table of perplexities."""
    for criterion in options.criteria:
        gl.CRITERIA[criterion]  # an unknown name is refused before the model is loaded
    asked = [read_layers(text) for text in options.layers or ()]
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model, tokenizer = gl.load_model(options.model, dtype=dtype, device=options.device)
    known = {field.name for field in fields(Plan)}
    chosen = {name: value for name, value in vars(options).items() if name in known}
    for name in ("corpora", "test_corpora"):
        chosen[name] = tuple(chosen[name]) if chosen[name] else None
    plan = Plan(**chosen)
    results = Results.open(options.output, plan.settings(model))
    made = Grid(model, tokenizer, results, plan)
    if options.starts or options.layers:
        asked += blocks(options.starts, num_layers(model)) if options.starts else []
        made.score(asked, options.repairs)
        print(f"{len(results.cells)} cells in {options.output}")
        return
    choices = made.select(options.criteria, options.n)
    made.score(choices.values(), options.repairs)
    rows = table(results.cells)
    shown = rows.pivot_table("perplexity", ["corpus", "n", "criterion"], "repair")
    print(shown.to_string(float_format=lambda value: f"{value:.1f}"))


def recover(options: argparse.Namespace) -> None:
    """Carry out ``ghostlib recover``; prints one line a step."""
    if os.path.isdir(options.output) and os.listdir(options.output):
        raise FileExistsError(f"output folder {options.output} is not empty: name a new one")
    how = _solver_options(options)  # refused before the model is loaded
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model, tokenizer = gl.load_model(options.model, dtype=dtype, device=options.device)
    drawn = {"length": options.length, "seed": options.seed}
    calib = gl.token_windows(options.corpus, tokenizer, count=options.windows, **drawn)
    test = gl.token_windows(
        options.corpus, tokenizer, split="test", count=options.test_windows, **drawn
    )
    auto, layers = options.operator == AUTO, options.layers
    if not layers and not (auto and options.criterion is None):
        layers = gl.select_layers(model, calib, options.n, options.criterion or "cosine")
    if auto:
        choice = gl.Recipe(model, calib).choose(layers or options.n)
        print(choice)
        layers, recovered = choice.layers, choice.apply(model)
    print(f"removing layers {', '.join(map(str, layers))}")
    if not auto:
        recovered = gl.recover(model, calib, layers, options.operator, fit=options.fit, **how)
    for name, scored in (
        ("dense", model),
        ("pruned", gl.prune(model, layers)),
        (options.operator, recovered),
    ):
        print(f"{name:>18}: held-out perplexity {gl.perplexity(scored, test):.2f}")
    recovered.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"saved to {options.output}; load it after `import ghostlib`")


def _solver_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was said of the solver, and is refused where the recipe chooses."""
    asked = {"relative_ridge": options.relative_ridge, "rank": options.rank}
    how = {name: value for name, value in asked.items() if value is not None}
    if options.operator == AUTO and (how or options.fit != "teacher"):
        raise ValueError(
            "--operator auto chooses the ridge itself, with full rank and the dense model's text: "
            "leave out --relative-ridge, --rank and --fit"
        )
    return how


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Bad input ends in one line on standard error."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "fetch":
            for name, path in assets.fetch_all().items():
                print(f"{name}: {path}")
        else:
            {"recover": recover, "grid": grid, "evaluate": evaluate}[options.command](options)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"ghostlib: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
