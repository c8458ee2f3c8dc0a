"""Mutants of the mathematics, and which of them the tests do not notice.

    tools/mutation.py [FOLDER ...] [--sample N] [--seed N]

The mutants are Cosmic Ray's: arithmetic, comparisons, constants, conditions, loops. Each runs the
tests of its own folder, without the embedded model, in a fork of a process that has imported all
that is slow to import, so that a mutant takes about as long as the tests that kill it. The file
stays as it is: the fork is given the mutated source when it imports it.
"""

import argparse
import importlib.machinery
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers  # noqa: F401 (its import is what takes long)
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).parents[1]
FOLDERS = ("linalg", "statistics", "operators", "selection")
ASIDE = ("BitOr", "RemoveDecorator", "ExceptionReplacer", "Variable")  # how, and not what
TESTS = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not embedded and not slow"]
LIMIT = 300  # seconds of a mutant, on a core: one that loops for ever is noticed


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


def passes(folder: str, mutant: Mutant | None = None) -> bool:
    """Whether the tests of a folder pass, with a mutant in place or without."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        try:
            if mutant is not None:
                _replace(mutant.file, mutant.source().encode())
            status = int(pytest.main([*TESTS, str(ROOT / "tests" / folder)]))
        except BaseException:
            status = 1
        os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def _replace(file: Path, source: bytes) -> None:
    """Let every import of ``file`` in this process read ``source``."""
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
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    for folder in options.folders:
        begin, every = time.perf_counter(), mutants(folder)
        if not passes(folder):
            print(f"{folder}: its tests fail without a mutant")
            return 1
        count = min(options.sample or len(every), len(every))
        chosen = random.Random(options.seed).sample(every, count)
        survivors = 0
        for mutant in chosen:
            if passes(folder, mutant):
                survivors += 1
                print(mutant, flush=True)
        share = 1 - survivors / len(chosen)
        seconds = time.perf_counter() - begin
        print(
            f"{folder}: {len(chosen)} of {len(every)} mutants, {survivors} survive "
            f"({share:.0%} killed), {seconds:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
