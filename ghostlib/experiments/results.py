"""Results: an append-only file of JSON lines, one for each finished cell, that any run can resume.

A line of kind ``"specification"`` holds the settings that determine the numbers, one of kind
``"environment"`` versions and hardware; all other lines refer to both by id. Lines of kind
``"file"`` hold digests of the local files that were read. Files of several runs, shards or seeds
are joined by ``cat``; `read_results` returns their union.
"""

import errno
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ghostlib.common import checked, nearest_existing, versions, warn

Record = dict[str, Any]

# The fields that identify a record of each kind.
_KEYS = {
    "specification": ("id",),
    "environment": ("id",),
    "file": ("specification", "field", "name", "digest"),
    "selection": ("specification", "criterion", "n"),
    "choice": ("specification", "layers", "recipe"),
    "score": ("specification", "layers", "operator", "measure", "dataset"),
    "skipped": ("specification", "layers", "operator", "dataset"),
}
_PACKAGES = ("ghostlib", "torch", "transformers", "datasets", "numpy", "scipy", "lm-eval")


class Results:
    """Records of a results file, open for appending; see `read_results` for reading.

    Several processes may append to one file: each takes a lock, reads what the others appended,
    and writes whole lines for cells that are still missing. The first append creates the file, so
    that a refused run leaves nothing.

    Attributes:
        path: the file; it need not exist yet.
        records: records by key, in the order of the file.
    """

    @checked
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.records: dict[tuple[Any, ...], Record] = {}
        self._header: list[Record] = []
        self._offset = self._lines = 0
        self._lock_file = self.path.parent / f".{self.path.name}.lock"

    def of(self, kind: str) -> list[Record]:
        """The records of one kind: ``"score"``, ``"selection"``, ``"choice"``, ``"skipped"`` …"""
        return [record for key, record in self.records.items() if key[0] == kind]

    def get(self, kind: str, *key: Any) -> Record | None:
        """A record of the specification that `begin` set, by the rest of its key."""
        return self.records.get((kind, self._header[0]["id"], *key))

    def expect(self, identity: Mapping[str, Any]) -> None:
        """Read the file, and refuse one of another specification.

        Args:
            identity: the specification, or the part that is known before the model is loaded.

        Raises:
            ValueError: a file of another specification (the message names the first difference),
                or a file of another kind.
            OSError: the file cannot be written.
        """
        place = nearest_existing(self.path)
        fit = place.is_file() if place == self.path else place.is_dir()
        if not fit or not os.access(place, os.W_OK):
            raise PermissionError(f"{self.path} cannot be written ({place}): name another file")
        self.refresh()
        stored, new = self.of("specification"), _plain(identity)
        differences = [[k for k, v in new.items() if old.get(k) != v] for old in stored]
        if differences and all(differences):
            name, *others = differences[0]
            raise ValueError(
                f"{self.path} has results of another specification: {name} = "
                f"{stored[0].get(name)!r} there, {new[name]!r} now"
                + f" and {len(others)} more" * bool(others)
                + "; name another file"
            )

    def begin(
        self, specification: Mapping[str, Any], files: Iterable[Mapping[str, str]] = ()
    ) -> None:
        """As `expect`; later records are of this specification and environment.

        Args:
            files: local files, from `Specification.files`; one whose digest differs from the
                records of this specification is refused.
        """
        self.expect(specification)
        self._header = []
        for kind, content in (("specification", specification), ("environment", environment())):
            digest = hashlib.sha256(_json(dict(sorted(content.items()))).encode()).hexdigest()
            self._header.append({"kind": kind, "id": digest[:12], **_plain(content)})
        for file in files:
            record = {"kind": "file", "specification": self._header[0]["id"], **file}
            stored = [each for each in self.of("file") if _key(each)[:-1] == _key(record)[:-1]]
            if stored not in ([], [record]):
                raise ValueError(
                    f"{self.path} has results of another {file['field']} file {file['name']!r}: "
                    "give the one they were made with, or name another output"
                )
            self._header.append(record)
        if self.records:
            self._append(self._header[0])  # where its line was damaged

    def append(self, kind: str, **content: Any) -> None:
        """Write one finished record, unless the file has it.

        Raises:
            ValueError: a number that is not finite, or anything else that JSON cannot hold.
            OSError: the file cannot be written, as on a full disk; it stays unchanged.
        """
        ids = {header["kind"]: header["id"] for header in self._header[:2]}
        self._append(_plain({"kind": kind, **ids, **content}))

    def _append(self, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if _key(record) not in self.records:
                lines = {_key(each): each for each in (*self._header, record)}
                self._write([each for key, each in lines.items() if key not in self.records])

    def refresh(self) -> None:
        """Read the lines that this or another process has appended."""
        if self.path.exists():
            with self._locked():
                pass

    def close(self) -> None:
        """Remove the lock file."""
        # A process that waits for it may then write at the same time as another. Lines are
        # appended whole, so the worst is a repeated cell, of which readers take the first.
        with suppress(OSError):
            self._lock_file.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, with the whole file read."""
        with FileLock(self._lock_file):
            if self.path.exists():
                with self.path.open("rb") as file:
                    file.seek(self._offset)
                    self.read(file.read())
            yield

    def read(self, data: bytes) -> None:
        """Add the records in lines of a results file.

        Raises:
            ValueError: a file of another kind.

        Warns:
            UserWarning: a damaged or torn line; it is left out, and its cell computed again.
        """
        self._offset += len(data)
        damaged: list[tuple[int, Exception]] = []
        for number, line in enumerate(data.split(b"\n"), start=self._lines + 1):
            try:
                record = json.loads(line, parse_constant=int)  # which refuses NaN and Infinity
                self.records.setdefault(_key(record), record)
            except (ValueError, KeyError, TypeError) as error:
                if line.strip():
                    damaged.append((number, error))
        if damaged and not self.records and not data.startswith(b'{"kind":'):
            raise ValueError(f"{self.path} is no results file: name another path")
        for number, reason in damaged:
            warn(
                f"{self.path}, line {number} is damaged ({reason!r}): it is left out, and its cell "
                "computed again"
            )
        self._lines += data.count(b"\n")

    def _write(self, records: list[Record]) -> None:
        """Append records in one piece, or leave the file as it was."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            lines = "\n" * torn + "".join(_json(record) + "\n" for record in records)
            data = lines.encode("utf-8")
            if os.write(file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        except OSError as error:
            os.ftruncate(file, size)
            raise OSError(
                error.errno,
                f"{error.strerror}: {self.path} could not be written and stays as it was; make "
                "room and run again to resume",
            ) from error
        finally:
            os.close(file)
        self.read(data)


@checked
def read_results(path: str | os.PathLike[str]) -> Results:
    """Read a results file, or several that were joined by ``cat``.

    Raises:
        ValueError: a file of another kind.
        OSError: the file does not exist or cannot be read.

    Warns:
        UserWarning: a damaged line, which is left out.
    """
    results = Results(path)
    results.read(results.path.read_bytes())
    return results


def environment() -> Record:
    """Versions, hardware and, in a git checkout of this package, its commit."""
    import torch

    packages = {"python": platform.python_version()} | versions(*_PACKAGES)
    packages["torch"] = str(torch.__version__)  # with its build: +cpu, +cu130
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}
    hardware["threads"] = torch.get_num_threads()
    return {"versions": packages, "hardware": hardware, "commit": _commit()}


def _commit() -> str | None:
    """The commit this module is checked out at, marked if files have changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for command in (tracked, describe):
            process = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


def _key(record: Record) -> tuple[Any, ...]:
    """The key of a record; `KeyError` or `TypeError` if it is invalid."""
    return record["kind"], *(record[field] for field in _KEYS[record["kind"]])


def _plain(value: Any) -> Any:
    """``value`` after a round trip through JSON: tuples, arrays and tensors become lists."""
    return json.loads(_json(value))


def _json(value: Any) -> str:
    try:
        return json.dumps(
            value,
            default=lambda array: array.tolist(),  # of NumPy and torch
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"a record must be finite numbers and text ({error})") from None
