"""Mutants of the mathematics that the tests do not notice.

    tools/mutation.py [FOLDER ...] [--sample N]

The mutants are Cosmic Ray's: arithmetic, comparisons, constants, conditions, loops. Each runs the
tests of its own folder, without the embedded model, on a copy of the package with the change. It
does so in a fork of a process that has imported the libraries, so that a mutant takes about as long
as the tests that kill it.
"""

import argparse
import contextlib
import difflib
import importlib
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

import hypothesis
import pytest
import torch
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB

ROOT = Path(__file__).parents[1]
FOLDERS = ("linalg", "statistics", "operators", "selection")
# Decorators, annotations and types of exceptions; bit operations, always an error on a float.
SKIPPED = ("Bit", "Shift", "RemoveDecorator", "ExceptionReplacer")
TESTS = ["-x", "-q", "-p", "no:cacheprovider", "--thorough", "-m", "not embedded and not slow"]
LIMIT = 200  # seconds of a core, for a mutant that never ends
# The first failing example is enough: it is neither shrunk nor kept.
hypothesis.settings.register_profile(
    "mutation", deadline=None, database=None, derandomize=True, phases=[hypothesis.Phase.generate]
)
Mutant = tuple[Path, str]  # a file of the package and its mutated code


def mutants(folder: str) -> list[tuple[Path, str, int]]:
    """(file, operator, occurrence) of every mutant of a folder."""
    work = WorkDB(":memory:", WorkDB.Mode.create)
    init(sorted((ROOT / "ghostlib" / folder).glob("*.py")), work, {})
    specs = [spec for item in work.work_items for spec in item.mutations]
    return sorted(
        (spec.module_path, spec.operator_name, spec.occurrence)
        for spec in specs
        if not any(part in spec.operator_name for part in SKIPPED)
    )


def mutate(file: Path, operator: str, occurrence: int) -> list[Mutant]:
    """The mutant; none where it is no program, as with the star of keyword-only arguments."""
    code = mutate_code(file.read_text(), get_operator(operator)(), occurrence)
    with contextlib.suppress(SyntaxError):
        compile(code, file, "exec")
        return [(file, code)]
    return []


def passes(mutant: Mutant) -> bool:
    """Whether the tests of its folder pass with a mutant, those of its file run first."""
    file, code = mutant
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXCPU, lambda *_: pytest.exit("never ends"))
    folder = ROOT / "tests" / file.parent.name
    tests = [str(path) for path in (folder / f"test_{file.stem}.py", folder) if path.exists()]
    with (
        tempfile.TemporaryDirectory() as copy,
        open(os.devnull, "w") as silence,
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
    ):
        shutil.copytree(ROOT / "ghostlib", f"{copy}/ghostlib")
        (copy / file.relative_to(ROOT)).write_text(code)
        sys.path.insert(0, copy)
        return pytest.main([*TESTS, "--hypothesis-profile=mutation", *tests]) == 0


def libraries(file: Path) -> list[str]:
    """The modules, other than the package's, that the tests import; none if one fails."""
    passed = passes((file, file.read_text()))
    return [name for name in sys.modules if "ghostlib" not in name] if passed else []


def survey(folder: str, sample: int | None) -> None:
    """Print the survivors of a folder and a line of numbers; exit if the tests fail as they are."""
    begin, every, fork = time.perf_counter(), mutants(folder), get_context("fork")
    with fork.Pool(1) as pool:
        names = pool.apply(libraries, (every[0][0],))
    if not names:
        sys.exit(f"{folder}: its tests fail without a mutant")
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    random.Random(0).shuffle(every)
    programs = (mutant for place in every for mutant in mutate(*place))
    chosen = list(itertools.islice(programs, sample))
    survivors = 0
    with fork.Pool(maxtasksperchild=1) as pool:
        for file, code in itertools.compress(chosen, pool.imap(passes, chosen)):
            survivors += 1
            before, name = file.read_text().splitlines(), str(file.relative_to(ROOT))
            change = difflib.unified_diff(before, code.splitlines(), name, name, n=0, lineterm="")
            print("\n".join(change), flush=True)
    print(
        f"{folder}: {len(chosen)} of {len(every)} mutants, {survivors} survive "
        f"({1 - survivors / len(chosen):.0%} killed), {time.perf_counter() - begin:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    parser.add_argument("--sample", type=int, help="mutants of each folder [all]")
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    warnings.simplefilter("error", SyntaxWarning)  # `x is "block"` is no program either
    for folder in options.folders:
        survey(folder, options.sample)
