"""Results: an append-only file of JSON lines, one for each finished cell, that any run can resume.

A line of kind ``"specification"`` says what decides the numbers, one of kind ``"environment"`` what
they were computed with; the other lines name both by their ids, and those of kind ``"file"`` have
digests of the local files that were read. So files of several runs, shards or
seeds are joined by ``cat``, and `read_results` takes their union.
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

from ghostlib.common import checked, existing, versions, warn

Record = dict[str, Any]

# What names a record of each kind.
_NAMED_BY = {
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
    """What a results file holds, and the way to append to it; see `read_results` for reading.

    Several processes may append to one file: each takes a lock, reads what the others appended
    and writes whole lines, but no cell that is there by now. The first append makes the file, so
    that a run that is refused leaves nothing behind.

    Attributes:
        path: the file; it need not exist yet.
        records: ``{name: record}``, in the order of the file.
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
        return [record for name, record in self.records.items() if name[0] == kind]

    def get(self, kind: str, *names: Any) -> Record | None:
        """A record of the specification that is appended for, by what names it."""
        return self.records.get((kind, self._header[0]["id"], *names))

    def expect(self, known: Mapping[str, Any]) -> None:
        """Read what there is, and refuse a file of another specification.

        Args:
            known: the specification, or as much of it as is known before the model is loaded.

        Raises:
            ValueError: a file of another specification (the message names the first difference),
                or one that holds something else.
            OSError: the file could not be written in the end.
        """
        place = existing(self.path)
        fit = place.is_file() if place == self.path else place.is_dir()
        if not fit or not os.access(place, os.W_OK):
            raise PermissionError(f"{self.path} cannot be written ({place}): name another file")
        self.refresh()
        stored, wanted = self.of("specification"), _plain(known)
        differ = [[k for k, v in wanted.items() if other.get(k) != v] for other in stored]
        if differ and all(differ):
            name, *more = differ[0]
            raise ValueError(
                f"{self.path} has results of another specification: {name} = "
                f"{stored[0].get(name)!r} there, {wanted[name]!r} now"
                + f" and {len(more)} more" * bool(more)
                + "; name another file"
            )

    def begin(
        self, specification: Mapping[str, Any], files: Iterable[Mapping[str, str]] = ()
    ) -> None:
        """As `expect`; what is appended from now on is of this specification and environment.

        Args:
            files: what `Specification.files` says of local files; one whose digest is another in
                the records of this specification is refused.
        """
        self.expect(specification)
        self._header = []
        for kind, content in (("specification", specification), ("environment", environment())):
            digest = hashlib.sha256(_json(dict(sorted(content.items()))).encode()).hexdigest()
            self._header.append({"kind": kind, "id": digest[:12], **_plain(content)})
        for file in files:
            record = {"kind": "file", "specification": self._header[0]["id"], **file}
            known = [each for each in self.of("file") if _name(each)[:-1] == _name(record)[:-1]]
            if known not in ([], [record]):
                raise ValueError(
                    f"{self.path} has results of another {file['field']} file {file['name']!r}: "
                    "give the one they were made with, or name another output"
                )
            self._header.append(record)
        if self.records:
            self._put(self._header[0])  # where its line was damaged

    def append(self, kind: str, **content: Any) -> None:
        """Write one finished record, unless the file has it by now.

        Raises:
            ValueError: a number that is not finite, or anything else that JSON cannot hold.
            OSError: the file cannot be written, as on a full disk; it stays as it was.
        """
        ids = {header["kind"]: header["id"] for header in self._header[:2]}
        self._put(_plain({"kind": kind, **ids, **content}))

    def _put(self, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if _name(record) not in self.records:
                wanted = {_name(each): each for each in (*self._header, record)}
                self._write([each for name, each in wanted.items() if name not in self.records])

    def refresh(self) -> None:
        """Read what has been appended, by this process or another."""
        if self.path.exists():
            with self._locked():
                pass

    def close(self) -> None:
        """Remove the lock file, all that a run leaves beside its results."""
        # A process waiting for it just now may then write beside another. Lines are appended
        # whole, so the worst is a cell that stands twice, of which readers take the first.
        with suppress(OSError):
            self._lock_file.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the file, all of it read."""
        with FileLock(self._lock_file):
            if self.path.exists():
                with self.path.open("rb") as file:
                    file.seek(self._offset)
                    self.read(file.read())
            yield

    def read(self, data: bytes) -> None:
        """Take in lines of a results file.

        Raises:
            ValueError: it is something else.

        Warns:
            UserWarning: a damaged or torn line; it is left out, and its cell computed again.
        """
        self._offset += len(data)
        damaged: list[tuple[int, Exception]] = []
        for number, line in enumerate(data.split(b"\n"), start=self._lines + 1):
            try:
                record = json.loads(line, parse_constant=int)  # which refuses NaN and Infinity
                self.records.setdefault(_name(record), record)
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
    """A results file, for reading; also several that were joined by ``cat``.

    Raises:
        ValueError: a file that holds something else.
        OSError: no such file, or one that cannot be read.

    Warns:
        UserWarning: a damaged line, which is left out.
    """
    results = Results(path)
    results.read(results.path.read_bytes())
    return results


def environment() -> Record:
    """Versions, hardware and, in a git checkout of this package, the commit of this very run."""
    import torch

    made_with = {"python": platform.python_version()} | versions(*_PACKAGES)
    made_with["torch"] = str(torch.__version__)  # with its build: +cpu, +cu130
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}
    hardware["threads"] = torch.get_num_threads()
    return {"versions": made_with, "hardware": hardware, "commit": _commit()}


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


def _name(record: Record) -> tuple[Any, ...]:
    """What names a record; `KeyError` or `TypeError` if it is none."""
    return record["kind"], *(record[name] for name in _NAMED_BY[record["kind"]])


def _plain(value: Any) -> Any:
    """``value`` as JSON gives it back: tuples, arrays and tensors as lists."""
    return json.loads(_json(value))


def _json(value: Any) -> str:
    try:
        return json.dumps(
            value,
            default=lambda array: array.tolist(),  # NumPy's and torch's
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"a record must be finite numbers and text ({error})") from None
