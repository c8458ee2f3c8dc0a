"""Mutants of the mathematics, and which of them the tests do not notice.

    tools/mutation.py [FOLDER ...] [--sample N] [--seed N] [--jobs N]

The mutants are Cosmic Ray's: arithmetic, comparisons, constants, conditions, loops. Each runs the
tests of its own folder, without the embedded model, in a fork of a process that has imported all
that they import but the package itself, so that a mutant takes about as long as the tests that
kill it. The files stay as they are: the fork imports a copy of the package with the change.
"""

import argparse
import contextlib
import importlib
import itertools
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).parents[1]
FOLDERS = ("linalg", "statistics", "operators", "selection")
# Decorators, annotations and kinds of exceptions; and what bits make of a float, always an error.
ASIDE = ("Bit", "Shift", "RemoveDecorator", "ExceptionReplacer", "Variable")
TESTS = ["-x", "-q", "-p", "no:cacheprovider", "--thorough", "-m", "not embedded and not slow"]
OPERATORS = OperatorProvider()
# The first example that fails is enough: none is made smaller, or kept.
hypothesis.settings.register_profile(
    "mutation", deadline=None, database=None, derandomize=True, phases=[hypothesis.Phase.generate]
)


class Mutant(NamedTuple):
    """One change of one file."""

    file: Path
    operator: str
    occurrence: int

    def source(self) -> str:
        """The file with the change."""
        operator = OPERATORS[self.operator]()
        code: str = mutate_code(self.file.read_text(), operator, self.occurrence)
        return code

    def compiles(self) -> bool:
        """Whether it is a program: the star of keyword-only arguments is taken for a product."""
        with contextlib.suppress(SyntaxError):
            return bool(compile(self.source(), self.file, "exec"))
        return False

    def __str__(self) -> str:
        before, after = self.file.read_text().splitlines(), self.source().splitlines()
        pairs = enumerate(zip(before, after, strict=False), 1)
        number, (old, new) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        return f"{self.file.relative_to(ROOT)}:{number}: {old.strip()}  →  {new.strip()}"


def mutants(folder: str) -> list[Mutant]:
    """Every mutant of a folder of the package, but those that are `ASIDE`."""
    found = []
    for file in sorted((ROOT / "ghostlib" / folder).glob("*.py")):
        nodes = list(ast_nodes(get_ast(file.read_text())))
        for name in OPERATORS:
            if not any(part in name for part in ASIDE):
                operator = OPERATORS[name]()
                places = [place for node in nodes for place in operator.mutation_positions(node)]
                found += [Mutant(file, name, k) for k in range(len(places))]
    return found


def passes(folder: str, limit: int, mutant: Mutant) -> bool:
    """Whether the tests of a folder pass with a mutant in place, in ``limit`` seconds of a core."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(ROOT / "ghostlib", f"{copy}/ghostlib")
        (copy / mutant.file.relative_to(ROOT)).write_text(mutant.source())
        child = os.fork()
        if not child:
            passed = False
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
                sys.path.insert(0, copy)
                passed = run(folder, mutant.file.stem)
            finally:
                os._exit(not passed)
        return os.waitpid(child, 0)[1] == 0


def run(folder: str, first: str) -> bool:
    """Whether the tests of a folder pass, those of the file named ``first`` before the others."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    tests = ROOT / "tests" / folder
    named = [str(file) for file in (tests / f"test_{first}.py", tests) if file.exists()]
    return pytest.main([*TESTS, "--hypothesis-profile=mutation", *named]) == 0


def unchanged(folder: str) -> tuple[bool, float, list[str]]:
    """Whether the tests pass as it is, their seconds of a core, and what they import."""
    return run(folder, ""), time.process_time(), [m for m in sys.modules if "ghostlib" not in m]


def survey(folder: str, options: argparse.Namespace) -> None:
    """Print the survivors of a folder, and a line of numbers; ends where tests fail as it is."""
    begin, every, fork = time.perf_counter(), mutants(folder), get_context("fork")
    with fork.Pool(1) as pool:
        passed, seconds, imported = pool.apply(unchanged, (folder,))
    if not passed:
        sys.exit(f"{folder}: its tests fail without a mutant")
    for name in imported:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    random.Random(options.seed).shuffle(every)
    chosen = list(itertools.islice(filter(Mutant.compiles, every), options.sample))
    survivors = 0
    with fork.Pool(options.jobs) as pool:
        results = pool.imap(partial(passes, folder, 30 + 4 * int(seconds)), chosen)
        for mutant in itertools.compress(chosen, results):
            survivors += 1
            print(mutant, flush=True)
    print(
        f"{folder}: {len(chosen)} of {len(every)} mutants, {survivors} survive "
        f"({1 - survivors / len(chosen):.0%} killed), {time.perf_counter() - begin:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    parser.add_argument("--sample", type=int, help="so many of each folder [all]")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    warnings.simplefilter("error", SyntaxWarning)  # `x is "block"` is no program either
    for folder in options.folders:
        survey(folder, options)
