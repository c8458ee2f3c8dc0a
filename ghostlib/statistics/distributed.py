"""Data-parallel calibration: each process calibrates on its own windows, then the sums are added.

Moments are sums over tokens, so the total over processes is what one process would collect from all
windows (paper, appendix H). Every process receives it, solves the same operator and has the same
recovered model. A complete script, for ``torchrun --nproc-per-node 2 script.py``::

    import torch.distributed as dist
    import ghostlib as gl

    dist.init_process_group("gloo")
    model, tokenizer = gl.load_model()
    windows = gl.token_windows("wiki", tokenizer, length=512, count=8)  # the same everywhere
    calibration = gl.calibrate_distributed(model, gl.shard(windows), [(12, 19)])
    recovered = gl.recover(model, calibration, range(12, 19))
    if dist.get_rank() == 0:
        recovered.save_pretrained("smollm2-ghost7")

With one GPU per process: ``init_process_group("nccl")`` and ``load_model(device=f"cuda:{rank}")``,
where ``rank`` is the environment variable ``LOCAL_RANK``. Under ``accelerate launch``,
``accelerate.PartialState()`` starts the process group.

`calibrate` itself ignores the process group: otherwise it would wait forever if only one process
called it, and count windows twice if all passed the same ones.
"""

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.common import checked
from ghostlib.models.boundaries import Boundary
from ghostlib.models.placement import input_device
from ghostlib.statistics.calibration import Calibration, Similarity, calibrate
from ghostlib.statistics.features import STREAM


@checked
def shard(windows: Tensor) -> Tensor:
    """This process's part of ``windows`` (or of their attention mask).

    Process r of n has windows r, r + n, r + 2n …; without a process group, all of them.
    """
    rank, processes = _rank_and_size()
    return windows[rank::processes]


# Not @checked: an error in one process alone would leave the others waiting.
def calibrate_distributed(
    model: PreTrainedModel,
    windows: Tensor,
    boundaries: Iterable[Boundary | tuple[int, int]],
    **options: Any,
) -> Calibration:
    """`calibrate` with sums over all processes of the default process group.

    Every process must call it, with the same model, boundaries and options and with windows of its
    own. An error in one process ends the call with an error in all. Without a process group there
    is one process.

    Args:
        model, boundaries: see `calibrate`.
        windows: (windows, length) token ids of this process alone, such as ``shard(windows)``.
        options: see `calibrate`; an ``attention_mask`` belongs to this process's windows.

    Returns:
        The same `Calibration` in every process, equal to one process's on all windows up to the
        rounding of float64 sums.

    Raises:
        ValueError: a process without windows, two with the same windows, or processes that do not
            agree on the boundaries, the options or the model.
        RuntimeError: `calibrate` failed in one of the processes (the message says which and why).
    """
    if not isinstance(boundaries, Iterable):  # in every process, so all of them raise
        raise ValueError(f"boundaries must be a list of Boundary(start, stop), got {boundaries!r}")
    gaps = list(boundaries)
    if isinstance(regressors := options.get("regressors"), set | frozenset):
        options["regressors"] = sorted(regressors, key=str)  # a set has another order elsewhere
    device = torch.device("cpu")
    if _rank_and_size()[1] > 1 and "cpu:" not in dist.get_backend_config():
        device = input_device(model)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        plan = repr((gaps, {k: v for k, v in options.items() if k != "attention_mask"}))
        _check_plans(_gather((plan, _digest(windows, options.get("attention_mask")))))
        calibration, failure = None, None
        try:
            calibration = calibrate(model, windows, gaps, **options)
        except Exception as error:
            failure = error
        outcomes = _gather(f"{type(failure).__name__}: {failure}" if failure else None)
        for rank, message in enumerate(outcomes):
            if message is not None:
                raise RuntimeError(
                    f"process {rank} of {len(outcomes)} could not calibrate its windows: {message}"
                ) from failure
        assert calibration is not None
        models = _gather(calibration.model)
        if len(set(models)) > 1:
            raise ValueError(f"processes hold different models: {', '.join(models)}")
        return all_reduce(calibration, device)


def all_reduce(calibration: Calibration, device: torch.device | str = "cpu") -> Calibration:
    """The sums of ``calibration`` over all processes, which must have the same boundaries.

    A Gram matrix that boundaries share is added once and stays shared.

    Args:
        device: of the process group's backend: a GPU for NCCL.
    """
    # One flat dictionary of all sums, in which a shared matrix occurs once.
    sums: dict[int | str, Tensor] = {}
    for moments in calibration.collected.values():
        sums |= {id(tensor): tensor for tensor in moments.tensors().values()}
    counts = [list(moments.counts().values()) for moments in calibration.collected.values()]
    sums["counts"] = torch.tensor(counts, dtype=torch.float64)
    sums["tokens"] = torch.tensor(float(calibration.tokens), dtype=torch.float64)
    means = torch.tensor(list(calibration.similarities.values()), dtype=torch.float64)
    sums["similarities"] = means * calibration.tokens
    totals = {key: _total(values, device) for key, values in sums.items()}

    total = Calibration(calibration.model)
    total.tokens = int(totals["tokens"])
    rows = (totals["similarities"] / total.tokens).tolist()
    for boundary, row in zip(calibration.similarities, rows, strict=True):
        total.similarities[boundary] = Similarity(*row)
    rows = totals["counts"].tolist()
    for (key, moments), row in zip(calibration.collected.items(), rows, strict=True):
        tensors = {name: totals[id(tensor)] for name, tensor in moments.tensors().items()}
        pairs = zip(moments.counts().items(), row, strict=True)
        scalars = {name: type(own)(count) for (name, own), count in pairs}  # int or float
        total.collected[key] = moments.replaced(tensors, scalars)
    if total.collected:
        total.update(total.of(STREAM))
    return total


def _rank_and_size() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    processes = _rank_and_size()[1]
    values = [value] * processes
    if processes > 1:
        dist.all_gather_object(values, value)
    return values


def _total(values: Tensor, device: torch.device | str) -> Tensor:
    if _rank_and_size()[1] == 1:
        return values
    moved = values.to(device, copy=True)
    dist.all_reduce(moved)
    return moved.to(values.device)


def _digest(windows: Any, mask: Any) -> str | None:
    """A hash of the windows: "" for no windows, None for what `calibrate` will refuse."""
    if not isinstance(windows, Tensor):
        return None
    if windows.numel() == 0:
        return ""
    tensors = (t.cpu().numpy() for t in (windows, mask) if isinstance(t, Tensor))
    return hashlib.sha256(b"".join(t.tobytes() for t in tensors)).hexdigest()


def _check_plans(plans: list[tuple[str, str | None]]) -> None:
    """Refuse, in every process, plans that disagree and windows that are missing or duplicate."""
    processes = len(plans)
    first: dict[str, int] = {}
    for rank, (plan, digest) in enumerate(plans):
        if plan != plans[0][0]:
            raise ValueError(
                f"processes 0 and {rank} were called with different arguments: "
                f"{plans[0][0]} and {plan}; call with the same boundaries and options"
            )
        if digest == "":
            raise ValueError(
                f"process {rank} of {processes} has no windows: take at least {processes} windows, "
                "or start fewer processes"
            )
        if digest is not None and first.setdefault(digest, rank) != rank:
            raise ValueError(
                f"processes {first[digest]} and {rank} have the same windows, which would count "
                "twice: give each process its own, calibrate_distributed(model, shard(windows), …)"
            )
