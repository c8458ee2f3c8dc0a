"""The command line: recover a model and save it, or compare ways to do so.

Options are read before torch and transformers are imported, so that help and typing errors are
answered at once.
"""

import argparse
import json
import math
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from inspect import getdoc
from typing import Any, NoReturn

from ghostlib.common import AUTO, PRUNED, one_line
from ghostlib.experiments.spec import Specification

_EXAMPLES = {
    "fetch": """
  ghostlib fetch                            the embedded model and corpus, once
  GHOSTLIB_CACHE=folder ghostlib fetch      into another folder
  GHOSTLIB_PROGRESS=0 ghostlib fetch        without progress bars""",
    "names": """
  ghostlib names                            everything that an option may name
  ghostlib names | grep patch               what is there of one kind
  ghostlib names | less                     page by page""",
    "inspect": """
  ghostlib inspect smollm2                  layers, widths, which operators fit
  ghostlib inspect org/model                from the hub's configuration alone
  ghostlib inspect folder | less            page by page""",
    "abilities": """
  ghostlib abilities smollm2                what the embedded model can do
  ghostlib abilities smollm2-ghost7 --reference smollm2
  ghostlib abilities org/model --probes copying names --json""",
    "recover": """
  ghostlib recover smollm2 out --n 7 --operator ghost
  ghostlib recover org/model out --layers 12-18 --operator low-rank --rank 64 --corpus c4
  ghostlib recover org/model out --operator auto --dtype bfloat16 --dry-run
exit status: 0 done, 1 failed while running, 2 bad input, 3 does not fit, 130 interrupted""",
    "experiment": """
  ghostlib experiment out.jsonl --n 5 7 9 --operators pruned ghost auto
  ghostlib experiment out.jsonl --layers 12-18 9-15,20 --tasks wiki-topic my-questions.jsonl
  ghostlib experiment part-3.jsonl --model org/model --criteria cosine residual --shard 3/8""",
}


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, as for any other bad input; no option is guessed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The parser of ``ghostlib``."""
    top = _Parser(
        prog="ghostlib", description="Remove decoder layers from a causal LM and repair the gap."
    )
    top.add_argument("--version", action="version", version=f"ghostlib {version('ghostlib')}")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"examples:{_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    add("fetch", "fetch and check the embedded model and corpus")
    add("names", "list operators, criteria, budgets, corpora, tasks and probes by name")
    make = add("inspect", "what is found of a model, without its weights")
    make.add_argument("model", help="smollm2 (embedded), a local folder, or a hub id")
    make = add("abilities", "what a model can do: copying, names, brackets, facts …")
    make.add_argument("model", help="smollm2 (embedded), a local folder, or a hub id")
    make.add_argument("--reference", help="the dense model it was made from")
    make.add_argument("--probes", nargs="+", help="ask these alone; see ghostlib names")
    make.add_argument("--seed", type=int, default=0, help="of the items [0]")
    make.add_argument("--json", action="store_true", help="print JSON, every item included")
    make.add_argument("--dtype", help="float32, bfloat16, … [as the model was saved]")
    make.add_argument("--device", help="such as cpu or cuda:1 [a GPU if there is one]")
    make = add("recover", "prune, recover, score and save a model")
    make.add_argument("model", help="smollm2 (embedded), a local folder, or a hub id")
    make.add_argument("output", help="new folder for the recovered model and its tokenizer")
    make.add_argument("--n", type=_count, help="layers to remove [7]")
    text = "how they are chosen [cosine; with auto the recipe's own]"
    make.add_argument("--criterion", help=text)
    make.add_argument("--layers", nargs="+", help="remove these instead, such as 12-15 17")
    text = "what repairs the gaps: a family, a regressor, or auto (a recipe chooses) [ghost]"
    make.add_argument("--operator", default="ghost", help=text)
    make.add_argument("--budget", help="what auto may add: none, matrix or any [any]")
    make.add_argument("--keep", help="with auto: an ability that counts too, such as copying")
    make.add_argument("--relative-ridge", type=float, help="ridge in units of the mean eigenvalue")
    make.add_argument("--rank", type=_count, help="of operators that have one")
    text = "for several gaps: teacher or sequential [teacher]"
    make.add_argument("--fit", choices=("teacher", "sequential"), default="teacher", help=text)
    make.add_argument("--corpus", default="wiki", help="a name, hub id or file [wiki]")
    make.add_argument("--windows", type=_count, default=16, help="calibration windows [16]")
    make.add_argument("--length", type=_count, default=2048, help="tokens of a window [2048]")
    make.add_argument("--test-windows", type=_count, default=8, help="held-out windows [8]")
    make.add_argument("--seed", type=int, default=0, help="which windows are drawn [0]")
    make.add_argument("--dtype", help="float32, bfloat16, … [as the model was saved]")
    make.add_argument("--device", help="such as cpu or cuda:1 [a GPU if there is one]")
    text = "spread the weights over all devices and memory; what fits nowhere else goes here"
    make.add_argument("--offload", metavar="FOLDER", help=text)
    text = "say what will be downloaded, and memory and time expected, and stop"
    make.add_argument("--dry-run", action="store_true", help=text)
    text = "print one JSON object to standard output, and all else to standard error"
    make.add_argument("--json", action="store_true", help=text)
    text = "save the code as well that loads the model without ghostlib"
    make.add_argument("--portable", action="store_true", help=text)
    make = add("experiment", "score operators on corpora and tasks, and resume where it stopped")
    make.add_argument("output", help="results file (JSON lines), made or resumed")
    described = dict(_described())
    for field in fields(Specification):
        several, default = isinstance(field.default, tuple), field.default
        shown = " ".join(default) if isinstance(default, tuple) else default
        make.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_yes if field.name == "bos" else int if "int" in str(field.type) else str,
            nargs="*" if several else None,
            default=default,
            help=described[field.name] + (f" [{shown}]" if shown not in (None, "") else ""),
        )
    make.add_argument("--shard", default="1/1", help="3/8: the third eighth of the cells")
    make.add_argument("--normed", action="store_true", help="print acc_norm of tasks that have it")
    return top


def _count(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _yes(text: str) -> bool:
    """True for yes, False for no."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def _described() -> Iterator[tuple[str, str]]:
    """The attributes of `Specification` with what its docstring says of them."""
    # Python 3.13 takes the indentation of docstrings away when it compiles them.
    text = (getdoc(Specification) or "").partition("Raises:")[0]
    for name, line in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text, re.MULTILINE):
        yield name, " ".join(line.split()).rstrip(".").replace("``", "").replace("%", "%%")


