"""Loading: a model and its tokenizer, embedded or by name."""

import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import CONFIG_NAME
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from ghostlib.common import checked, hub_trouble, one_line, shown, without_retries
from ghostlib.models.architectures import structure
from ghostlib.models.placement import check_device
from ghostlib.text.assets import embedded_model_dir

EMBEDDED = "smollm2"
DTYPES = ("float32", "bfloat16", "float16", "float64")
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def check_source(
    name: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | dict[str, Any] | None = None,
) -> str:
    """Check the arguments of `load_model` before loading; ``device`` may be a ``device_map``.

    Returns:
        ``name``, with ``~`` expanded.

    Raises:
        FileNotFoundError: ``name`` is spelt as a path, and there is no such folder.
        ValueError: ``name`` is neither a path nor a hub id, or the dtype or device is unknown.
    """
    text, folder = one_line(name), os.path.expanduser(name)
    if not os.path.isdir(folder):
        if isinstance(name, Path) or name.startswith((".", "/", "~", "\\")):
            raise FileNotFoundError(f"no such model folder: {text}")
        if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name):
            raise ValueError(f"model {text!r} is neither a folder nor an id of the hub (org/name)")
    if isinstance(dtype, str) and dtype not in (*DTYPES, "auto"):
        raise ValueError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    if isinstance(device, str) and device not in STRATEGIES:
        check_device(device)
    return str(folder)


def check_reachable(name: str) -> None:
    """Raise early if ``name`` is a hub id that is not in the cache and the hub is unreachable.

    Raises:
        ConnectionError: the hub cannot be reached; without a minute of retries.
    """
    if name == EMBEDDED or os.path.isdir(name) or try_to_load_from_cache(name, CONFIG_NAME):
        return
    if trouble := hub_trouble():
        raise ConnectionError(
            f"model {name!r} is neither a local folder nor in the cache, and the Hugging Face hub "
            f"cannot be reached ({trouble}): check the name or the network"
        )


@checked
def load_model(
    name: str | Path = EMBEDDED,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        name: ``"smollm2"`` for the embedded SmolLM2-135M-Instruct (float32, fetched once and
            verified), a local folder, or any causal-LM id of the Hugging Face hub.
        dtype: data type of the weights; by default that of the checkpoint (float32 for the
            embedded model).
        device: device of the model; by default that chosen by ``from_pretrained``.
        options: passed on to ``AutoModelForCausalLM.from_pretrained`` (``device_map``, …).

    Raises:
        ValueError: the architecture is not supported, or the dtype or device is unknown.
        OSError: there is no model of that name.
        ConnectionError: a hub id that is not in the cache, and the hub cannot be reached.
        FileNotFoundError: there is no such folder.
    """
    name = check_source(name, dtype, options.get("device_map") if device is None else device)
    check_reachable(name)
    if not shown():
        disable_progress_bar()
    folder = embedded_model_dir() if name == EMBEDDED else name
    with nullcontext() if os.path.isdir(folder) else without_retries():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **options)
    structure(model)
    if device is not None:
        model = model.to(device=device)
    return model.eval(), tokenizer
