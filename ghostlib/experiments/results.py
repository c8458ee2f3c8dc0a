"""Results of a long run in one JSON file, kept cell by cell, so that a stopped run goes on.

A run is a loop over cells, each under a name and each too dear to compute twice:

    results = Results.open("grid.json", {"model": "smollm2", "windows": 16, "seed": 0})
    for n in (3, 5, 7):
        for operator in ("identity", "ghost"):
            results.cell(f"{operator} {n}", partial(score, operator, n))

Killed and started again, it computes the cells that are missing. Settings are whatever decides the
numbers; a file of other settings is refused, never mixed. One process at a time writes to a file.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("ghostlib", "torch", "transformers", "datasets", "numpy", "scipy", "lm-eval")


def environment() -> dict[str, Any]:
    """Versions, hardware and, in a git checkout of this package, the commit of this very run."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"versions": versions, "hardware": hardware | {"gpus": gpus}, "commit": _commit()}


def _cpu() -> str:
    """Name of the processor, where the system tells it."""
    try:
        listed = re.search(r"model name\s*: *(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        listed = None
    return listed[1] if listed else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit this module was checked out at, marked when files have changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    named = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for command in (tracked, named):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


_FORMAT = "ghostlib-results-1"


class Results:
    """Cells of one run; made by `Results.open`.

    Attributes:
        path: the file. settings: what decides the numbers, as JSON gives it back.
        environments: versions, hardware and commit of every run that wrote to the file, in order.
        cells: ``{key: value}``, finished ones.
    """

    def __init__(self, path: Path, settings: Any, environments: Any, cells: Any) -> None:
        self.path = path
        self.settings: dict[str, Any] = settings
        self.environments: list[dict[str, Any]] = environments
        self.cells: dict[str, Any] = cells

    @classmethod
    def open(cls, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> "Results":
        """Start a file of results, or go on with one of the same settings.

        Args:
            path: the file; folders above it are made.
            settings: anything JSON can hold, ``"seed"`` among it (None where nothing is drawn).

        Raises:
            ValueError: no seed, settings that are no JSON, a file of other settings (the message
                names the first difference), or a file that holds something else.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if "seed" not in settings:
            raise ValueError("settings must name the seed: add seed=None where nothing is drawn")
        wanted = _plain(dict(settings), "settings")
        found = cls(path, wanted, [], {})
        if path.exists():
            found = cls(path, *_read(path))
            _same(path, found.settings, wanted)
        here = environment()
        if here not in found.environments:
            found.environments.append(here)
            path.parent.mkdir(parents=True, exist_ok=True)
            found._write()
        return found

    def cell(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value under ``key``: the stored one, or else ``compute()``, stored at once.

        The value comes back as JSON keeps it, the first time too: tuples and arrays as lists,
        dataclasses as dictionaries.

        Raises:
            ValueError: a value that is no valid JSON, such as NaN; it is not stored.
            OSError: the file cannot be written, as on a full disk; the old one stays as it was.
        """
        if key not in self.cells:
            value = _plain(compute(), f"cell {key!r}")
            self.cells[key] = value
            try:
                self._write()
            except BaseException:
                del self.cells[key]
                raise
        return self.cells[key]

    def _write(self) -> None:
        names = ("settings", "environments", "cells")
        whole = {"format": _FORMAT} | {name: getattr(self, name) for name in names}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(whole, file, indent=1, ensure_ascii=False, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: {self.path} could not be written and stays as it was; "
                "make room (or open another path) and run again to go on",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def _plain(value: Any, what: str) -> Any:
    """``value`` as JSON gives it back."""

    def convert(other: Any) -> Any:
        if dataclasses.is_dataclass(other) and not isinstance(other, type):
            return dataclasses.asdict(other)
        return other.tolist()  # NumPy's and torch's

    try:
        return json.loads(json.dumps(value, default=convert, allow_nan=False))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{what} is no valid JSON ({error}): return finite numbers and text"
        ) from None


def _read(path: Path) -> tuple[Any, Any, Any]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["format"] != _FORMAT:
            raise ValueError(f"format {whole['format']!r}")
        return whole["settings"], whole["environments"], whole["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no results file ({type(error).__name__}: {error}): name another path"
        ) from None


def _same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    missing = "(absent)"
    differ = [k for k in {**old, **new} if old.get(k, missing) != new.get(k, missing)]
    if differ:
        key, more = differ[0], f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise ValueError(
            f"{path} has results of other settings: {key} = {old.get(key, missing)!r} there, "
            f"{new.get(key, missing)!r} now{more}; name another path, or delete the file"
        )