def experiment(options: argparse.Namespace) -> None:
    """Carry out ``ghostlib experiment``; prints the tables."""
    from ghostlib.experiments.run import run_experiment
    from ghostlib.experiments.tables import report

    known = {field.name: getattr(options, field.name) for field in fields(Specification)}
    results = run_experiment(Specification(**known), options.output, shard=options.shard)
    print(report(results, normed=options.normed))


def recover(options: argparse.Namespace) -> None:
    """Carry out ``ghostlib recover``; prints a table, or one JSON object."""
    auto = options.operator == AUTO
    solver = _solver_options(options, auto)
    import torch

    from ghostlib.evaluation.abilities import BRIEF, COPYING, PROBES, finite
    from ghostlib.evaluation.abilities import abilities as profile_model
    from ghostlib.evaluation.cost import count_parameters
    from ghostlib.evaluation.perplexity import gap_closed, perplexity
    from ghostlib.experiments.spec import base_name, canonical
    from ghostlib.models.architectures import weight_bytes
    from ghostlib.models.boundaries import read_layers, spell
    from ghostlib.models.loading import check_source, load_model
    from ghostlib.operators.families import Family
    from ghostlib.operators.solve import check_options
    from ghostlib.recovery.plan import Steps, peak_memory, plan
    from ghostlib.recovery.recipe import BUDGETS, TOO_FEW, Recipe
    from ghostlib.recovery.recover import recover as recover_model
    from ghostlib.selection.criteria import CRITERIA, select_layers
    from ghostlib.statistics.calibration import readable
    from ghostlib.surgery.cut import prune
    from ghostlib.surgery.saving import check_output, save
    from ghostlib.text.corpora import documents, token_windows

    check_output(options.output)
    if not auto:
        check_options(Family.of(options.operator), solver)
        if options.rank is None:
            canonical(options.operator)  # refuses one that needs it
    elif options.windows < 2:
        raise ValueError(TOO_FEW)
    criterion = "cosine" if options.criterion is None else options.criterion
    n = 7 if options.n is None else options.n
    CRITERIA[criterion]
    BUDGETS["any" if options.budget is None else options.budget]
    PROBES[COPYING if options.keep is None else options.keep]
    documents(options.corpus)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_source(options.model, options.dtype, device)
    layers: Any = read_layers(",".join(options.layers)) if options.layers else None
    expected = plan(
        options.model,
        n=n,
        layers=layers,
        criterion=criterion,
        operator=options.operator,
        budget=options.budget or "any",
        keep=options.keep,
        windows=options.windows,
        length=options.length,
        test_windows=options.test_windows,
        dtype=options.dtype,
        device=device,
        spread=bool(options.offload),
    )
    if options.dry_run:
        _print_table(expected.rows(), asdict(expected), as_json=options.json)
    expected.check()
    if options.dry_run:
        return
    steps = Steps(expected)
    steps.begin("loading")
    place: dict[str, Any] = {"device": device}
    if options.offload:
        place = {"device_map": "auto", "offload_folder": options.offload}
    model, tokenizer = load_model(options.model, dtype=options.dtype, **place)
    check_output(options.output, bytes_needed=weight_bytes(model))
    drawn = {"length": options.length, "seed": options.seed}
    calib = token_windows(options.corpus, tokenizer, count=options.windows, **drawn)
    held_out = {"split": "test", "count": options.test_windows}
    test = token_windows(options.corpus, tokenizer, **held_out, **drawn)
    steps.begin("choosing layers")
    if not layers and (options.criterion or not auto):
        # A search scores one window of text for each set of layers that it considers.
        layers = select_layers(model, calib, n, criterion, windows=calib[:1])
    steps.begin("calibrating")
    chosen = ""
    if auto:
        recipe = Recipe(model, calib, budget=options.budget or "any", keep=options.keep)
        choice = recipe.choose(layers or n)
        chosen, layers, recovered = str(choice), choice.layers, choice.apply(model)
    else:
        recovered = recover_model(model, calib, layers, options.operator, fit=options.fit, **solver)
    steps.begin("scoring")
    perplexities = {"dense": math.nan, PRUNED: math.nan}
    asked: dict[str, Any] = {"probes": BRIEF, "seed": options.seed}
    whole = None
    with suppress(ValueError):  # of a loss that is not finite: the repair is saved all the same
        perplexities["dense"] = perplexity(model, test)
        whole = profile_model(model, tokenizer, **asked)
    with suppress(ValueError):
        perplexities[PRUNED] = perplexity(prune(model, layers), test)
    perplexities[options.operator] = perplexity(recovered, test)
    profile = profile_model(recovered, tokenizer, **asked, reference=whole)
    facts = {"base_model": base_name(options.model), "text": base_name(options.corpus), **drawn}
    facts |= {"windows": options.windows, "perplexity": perplexities, "abilities": profile}
    save(recovered, options.output, tokenizer, portable=options.portable, facts=facts)
    closed = None
    with suppress(ValueError):
        closed = gap_closed(*perplexities.values())
    none_lost = "none of those probed" if whole else "not known, the dense model's are not finite"
    before, after = count_parameters(model), count_parameters(recovered)
    rows = [
        ("layers removed", f"{spell(layers)} ({len(layers)})"),
        ("parameters", f"{before / 1e6:,.1f} million, now {after / 1e6:,.1f} million"),
        *[(f"held-out perplexity, {name}", f"{value:.2f}") for name, value in perplexities.items()],
        ("gap closed", "no finite gap" if closed is None else f"{closed:.0%}"),
        ("abilities lost", "; ".join(profile.lost) or none_lost),
        ("time", f"{steps.seconds:.0f} s"),
        ("peak memory", readable(peak_memory(device))),
        ("saved to", f"{one_line(options.output)}; its README.md says how to load it"),
    ]
    if chosen:
        rows.insert(0, ("chosen", chosen))
    record = {
        "layers": list(layers),
        "parameters": {"dense": before, "recovered": after},
        "perplexity": finite(perplexities),
        "gap_closed": closed,
        "abilities_lost": profile.lost,
        "seconds": steps.seconds,
        "peak_memory": peak_memory(device),
        "folder": options.output,
        "chosen": chosen or None,
    }
    _print_table(rows, record, as_json=options.json)
    if not options.json:
        print(f"\n{profile}")


