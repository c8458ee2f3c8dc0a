"""Data-parallel calibration: each process runs its own windows, then their sums are added up.

Moments are sums over tokens, so those of all processes together are what one process would have
collected from all windows (paper, appendix H). Every process gets them, solves the same operator
and has the same recovered model. A whole script, for ``torchrun --nproc-per-node 2 script.py``::

    import torch.distributed as dist
    import ghostlib as gl

    dist.init_process_group("gloo")
    model, tokenizer = gl.load_model()
    windows = gl.token_windows("wiki", tokenizer, length=512, count=8)  # the same everywhere
    calibration = gl.calibrate_distributed(model, gl.shard(windows), [(12, 19)])
    recovered = gl.recover(model, calibration, range(12, 19))
    if dist.get_rank() == 0:
        recovered.save_pretrained("smollm2-ghost7")

With one GPU a process: ``init_process_group("nccl")`` and ``load_model(device=f"cuda:{rank}")``,
``rank`` being the environment's ``LOCAL_RANK``. Under ``accelerate launch``,
``accelerate.PartialState()`` starts the process group.

This is a function of its own. `calibrate` does not look for a process group: it would wait for
ever where one process alone calls it, and count windows twice where all are given the same.
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
    """This process's part of ``windows`` (or of their attention mask): every n-th of them.

    Of k windows and n processes, process r has windows r, r + n, r + 2n …; without a process group,
    all of them.
    """
    rank, processes = _place()
    return windows[rank::processes]


# Not @checked: a refusal in one process alone would leave the others waiting.
def calibrate_distributed(
    model: PreTrainedModel,
    windows: Tensor,
    boundaries: Iterable[Boundary | tuple[int, int]],
    **options: Any,
) -> Calibration:
    """As `calibrate`, with the sums over all processes of the default group.

    Every process must call it, with the same model, boundaries and options and with windows of its
    own. If anything is wrong in one process, the call ends with an error in all of them. Without a
    process group there is one process.

    Args:
        model, boundaries: see `calibrate`.
        windows: (windows, length) token ids of this process alone, such as ``shard(windows)``.
        options: see `calibrate`; an ``attention_mask`` belongs to this process's windows.

    Returns:
        The same `Calibration` in every process, equal to that of one process with all windows up to
        the rounding of float64 sums.

    Raises:
        ValueError: a process without windows, two with the same windows, or processes that do not
            agree on the boundaries, the options or the model.
        RuntimeError: `calibrate` failed in one of the processes (the message says which and why).
    """
    if not isinstance(boundaries, Iterable):  # they are the same in every process
        raise ValueError(f"boundaries must be a list of Boundary(start, stop), got {boundaries!r}")
    asked = list(boundaries)
    if isinstance(several := options.get("regressors"), set | frozenset):
        options["regressors"] = sorted(several, key=str)  # in every process alike
    device = torch.device("cpu")
    if _place()[1] > 1 and "cpu:" not in dist.get_backend_config():
        device = input_device(model)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        plan = repr((asked, {k: v for k, v in options.items() if k != "attention_mask"}))
        _check_plans(_gather((plan, _digest(windows, options.get("attention_mask")))))
        calibration, failure = None, None
        try:
            calibration = calibrate(model, windows, asked, **options)
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
    """The sums of ``calibration`` over all processes, which must hold the same boundaries.

    A Gram matrix that boundaries share is added up once and stays shared.

    Args:
        device: where the process group's backend wants tensors: a GPU for NCCL.
    """
    # One flat dictionary of everything that is summed; shared matrices stand in it once.
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
    lines = totals["counts"].tolist()
    for (key, moments), line in zip(calibration.collected.items(), lines, strict=True):
        tensors = {name: totals[id(tensor)] for name, tensor in moments.tensors().items()}
        known = zip(moments.counts().items(), line, strict=True)
        counted = {name: type(mine)(whole) for (name, mine), whole in known}  # tokens are whole
        total.collected[key] = moments.replaced(tensors, counted)
    if total.collected:
        total.update(total.of(STREAM))
    return total


def _place() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _gather(mine: Any) -> list[Any]:
    """What every process passed, by rank."""
    processes = _place()[1]
    found = [mine] * processes
    if processes > 1:
        dist.all_gather_object(found, mine)
    return found


def _total(values: Tensor, device: torch.device | str) -> Tensor:
    if _place()[1] == 1:
        return values
    moved = values.to(device, copy=True)
    dist.all_reduce(moved)
    return moved.to(values.device)


def _digest(windows: Any, mask: Any) -> str | None:
    """What tells these windows from others; "" for none, None for what `calibrate` will refuse."""
    if not isinstance(windows, Tensor):
        return None
    if windows.numel() == 0:
        return ""
    tensors = (t.cpu().numpy() for t in (windows, mask) if isinstance(t, Tensor))
    return hashlib.sha256(b"".join(t.tobytes() for t in tensors)).hexdigest()


def _check_plans(plans: list[tuple[str, str | None]]) -> None:
    """Refuse, in every process, what `calibrate` cannot notice in one."""
    processes = len(plans)
    first: dict[str, int] = {}
    for rank, (plan, digest) in enumerate(plans):
        if plan != plans[0][0]:
            raise ValueError(
                f"processes 0 and {rank} were asked for different things: "
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
