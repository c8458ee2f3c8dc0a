"""Cost of a recovery, estimated before it starts: bytes to download, memory and time.

Bytes are counted on a model without weights, from its configuration. Seconds are operations divided
by the rate at which this device multiplies matrices of the model's size, which takes a moment.
"""

import os
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ghostlib.common import AUTO, nearest_existing, shown
from ghostlib.evaluation.cost import count_parameters, flops
from ghostlib.models.architectures import hidden_size, num_layers, text_config, weight_bytes
from ghostlib.models.boundaries import contiguous, runs
from ghostlib.models.loading import EMBEDDED, check_reachable
from ghostlib.operators.families import Family
from ghostlib.recovery.recipe import BUDGETS, TRIES, shortlisted
from ghostlib.selection.criteria import CRITERIA, needed_boundaries
from ghostlib.statistics.calibration import available_bytes, calibration_bytes, readable
from ghostlib.surgery.cut import check_dense
from ghostlib.text.assets import MODEL, cache_dir

_WHEEL = 98_000_000  # of the embedded model
_PROCESS = 600_000_000  # Python with torch and transformers, or a CUDA context
_CHUNK = 256  # positions whose logits exist at once, see `window_losses`
_SOLVE = 25  # C^3 float64 operations of a solution: decomposition, products
_UTILISATION = 0.75  # rate of a whole pass over that of one large product
_SECONDS = 0.2  # of each measurement of a rate


@dataclass(frozen=True)
class Plan:
    """Estimated cost of a recovery.

    Attributes:
        download: bytes of weights to download.
        memory: peak bytes on the device, by purpose.
        available: bytes free on the device.
        seconds: duration of each step, in order.
        spread: whether weights are spread over devices, memory and disk, and need not fit on one.
        device: where the model will be.
        removed: number of removed layers.
        parameters: number of parameters of the dense model.
    """

    download: int
    memory: Mapping[str, int]
    available: int
    seconds: Mapping[str, float]
    spread: bool
    device: str
    removed: int
    parameters: int

    @property
    def peak(self) -> int:
        """Peak bytes that must fit on the device."""
        return sum(self.memory.values()) - (self.memory["weights"] if self.spread else 0)

    @property
    def _parts(self) -> str:
        return ", ".join(f"{name} {readable(size)}" for name, size in self.memory.items())

    def check(self) -> None:
        """Refuse a recovery that does not fit.

        Raises:
            MemoryError: the device has too little memory; the message has both numbers.
            OSError: the disk has too little room for the download.
        """
        if self.peak > self.available:
            raise MemoryError(
                f"this needs about {readable(self.peak)} on {self.device} ({self._parts}) and "
                f"{readable(self.available)} are free: use --dtype bfloat16, a shorter --length, "
                "or --offload FOLDER"
            )
        free = shutil.disk_usage(nearest_existing(Path(HF_HUB_CACHE))).free
        if self.download > free:
            raise OSError(
                f"{readable(self.download)} have to be fetched and {readable(free)} are free in "
                f"{HF_HUB_CACHE}: make room, or set HF_HOME to a folder on another disk"
            )

    def rows(self) -> list[tuple[str, str]]:
        """The estimates as rows of a table."""
        memory = f"about {readable(self.peak)} of {readable(self.available)}"
        return [
            ("layers to remove", str(self.removed)),
            ("parameters", f"{self.parameters / 1e6:,.1f} million"),
            ("to download", readable(self.download) if self.download else "nothing"),
            (f"memory on {self.device}", memory),
            ("of which", self._parts),
            ("time", f"about {minutes(sum(self.seconds.values()))}"),
        ]


def plan(
    name: str | Path,
    *,
    n: int,
    layers: Iterable[int] | None = None,
    criterion: str = "cosine",
    operator: str = "ghost",
    budget: str = "any",
    keep: str | None = None,
    windows: int = 16,
    length: int = 2048,
    test_windows: int = 8,
    dtype: str | None = None,
    device: str = "cpu",
    spread: bool = False,
) -> Plan:
    """Estimate the cost of ``ghostlib recover`` with these options.

    Args:
        name: as for `ghostlib.load_model`; only the configuration of a hub model is read.
        spread: whether weights may be put on several devices and on disk.

    Raises:
        ValueError: a model that is not a causal language model or was recovered before, or layers
            that cannot be removed from it.
        ConnectionError: a hub id while the hub is out of reach.
    """
    name = os.path.expanduser(name)
    model = _without_weights(name, dtype)
    check_dense(model)
    cuda, auto = torch.device(device).type == "cuda", operator == AUTO
    total, C = num_layers(model), hidden_size(model)
    width = int(getattr(text_config(model), "intermediate_size", None) or 4 * C)
    removed = list(layers or range(n))
    families = [Family.of(family) for family in (BUDGETS[budget] if auto else (operator,))]
    regressors = [family.regressor for family in families]
    criteria = shortlisted(keep) if auto else (criterion,)
    criteria = () if layers else criteria
    choices = len(criteria) or 1
    # The last ones: a gap at layer 0 has no MLP to collect.
    gaps = runs(removed, total) if layers else contiguous(n, total)[-choices:]
    # Gaps that the choice of layers compares, and how many sets of layers it scores.
    compared = sorted({gap for name in criteria for gap in needed_boundaries(name, n, total)})
    greedy = sum(CRITERIA[name].search == "greedy" for name in criteria)
    scores = greedy * (total + (n - 1) * (TRIES if auto else total))
    with_moments = auto or "moments" in CRITERIA[criterion].needs
    fit = calibration_bytes(C, gaps, length=length, hidden=width, regressors=regressors)
    calibration = fit.total
    if auto or (families[0].ridged and windows > 1):
        calibration += fit.moments  # of the windows kept out of the fit
    if compared:
        search = calibration_bytes(C, compared, length=length, moments=with_moments)
        calibration = max(calibration, search.total)
    memory = {
        "weights": weight_bytes(model),
        "calibration": calibration,
        "activations": length * (8 * C + 4 * width) * model.dtype.itemsize
        + 3 * _CHUNK * int(text_config(model).vocab_size) * 4,
        "repair": len(gaps) * 3 * C * C * 8,
        "process": _PROCESS,
    }
    forward, head = _operations(model, length)
    scored = forward + length * head
    products = max(sum(r.widths(C, width)) for r in regressors)
    accumulated = 2 * length * products * (products + C) * len(gaps)
    fast, double = _rate(C, width, model.dtype, device), _rate(C, C, torch.float64, device)
    trials = choices * len(families) if auto else 0
    moments = 4 * length * C * C * len(compared) * with_moments
    solving = _SOLVE * len(gaps) * sum(sum(r.widths(C, width)) ** 3 for r in regressors)
    seconds = {
        "choosing layers": windows * (bool(criteria) * forward / fast + moments / double)
        + scores * (scored / fast + with_moments * _SOLVE * C**3 / double),
        "calibrating": windows * (forward / fast + accumulated / double)
        + trials * scored / fast
        + solving / double,
        "scoring": 3 * test_windows * scored / fast,
    }
    return Plan(
        download=_download(name),
        memory=memory,
        available=int(torch.cuda.mem_get_info(device)[0]) if cuda else available_bytes(),
        seconds=seconds,
        spread=spread,
        device=device,
        removed=len(removed),
        parameters=count_parameters(model),
    )


