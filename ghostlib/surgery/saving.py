"""Saving: a folder with a model and its card that other programs can load, written in one step.

A repair of existing weights keeps the stock class and loads without this package. A repair with a
module at the boundary has a model type of its own, which does not load without this package unless
the folder has a file of code for ``trust_remote_code=True``.
"""

import html
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import checked, nearest_existing, one_line, versions
from ghostlib.models.architectures import check_model, weight_bytes
from ghostlib.models.boundaries import spell
from ghostlib.surgery.ghosted import GhostedMixin, atomic_folder, check_new
from ghostlib.surgery.portable import write_portable

_OVERHEAD = 64 * 2**20  # bytes of tokenizer, card and configuration


@checked
def save(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    portable: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Save a recovered model with its tokenizer, generation settings and a model card.


    Args:
        model: what `recover`, `install` or `prune` returned.
        folder: must be new or empty; it appears when everything has been written.
        tokenizer: saved with the model.
        portable: for a repair with a module at the boundary, add the code that loads it without
            this package under ``trust_remote_code=True``. Other repairs need none.
        facts: for the card: ``base_model``, ``license``, ``perplexity`` (a mapping such as
            ``{"dense": 12.1, "recovered": 17.3}``), ``abilities`` (a `Profile` compared with the
            dense model), ``text``, ``tokens``, ``seed`` …

    Returns:
        The folder.

    Raises:
        ValueError: ``model`` is not a causal language model.
        FileExistsError: the folder is a file, or is not empty.
        OSError: the folder cannot be written, or the disk has too little room; nothing remains.
    """
    check_model(model)
    target = Path(folder).expanduser()
    check_output(target, bytes_needed=weight_bytes(model))
    with atomic_folder(target.absolute()) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if portable and isinstance(model, GhostedMixin):
            write_portable(model, temporary)
        card = model_card(model, facts or {}, name=target.name, portable=portable)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return target


def check_output(folder: str | os.PathLike[str], *, bytes_needed: int = 0) -> None:
    """Refuse an output folder that cannot be written, before any work is done for it.

    Args:
        bytes_needed: size of the weights that will be written.

    Raises:
        FileExistsError: the folder is a file, or is not empty.
        NotADirectoryError: one of its parents is a file.
        PermissionError: its nearest existing parent cannot be written.
        OSError: the disk has too little room; the message has both sizes.
    """
    target = Path(folder).expanduser()
    check_new(target)
    parent = nearest_existing(target.absolute().parent)
    if not parent.is_dir():
        raise NotADirectoryError(f"output folder {target}: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"output folder {target}: {parent} cannot be written")
    free, needed = shutil.disk_usage(parent).free, bytes_needed + _OVERHEAD if bytes_needed else 0
    if free < needed:
        raise OSError(
            f"output folder {target} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
            "make room, or name a folder on another disk"
        )


def model_card(
    model: PreTrainedModel, facts: Mapping[str, Any], *, name: str, portable: bool = False
) -> str:
    """README of a saved model: YAML front matter, removed layers, repairs, and how to load it.

    Args:
        model: a recovered model, described by its ``config.recovery``.
        facts: as in `save`; all are optional.
        name: name of the folder, for the code that loads it.
        portable: whether the folder has its own code.
    """
    record = getattr(model.config, "recovery", {"removed": [], "repairs": []})
    metadata = ModelCardData(
        base_model=facts.get("base_model"),
        license=facts.get("license"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["layer-pruning", "ghosted-layers"],
    )
    removed = record["removed"]
    summary = (
        f"Decoder layers {spell(removed)} of the dense model are removed (counted from 0). "
        "Each gap is repaired in closed form (Ghosted Layers, arXiv 2605.15491):"
        if removed
        else "No decoder layer of the dense model is removed."
    )
    heading = f"# {_safe(facts.get('base_model') or name)}, {len(removed)} decoder layers removed"
    lines = [heading, "", summary, ""]
    for repair in record["repairs"]:
        start, stop = repair["boundary"]
        reads = f", solved from `{repair['reads']}`" if "reads" in repair else ""
        lines.append(f"- layers {spell(range(start, stop))}: `{repair['operator']}`{reads}")
    lines.append("")
    for key, value in facts.items():
        if key not in ("base_model", "license", "perplexity", "abilities"):
            lines.append(f"- {_safe(key.replace('_', ' '))}: {_safe(value)}")
    made_with = ", ".join(map(" ".join, versions("ghostlib", "torch", "transformers").items()))
    lines.append(f"- versions: {made_with}")
    if facts.get("perplexity"):
        lines += ["", "| model | held-out perplexity |", "|---|---|"]
        lines += [f"| {_safe(key)} | {value:.2f} |" for key, value in facts["perplexity"].items()]
    if facts.get("abilities"):
        lines += ["", *_abilities(facts["abilities"])]
    lines += ["", *_loading(model, name, portable)]
    lines += ["", "```json", json.dumps(record, indent=1), "```", ""]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines)


def _abilities(profile: Any) -> list[str]:
    """Lost abilities, and the table of all, of a `Profile`."""
    lines = [f"**{text[0].upper()}{text[1:]}.**" for text in profile.lost]
    lines += ["", "| ability | dense | this model | unit | verdict |", "|---|---|---|---|---|"]
    for a in profile.abilities.values():
        dense = "" if a.dense is None else f"{a.dense:.2f}"
        lines.append(f"| {a.probe} | {dense} | {a.score:.2f} | {a.unit} | {a.verdict} |")
    return [*lines, *(f"- not asked: {name}, it {why}" for name, why in profile.left_out.items())]


def _loading(model: PreTrainedModel, name: str, portable: bool) -> list[str]:
    imports, option = [], ""
    if isinstance(model, GhostedMixin):
        option = ", trust_remote_code=True" if portable else ""
        imports = [] if portable else ["import ghostlib  # registers the repaired class", ""]
    load = f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}{option})"
    return ["```python", *imports, "from transformers import AutoModelForCausalLM", "", load, "```"]


def _safe(text: object) -> str:
    """``text`` in one line of Markdown, with HTML escaped."""
    return html.escape(one_line(text), quote=False)
