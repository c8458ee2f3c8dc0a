"""Mutants of the mathematics, and which of them the tests do not notice.

    tools/mutation.py [FOLDER ...] [--sample N] [--seed N] [--jobs N]

The mutants are Cosmic Ray's: arithmetic, comparisons, constants, conditions, loops. Each runs the
tests of its own folder, without the embedded model, in a fork of a process that has imported all
that they import but the package itself, so that a mutant takes about as long as the tests that
kill it. The file stays as it is: the fork is given the mutated source when it imports it.
"""

import argparse
import contextlib
import importlib
import importlib.machinery
import itertools
import os
import random
import resource
import sys
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
TESTS = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not embedded and not slow"]
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
        code = mutate_code(self.file.read_text(), _operator(self.operator), self.occurrence)
        assert code is not None
        return str(code)

    def compiles(self) -> bool:
        """Whether it is a program: the star of keyword-only arguments is taken for a product."""
        with contextlib.suppress(SyntaxError):
            return bool(compile(self.source(), self.file, "exec"))
        return False

    def __str__(self) -> str:
        before, after = self.file.read_text().splitlines(), self.source().splitlines()
        lines = zip(range(1, len(before) + 1), before, after, strict=False)
        number, old, new = next(line for line in lines if line[1] != line[2])
        return f"{self.file.relative_to(ROOT)}:{number}: {old.strip()}  →  {new.strip()}"


def _operator(name: str) -> object:
    return OperatorProvider()[name]()


def mutants(folder: str) -> list[Mutant]:
    """Every mutant of a folder of the package, but those that are `ASIDE`."""
    found = []
    for file in sorted((ROOT / "ghostlib" / folder).glob("*.py")):
        nodes = list(ast_nodes(get_ast(file.read_text())))
        for name in OperatorProvider():
            if not any(part in name for part in ASIDE):
                operator = _operator(name)
                places = [p for node in nodes for p in operator.mutation_positions(node)]  # type: ignore[attr-defined]
                found += [Mutant(file, name, k) for k in range(len(places))]
    return found


def passes(folder: str, limit: int, mutant: Mutant) -> bool:
    """Whether the tests of a folder pass with a mutant in place, in ``limit`` seconds of a core."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        try:
            _replace(mutant.file, mutant.source().encode())
            passed = run(folder, mutant.file.stem)
        except BaseException:
            passed = False
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


def _replace(file: Path, source: bytes) -> None:
    """Let every import of ``file`` in this process read ``source``, and no other process."""
    sys.dont_write_bytecode = True
    read = importlib.machinery.SourceFileLoader.get_data

    def get_data(self: importlib.machinery.SourceFileLoader, path: str) -> bytes:
        if Path(path).name.startswith(f"{file.stem}.") and path.endswith(".pyc"):
            raise OSError("not the compiled one")
        return source if path == str(file) else read(self, path)

    importlib.machinery.SourceFileLoader.get_data = get_data  # type: ignore[method-assign, assignment]


def main() -> int:
    """Print the survivors and a line for each folder; the status is 1 where tests fail as it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    parser.add_argument("--sample", type=int, help="so many of each folder [all]")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    warnings.simplefilter("error", SyntaxWarning)  # `x is "block"` is no program either
    fork = get_context("fork")
    for folder in options.folders:
        begin, every = time.perf_counter(), mutants(folder)
        with fork.Pool(1) as pool:
            passed, seconds, imported = pool.apply(unchanged, (folder,))
        if not passed:
            print(f"{folder}: its tests fail without a mutant")
            return 1
        for name in imported:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        random.Random(options.seed).shuffle(every)
        chosen = list(itertools.islice(filter(Mutant.compiles, every), options.sample))
        survivors = 0
        with fork.Pool(options.jobs) as pool:
            results = pool.imap(partial(passes, folder, 30 + 4 * int(seconds)), chosen)
            for mutant, survives in zip(chosen, results, strict=True):
                if survives:
                    survivors += 1
                    print(mutant, flush=True)
        print(
            f"{folder}: {len(chosen)} of {len(every)} mutants, {survivors} survive "
            f"({1 - survivors / len(chosen):.0%} killed), {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