def _solver_options(options: argparse.Namespace, auto: bool) -> dict[str, Any]:
    """What the solver is given; refuses options that would have no effect."""
    if options.layers and (options.n or options.criterion):
        raise ValueError("--layers names what is removed: leave out --n and --criterion")
    if options.offload and options.device:
        raise ValueError("--offload spreads the weights over all devices: leave out --device")
    asked = {"relative_ridge": options.relative_ridge, "rank": options.rank}
    solver = {name: value for name, value in asked.items() if value is not None}
    for name in ("budget", "keep"):
        if getattr(options, name) and not auto:
            raise ValueError(
                f"--{name} is for --operator auto, not for {options.operator}: leave it out"
            )
    if auto and (solver or options.fit != "teacher"):
        raise ValueError(
            "--operator auto chooses the ridge itself, with full rank and the dense model's text: "
            "leave out --relative-ridge, --rank and --fit"
        )
    return solver


def _print_table(rows: list[tuple[str, str]], record: dict[str, Any], *, as_json: bool) -> None:
    """Print rows in two columns, or the same as one JSON object."""
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def fetch(options: argparse.Namespace) -> None:
    """Carry out ``ghostlib fetch``; prints a line for each file."""
    from ghostlib.text.assets import fetch_all

    for name, path in fetch_all().items():
        print(f"{name}: {path}")