class Steps:
    """Prints on standard error which step begins, and about how long the rest will take."""

    def __init__(self, expected: Plan) -> None:
        self._expected = dict(expected.seconds)
        self._start = self._step_start = time.perf_counter()
        self._remaining = sum(self._expected.values())
        self._pace = 1.0  # measured time of a step over its expected time
        self._current = 0.0  # expected time of the step that runs

    @property
    def seconds(self) -> float:
        """Seconds since the first step."""
        return time.perf_counter() - self._start

    def begin(self, step: str) -> None:
        """End the previous step and begin ``step``."""
        now = time.perf_counter()
        if self._current:
            self._pace = (now - self._step_start) / self._current
        self._step_start, self._current = now, self._expected.get(step, 0.0)
        if shown():
            rest = minutes(self._pace * self._remaining)
            print(f"{step}; about {rest} left", file=sys.stderr, flush=True)
        self._remaining -= self._current


def peak_memory(device: str) -> int:
    """Peak memory so far, in bytes: of a CUDA device, or else of this process."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def minutes(seconds: float) -> str:
    """A duration in hours, minutes and seconds.

    >>> [minutes(s) for s in (0, 42, 59.7, 100, 3599, 3600, 4000)]
    ['1 s', '42 s', '1 min 0 s', '1 min 40 s', '59 min 59 s', '1 h 0 min', '1 h 6 min']
    """
    rounded = max(round(seconds), 1)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60} min"


def _without_weights(name: str, dtype: str | None) -> PreTrainedModel:
    """The model that will be loaded, in its dtype, on the meta device."""
    config: Any = _embedded_config()
    if name != EMBEDDED:
        check_reachable(name)
        config = AutoConfig.from_pretrained(name)
    as_dtype = getattr(config, "dtype", None) or torch.float32
    if dtype not in (None, "auto"):
        as_dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=as_dtype)
    return model


def _operations(model: PreTrainedModel, length: int) -> tuple[int, int]:
    """Operations of a pass over ``length`` tokens without the head, and of one token's logits."""
    try:
        counted = flops(model, length)  # with the logits of one position
    except ValueError:  # routing depends on the tokens: all experts are an upper bound
        head = 2 * int(text_config(model).vocab_size) * hidden_size(model)
        return 2 * length * count_parameters(model), head
    return counted.total - counted.head, counted.head


def _embedded_config() -> LlamaConfig:
    """Configuration of the embedded model, which may not be downloaded yet."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def _download(name: str) -> int:
    """Bytes of weights that are not on this machine yet."""
    if name == EMBEDDED:
        return 0 if (cache_dir() / MODEL).is_dir() else _WHEEL
    if os.path.isdir(name):
        return 0
    files = HfApi().model_info(name, files_metadata=True).siblings or []
    for ending in (".safetensors", ".bin"):
        weights = [f for f in files if f.rfilename.endswith(ending) and "/" not in f.rfilename]
        if weights:
            missing = [f for f in weights if not try_to_load_from_cache(name, f.rfilename)]
            return sum(f.size or 0 for f in missing)
    return 0


def _rate(rows: int, columns: int, dtype: torch.dtype, device: str) -> float:
    """Operations per second of a pass over a stream of this width."""
    place = "cpu" if dtype == torch.float64 and torch.device(device).type == "mps" else device
    W = torch.ones(rows, columns, dtype=dtype, device=place)
    for tokens in (8, 64, 512):
        X = torch.ones(tokens, rows, dtype=dtype, device=place)
        (X @ W)[0, 0].item()  # warms up, and waits for the device
        rounds, begin = 0, time.perf_counter()
        while rounds == 0 or (tokens == 512 and time.perf_counter() - begin < _SECONDS):
            (X @ W)[0, 0].item()
            rounds += 1
        seconds = (time.perf_counter() - begin) / rounds
        if seconds > _SECONDS:  # bfloat16 without hardware for it: more would take minutes
            break
    return _UTILISATION * 2 * X.numel() * columns / seconds
