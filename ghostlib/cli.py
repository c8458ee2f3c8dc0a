"""The command line: recover a model and save it, or compare repairs.

Options are parsed before torch and transformers are imported, so that help and usage errors appear
at once.
"""

import argparse
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
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
  ghostlib names                            all names that options accept
  ghostlib names | grep patch               names that contain patch
  ghostlib names | less                     page by page""",
    "inspect": """
  ghostlib inspect smollm2                  layers, widths, applicable operators
  ghostlib inspect org/model                from the hub's configuration alone
  ghostlib inspect folder | less            page by page""",
    "abilities": """
  ghostlib abilities smollm2                of the embedded model alone
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
    """Parser that raises `ValueError` for bad arguments, and accepts no abbreviations."""

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

    def add(run: Callable[..., None], text: str, *parents: _Parser) -> argparse.ArgumentParser:
        command = commands.add_parser(
            run.__name__,
            parents=parents,
            help=text,
            description=text,
            epilog=f"examples:{_EXAMPLES[run.__name__]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    model, loading = _Parser(add_help=False), _Parser(add_help=False)
    model.add_argument("model", help="smollm2 (embedded), a local folder, or a hub id")
    loading.add_argument("--dtype", help="float32, bfloat16, … [as the model was saved]")
    loading.add_argument("--device", help="such as cpu or cuda:1 [a GPU if there is one]")
    add(fetch, "fetch and check the embedded model and corpus")
    add(names, "list operators, criteria, budgets, corpora, tasks and probes by name")
    add(inspect, "describe a model from its configuration, without its weights", model)
    text = "measure abilities of a model: copying, names, brackets, facts …"
    sub = add(abilities, text, model, loading)
    sub.add_argument("--reference", help="the dense model it was made from")
    sub.add_argument("--probes", nargs="+", help="only these; see ghostlib names")
    sub.add_argument("--seed", type=int, default=0, help="of the items [0]")
    sub.add_argument("--json", action="store_true", help="print JSON, every item included")
    sub = add(recover, "prune, recover, score and save a model", model, loading)
    sub.add_argument("output", help="new folder for the recovered model and its tokenizer")
    sub.add_argument("--n", type=_count, help="number of layers to remove [7]")
    sub.add_argument("--criterion", help="how to choose them [cosine; auto: the recipe's own]")
    sub.add_argument("--layers", nargs="+", help="remove these instead, such as 12-15 17")
    text = "repair of the gaps: a family, a regressor, or auto (a recipe chooses) [ghost]"
    sub.add_argument("--operator", default="ghost", help=text)
    sub.add_argument("--budget", help="what auto may add: none, matrix or any [any]")
    sub.add_argument("--keep", help="with auto: an ability that counts too, such as copying")
    sub.add_argument("--relative-ridge", type=float, help="ridge in units of the mean eigenvalue")
    sub.add_argument("--rank", type=_count, help="of operators that have one")
    text = "for several gaps: teacher or sequential [teacher]"
    sub.add_argument("--fit", choices=("teacher", "sequential"), default="teacher", help=text)
    sub.add_argument("--corpus", default="wiki", help="a name, hub id or file [wiki]")
    sub.add_argument("--windows", type=_count, default=16, help="calibration windows [16]")
    sub.add_argument("--length", type=_count, default=2048, help="tokens of a window [2048]")
    sub.add_argument("--test-windows", type=_count, default=8, help="held-out windows [8]")
    sub.add_argument("--seed", type=int, default=0, help="of the windows [0]")
    text = "spread the weights over all devices and memory; the rest goes into this folder"
    sub.add_argument("--offload", metavar="FOLDER", help=text)
    text = "print the size of the download and the expected memory and time, and stop"
    sub.add_argument("--dry-run", action="store_true", help=text)
    text = "print one JSON object to standard output, and all else to standard error"
    sub.add_argument("--json", action="store_true", help=text)
    sub.add_argument("--portable", action="store_true", help="add code to load it without ghostlib")
    sub = add(experiment, "score operators on corpora and tasks; resume a run that stopped")
    sub.add_argument("output", help="results file (JSON lines), created or resumed")
    descriptions = _descriptions()
    for field in fields(Specification):
        default = field.default
        shown = " ".join(default) if isinstance(default, tuple) else default
        sub.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_yes if field.name == "bos" else int if "int" in str(field.type) else str,
            nargs="*" if isinstance(default, tuple) else None,
            default=default,
            help=descriptions[field.name] + (f" [{shown}]" if shown not in (None, "") else ""),
        )
    sub.add_argument("--shard", default="1/1", help="3/8: the third eighth of the cells")
    sub.add_argument("--normed", action="store_true", help="print acc_norm where it exists")
    return top