def names(options: argparse.Namespace) -> None:
    """Carry out ``ghostlib names``; prints a line for each name."""
    from ghostlib.evaluation.abilities import PROBES
    from ghostlib.evaluation.tasks import EMBEDDED, PAPER_TASKS
    from ghostlib.operators.families import FAMILIES
    from ghostlib.recovery.recipe import BUDGETS
    from ghostlib.selection.criteria import CRITERIA
    from ghostlib.text.corpora import CORPORA

    for family in FAMILIES.values():
        print(f"operator   {family.name:<24} {family.searches}")
    for criterion in CRITERIA:
        print(f"criterion  {criterion}")
    for budget, families in BUDGETS.items():
        print(f"budget     {budget:<24} {', '.join(families)}")
    for corpus, source in CORPORA.items():
        print(f"corpus     {corpus:<24} {source.description}")
    for task in (*EMBEDDED, *PAPER_TASKS):
        print(f"task       {task}")
    for probe in PROBES.values():
        print(f"probe      {probe.name:<24} {probe.text}")


def inspect(options: argparse.Namespace) -> None:
    """Carry out ``ghostlib inspect``; prints what is found of a model, from its configuration."""
    from ghostlib.surgery.inspect import inspect as inspect_model

    print(inspect_model(options.model))


def abilities(options: argparse.Namespace) -> None:
    """Carry out ``ghostlib abilities``; prints a table, or JSON."""
    import torch

    from ghostlib.evaluation.abilities import PROBES
    from ghostlib.evaluation.abilities import abilities as profile_model
    from ghostlib.models.loading import check_source, load_model

    probes = None if options.probes is None else [PROBES[name].name for name in options.probes]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    profile = None
    for source in (options.reference, options.model):
        if source is None:
            continue
        check_source(source, options.dtype, device)
        model, tokenizer = load_model(source, dtype=options.dtype, device=device)
        profile = profile_model(
            model, tokenizer, seed=options.seed, probes=probes, reference=profile
        )
    assert profile is not None
    print(profile.to_json() if options.json else "\n".join([str(profile), *profile.lost]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Bad input ends in one line on standard error."""
    commands = {"fetch": fetch, "names": names, "inspect": inspect}
    commands |= {"abilities": abilities, "recover": recover, "experiment": experiment}
    try:
        options = parser().parse_args(arguments)
        commands[options.command](options)
    except KeyboardInterrupt as error:
        return _end("interrupted", error, 130)
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        return _end(
            next(iter(str(error).splitlines()), type(error).__name__), error, _status(error)
        )
    return 0


def _status(error: Exception) -> int:
    """The exit status: 3 for what does not fit, 1 for what failed on the way, 2 for bad input."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 3
    return 1 if isinstance(error, RuntimeError) else 2


def _end(message: str, error: BaseException, status: int) -> int:
    """Say what happened in one line, after progress bars that the error left open are cleared."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    print(f"ghostlib: {one_line(message, 900)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
