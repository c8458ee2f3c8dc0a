"""Saving: a folder that other programs can load, whole or not at all, with a model card.

A repair that lives in weights that were there before leaves the stock class, and is saved as such:
standard file names, no trace of this package needed to load it. One with a module at the boundary
is saved under a model type of its own, which fails loudly without this package; or, on request,
together with one readable file of code that ``trust_remote_code=True`` loads.
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

from ghostlib.common import checked, existing, one_line, versions
from ghostlib.models.architectures import check_model, weight_bytes
from ghostlib.models.boundaries import spell
from ghostlib.surgery.ghosted import GhostedMixin, check_new, whole
from ghostlib.surgery.portable import write_portable

_ROOM = 64 * 2**20  # bytes beside the weights: tokenizer, card, configuration


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

    Everything is written into a folder beside the new one and renamed when it is complete.

    Args:
        model: what `recover`, `install` or `prune` returned.
        folder: must not exist yet, or be empty.
        tokenizer: saved with the model, if given.
        portable: for a repair with a module at the boundary, add the code that loads it without
            this package under ``trust_remote_code=True``. Other repairs need none.
        facts: for the card: ``base_model``, ``license``, ``perplexity`` (a mapping such as
            ``{"dense": 12.1, "recovered": 17.3}``), ``abilities`` (a `Profile` compared with the
            dense model), ``text``, ``tokens``, ``seed`` …

    Returns:
        The folder.

    Raises:
        ValueError: it is no causal language model.
        FileExistsError: the folder is a file, or holds something already.
        OSError: it cannot be written, or the disk has less room than the weights need; nothing is
            left behind.
    """
    check_model(model)
    target = Path(folder).expanduser()
    check_output(target, bytes_needed=weight_bytes(model))
    with whole(target.absolute()) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if portable and isinstance(model, GhostedMixin):
            write_portable(model, temporary)
        card = model_card(model, facts or {}, name=target.name, portable=portable)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return target


def check_output(folder: str | os.PathLike[str], *, bytes_needed: int = 0) -> None:
    """Refuse an output folder that could not be written, before any work is done for it.

    Args:
        bytes_needed: size of the weights that will be written.

    Raises:
        FileExistsError: the folder is a file, or holds something already.
        NotADirectoryError: something above it is a file.
        PermissionError: the nearest existing folder above it cannot be written.
        OSError: the disk has less room than is needed; the message has both numbers.
    """
    target = Path(folder).expanduser()
    check_new(target)
    above = existing(target.absolute().parent)
    if not above.is_dir():
        raise NotADirectoryError(f"output folder {target}: {above} is a file")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"output folder {target}: {above} cannot be written")
    free, needed = shutil.disk_usage(above).free, bytes_needed + _ROOM if bytes_needed else 0
    if free < needed:
        raise OSError(
            f"output folder {target} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
            "make room, or name a folder on another disk"
        )


def model_card(
    model: PreTrainedModel, facts: Mapping[str, Any], *, name: str, portable: bool = False
) -> str:
    """The README of a saved model: YAML front matter, what was done, and how to load it.

    Args:
        model: a recovered model, whose ``config.recovery`` says what was done.
        facts: as in `save`; what is not given is not claimed.
        name: of the folder, for the lines that load it.
        portable: whether the folder holds its own code.
    """
    record = getattr(model.config, "recovery", {"removed": [], "repairs": []})
    front = ModelCardData(
        base_model=facts.get("base_model"),
        license=facts.get("license"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["layer-pruning", "ghosted-layers"],
    )
    removed = record["removed"]
    done = (
        f"Decoder layers {spell(removed)} of the dense model are removed (counted from 0). "
        "Each gap is repaired in closed form (Ghosted Layers, arXiv 2605.15491):"
        if removed
        else "No decoder layer of the dense model is removed."
    )
    heading = f"# {_safe(facts.get('base_model') or name)}, {len(removed)} decoder layers removed"
    lines = [heading, "", done, ""]
    for repair in record["repairs"]:
        start, stop = repair["boundary"]
        reads = f", solved from `{repair['reads']}`" if "reads" in repair else ""
        lines.append(f"- layers {spell(range(start, stop))}: `{repair['operator']}`{reads}")
    apart = ("base_model", "license", "perplexity", "abilities")
    shown = {k: v for k, v in facts.items() if k not in apart}
    made_with = ", ".join(map(" ".join, versions("ghostlib", "torch", "transformers").items()))
    lines += [
        "",
        *(f"- {_safe(key.replace('_', ' '))}: {_safe(value)}" for key, value in shown.items()),
    ]
    lines += [f"- versions: {made_with}"]
    if facts.get("perplexity"):
        lines += ["", "| model | held-out perplexity |", "|---|---|"]
        lines += [f"| {_safe(who)} | {value:.2f} |" for who, value in facts["perplexity"].items()]
    if facts.get("abilities"):
        lines += ["", *_abilities(facts["abilities"])]
    lines += ["", *_loading(model, name, portable)]
    lines += ["", "```json", json.dumps(record, indent=1), "```", ""]
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n".join(lines)


def _abilities(profile: Any) -> list[str]:
    """What the repair gave back, as a `Profile` says it; what was lost first."""
    lines = [f"**{text[0].upper()}{text[1:]}.**" for text in profile.lost]
    lines += ["", "| ability | dense | this model | unit | verdict |", "|---|---|---|---|---|"]
    for one in profile.abilities.values():
        dense = "" if one.dense is None else f"{one.dense:.2f}"
        lines.append(f"| {one.probe} | {dense} | {one.score:.2f} | {one.unit} | {one.verdict} |")
    return [*lines, *(f"- not asked: {name}, it {why}" for name, why in profile.left_out.items())]


def _loading(model: PreTrainedModel, name: str, portable: bool) -> list[str]:
    first, option = [], ""
    if isinstance(model, GhostedMixin) and portable:
        option = ", trust_remote_code=True"
    elif isinstance(model, GhostedMixin):
        first = ["import ghostlib  # registers the repaired class", ""]
    load = f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}{option})"
    return ["```python", *first, "from transformers import AutoModelForCausalLM", "", load, "```"]


def _safe(text: object) -> str:
    """A name in Markdown, which a browser shows: no element of HTML, in one line."""
    return html.escape(one_line(text), quote=False)