def _count(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _yes(text: str) -> bool:
    """True for yes, False for no."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def _descriptions() -> dict[str, str]:
    """{attribute of `Specification`: its description in the docstring}."""
    # Python 3.13 strips the indentation of docstrings when it compiles them.
    text = (getdoc(Specification) or "").partition("Raises:")[0]
    text = text.replace("``", "").replace("%", "%%")
    attributes = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text, re.MULTILINE)
    return {name: " ".join(lines.split()).rstrip(".") for name, lines in attributes}


def experiment(options: argparse.Namespace) -> None:
    """Run ``ghostlib experiment``: print the tables."""
    from ghostlib.experiments.run import run_experiment
    from ghostlib.experiments.tables import report

    values = {field.name: getattr(options, field.name) for field in fields(Specification)}
    results = run_experiment(Specification(**values), options.output, shard=options.shard)
    print(report(results, normed=options.normed))


def recover(options: argparse.Namespace) -> None:
    """Run ``ghostlib recover``: print a table, or one JSON object."""
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
            canonical(options.operator)  # refuses an operator that needs a rank
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
    placement: dict[str, Any] = {"device": device}
    if options.offload:
        placement = {"device_map": "auto", "offload_folder": options.offload}
    model, tokenizer = load_model(options.model, dtype=options.dtype, **placement)
    check_output(options.output, bytes_needed=weight_bytes(model))
    sampling = {"length": options.length, "seed": options.seed}
    calib = token_windows(options.corpus, tokenizer, count=options.windows, **sampling)
    held_out = {"split": "test", "count": options.test_windows}
    test = token_windows(options.corpus, tokenizer, **held_out, **sampling)
    steps.begin("choosing layers")
    if not layers and (options.criterion or not auto):
        # A search scores every candidate on one window.
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
    probing: dict[str, Any] = {"probes": BRIEF, "seed": options.seed}
    reference = None
    with suppress(ValueError):  # for a loss that is not finite: the repair is saved all the same
        perplexities["dense"] = perplexity(model, test)
        reference = profile_model(model, tokenizer, **probing)
    with suppress(ValueError):
        perplexities[PRUNED] = perplexity(prune(model, layers), test)
    perplexities[options.operator] = perplexity(recovered, test)
    profile = profile_model(recovered, tokenizer, **probing, reference=reference)
    facts = {"base_model": base_name(options.model), "text": base_name(options.corpus), **sampling}
    facts |= {"windows": options.windows, "perplexity": perplexities, "abilities": profile}
    save(recovered, options.output, tokenizer, portable=options.portable, facts=facts)
    closed = None
    with suppress(ValueError):
        closed = gap_closed(*perplexities.values())
    no_loss = "none of those probed" if reference else "not known, the dense model's are not finite"
    before, after = count_parameters(model), count_parameters(recovered)
    rows = [
        *([("chosen", chosen)] if chosen else []),
        ("layers removed", f"{spell(layers)} ({len(layers)})"),
        ("parameters", f"{before / 1e6:,.1f} million, now {after / 1e6:,.1f} million"),
        *[(f"held-out perplexity, {name}", f"{value:.2f}") for name, value in perplexities.items()],
        ("gap closed", "no finite gap" if closed is None else f"{closed:.0%}"),
        ("abilities lost", "; ".join(profile.lost) or no_loss),
        ("time", f"{steps.seconds:.0f} s"),
        ("peak memory", readable(peak_memory(device))),
        ("saved to", f"{one_line(options.output)}; its README.md says how to load it"),
    ]
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
    """Options for the solver; refuses options without effect."""
    if options.layers and (options.n or options.criterion):
        raise ValueError("--layers names the layers to remove: leave out --n and --criterion")
    if options.offload and options.device:
        raise ValueError("--offload spreads the weights over all devices: leave out --device")
    solver = {"relative_ridge": options.relative_ridge, "rank": options.rank}
    solver = {name: value for name, value in solver.items() if value is not None}
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
    """Print ``rows`` in two columns, or ``record`` as one JSON object."""
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def fetch(options: argparse.Namespace) -> None:
    """Run ``ghostlib fetch``: print a line for each file."""
    from ghostlib.text.assets import fetch_all

    for name, path in fetch_all().items():
        print(f"{name}: {path}")


def names(options: argparse.Namespace) -> None:
    """Run ``ghostlib names``: print a line for each name."""
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
    """Run ``ghostlib inspect``: print a description of a model from its configuration."""
    from ghostlib.surgery.inspect import inspect as inspect_model

    print(inspect_model(options.model))


def abilities(options: argparse.Namespace) -> None:
    """Run ``ghostlib abilities``: print a table, or JSON."""
    import torch

    from ghostlib.evaluation.abilities import PROBES
    from ghostlib.evaluation.abilities import abilities as profile_model
    from ghostlib.models.loading import check_source, load_model

    probes = None if options.probes is None else [PROBES[name].name for name in options.probes]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    profile = None
    for source in (options.reference, options.model):
        if source is not None:
            check_source(source, options.dtype, device)
            model, tokenizer = load_model(source, dtype=options.dtype, device=device)
            settings = {"seed": options.seed, "probes": probes, "reference": profile}
            profile = profile_model(model, tokenizer, **settings)
    assert profile is not None
    print(profile.to_json() if options.json else "\n".join([str(profile), *profile.lost]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Bad input ends in one line on standard error."""
    try:
        options = parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head or less, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left is flushed at exit
    except KeyboardInterrupt as error:
        return _fail(error, 130, "interrupted")
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        return _fail(error, _status(error), str(error).partition("\n")[0])
    return 0


def _status(error: Exception) -> int:
    """Exit status: 3 for a model that does not fit, 1 for a failure while running, 2 for input."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 3
    return 1 if isinstance(error, RuntimeError) else 2


def _fail(error: BaseException, status: int, message: str = "") -> int:
    """Print one line, after clearing the progress bars that the error left open."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    print(f"ghostlib: {one_line(message or type(error).__name__, 900)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
