"""What each process of `test_distributed` does."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import LAYERS, tiny_model, tiny_windows

import ghostlib as gl

BOUNDARIES = [*gl.contiguous(2, LAYERS), gl.Boundary(2, 3)]


def cases(rank: int) -> dict[str, Any]:
    """What this process gets or is told in each case."""
    model, ids = tiny_model("llama"), tiny_windows(5)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[3, 20:] = 0, 0
    tried: dict[str, Any] = {}

    def attempt(name: str, *arguments: Any, **options: Any) -> None:
        try:
            tried[name] = gl.calibrate_distributed(*arguments, **options)
        except Exception as error:
            tried[name] = f"{type(error).__name__}: {error}"

    mine = gl.shard(ids)
    tried["windows"] = mine
    attempt("all", model, mine, BOUNDARIES)
    options: dict[str, Any] = {"skip_leading": 1, "batch_size": 2}
    attempt("padded", model, mine, BOUNDARIES, attention_mask=gl.shard(mask), **options)
    attempt("similarities", model, mine, BOUNDARIES, moments=False)
    regressors = {"x, n(x)", "n(prev)", "h", "f"}  # in another order in each process
    attempt("several regressors", model, mine, BOUNDARIES, regressors=regressors)
    attempt("no windows", model, gl.shard(ids[:1]), BOUNDARIES)
    attempt("same windows", model, ids, BOUNDARIES)
    attempt("other boundaries", model, mine, [(1, 2 + rank)])
    attempt("other options", model, mine, BOUNDARIES, skip_leading=rank)
    attempt("other model", tiny_model("llama", seed=rank), mine, BOUNDARIES)
    attempt("bad ids", model, mine + 90 * rank, BOUNDARIES)
    attempt("no tensor", model, [1, 2][rank], BOUNDARIES)
    attempt("afterwards", model, mine, BOUNDARIES)

    whole = gl.calibrate(model, ids, BOUNDARIES)
    tried["all, alone"] = whole
    tried["padded, alone"] = gl.calibrate(model, ids, BOUNDARIES, attention_mask=mask, **options)
    tried["operators"] = [
        parameter
        for calibration in (tried["all"], whole)
        for name, parameter in gl.recover(model, calibration, [2, 3]).named_parameters()
        if ".boundary." in name
    ]
    return tried


def main(rank: int, processes: int, folder: Path) -> None:
    """Try everything and write down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'group'}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=60),
    )
    torch.save(cases(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
