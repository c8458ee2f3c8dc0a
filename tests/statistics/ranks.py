"""The program of each process of `test_distributed`."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import LAYERS, tiny_model, tiny_windows

import ghostlib as gl

BOUNDARIES = [*gl.contiguous(2, LAYERS), gl.Boundary(2, 3)]


def cases(rank: int) -> dict[str, Any]:
    """The result or error message of this process in each case."""
    model, ids = tiny_model("llama"), tiny_windows(5)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[3, 20:] = 0, 0
    shard = gl.shard(ids)
    outcome: dict[str, Any] = {"windows": shard}

    def attempt(
        name: str, model: Any, windows: Any, gaps: Any = BOUNDARIES, **options: Any
    ) -> None:
        try:
            outcome[name] = gl.calibrate_distributed(model, windows, gaps, **options)
        except Exception as error:
            outcome[name] = f"{type(error).__name__}: {error}"

    attempt("all", model, shard)
    options: dict[str, Any] = {"skip_leading": 1, "batch_size": 2}
    attempt("padded", model, shard, attention_mask=gl.shard(mask), **options)
    attempt("similarities", model, shard, moments=False)
    regressors = {"x, n(x)", "n(prev)", "h", "f"}  # in another order in each process
    attempt("several regressors", model, shard, regressors=regressors)
    attempt("no windows", model, gl.shard(ids[:1]))
    attempt("same windows", model, ids)
    attempt("other boundaries", model, shard, [(1, 2 + rank)])
    attempt("other options", model, shard, skip_leading=rank)
    attempt("other model", tiny_model("llama", seed=rank), shard)
    attempt("bad ids", model, shard + 90 * rank)
    attempt("no tensor", model, [1, 2][rank])
    attempt("afterwards", model, shard)

    outcome["all, alone"] = gl.calibrate(model, ids, BOUNDARIES)
    outcome["padded, alone"] = gl.calibrate(model, ids, BOUNDARIES, attention_mask=mask, **options)
    outcome["operators"] = [
        parameter
        for case in ("all", "all, alone")
        for name, parameter in gl.recover(model, outcome[case], [2, 3]).named_parameters()
        if ".boundary." in name
    ]
    return outcome


def main(rank: int, processes: int, folder: Path) -> None:
    """Run all cases and save the outcomes."""
    torch.set_num_threads(1)
    group = {"init_method": f"file://{folder / 'group'}", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=processes, **group)
    torch.save(cases(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
