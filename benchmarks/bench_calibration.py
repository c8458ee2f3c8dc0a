"""Time and memory of calibration, compared with a plain forward pass and with a naive way.

    python benchmarks/bench_calibration.py [--windows 8] [--many 64] [--repeats 2] [--threads 2]

On the embedded model, layers 12 … 18. The ways take turns in one process for the times; each peak
of memory comes from a process of its own and includes interpreter, torch and the model.

- plain forward: the whole dense model over the windows, head included, nothing collected;
- pass alone: only to layer 19, where calibration for (12, 19) stops, nothing collected;
- one boundary: `calibrate` for (12, 19), and its operator;
- with the MLP: `calibrate` for the regressor of `ghost-refit`, ``[x, h]``;
- many boundaries: all 30 single layers and all 24 blocks of seven, with similarities;
- naive: a whole forward pass that keeps both activations, then `numpy.linalg.lstsq` in float64.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from memory import peak_gigabytes
from torch import Tensor
from transformers import PreTrainedModel

import ghostlib as gl
from ghostlib.models.architectures import receiver

BLOCK = gl.Boundary(12, 19)
LENGTH = 2048


def plain(model: PreTrainedModel, windows: Tensor) -> None:
    """Full forward passes, one window at a time."""
    with torch.no_grad():
        for window in windows.split(1):
            model(window, use_cache=False)


def alone(model: PreTrainedModel, windows: Tensor) -> None:
    """Forward passes up to the end of one boundary."""
    for window in windows.split(1):
        gl.record(model, window, [BLOCK.stop])


def with_mlp(model: PreTrainedModel, windows: Tensor) -> None:
    """One streaming pass for the moments of the stream and of the MLP's hidden activations."""
    gl.calibrate(model, windows, [BLOCK], regressors=["x, h"])


def one_boundary(model: PreTrainedModel, windows: Tensor) -> None:
    """One streaming pass for one boundary, and its operator."""
    gl.solve(gl.calibrate(model, windows, [BLOCK])[BLOCK], "ghost")


def many_boundaries(model: PreTrainedModel, windows: Tensor) -> None:
    """One streaming pass for every single layer and every block of seven."""
    total = model.config.num_hidden_layers
    gl.calibrate(model, windows, [*gl.contiguous(1, total), *gl.contiguous(7, total)])


def naive(model: PreTrainedModel, windows: Tensor) -> None:
    """Store all activations of both ends, then solve, as in the published code."""
    stored: dict[int, list[Tensor]] = {index: [] for index in BLOCK}
    handles = [
        receiver(model, index).register_forward_pre_hook(
            lambda module, args, index=index: stored[index].append(args[0].flatten(0, 1))
        )
        for index in BLOCK
    ]
    plain(model, windows)
    for handle in handles:
        handle.remove()
    X, Y = (torch.cat(stored[index]).double().numpy() for index in BLOCK)
    np.linalg.lstsq(X, Y - X, rcond=1e-6)


WAYS: dict[str, Callable[[PreTrainedModel, Tensor], None]] = {
    "plain forward": plain,
    "pass alone": alone,
    "one boundary": one_boundary,
    "with the MLP": with_mlp,
    "many boundaries": many_boundaries,
    "naive": naive,
}


def windows_of(count: int) -> tuple[PreTrainedModel, Tensor]:
    """The embedded model and ``count`` calibration windows."""
    model, tokenizer = gl.load_model()
    return model, gl.token_windows("wiki", tokenizer, length=LENGTH, count=count)


def peak(way: str, count: int, threads: int) -> float:
    """Peak memory in GB of one way over ``count`` windows, in a process of its own."""
    command = [sys.executable, __file__, "--case", way, "--windows", str(count)]
    command += ["--threads", str(threads)]
    # glibc returns freed memory at once; otherwise it keeps some, depending on the requests' order.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=settings)
    return float(json.loads(done.stdout))


def main() -> None:
    """Print times, ratios and peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=8, help="windows of 2,048 tokens to time")
    parser.add_argument("--many", type=int, default=64, help="windows for the memory comparison")
    parser.add_argument("--repeats", type=int, default=2, help="timed rounds; medians are printed")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--case", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, windows = windows_of(options.windows)
    if options.case:
        WAYS[options.case](model, windows)
        print(json.dumps(peak_gigabytes()))
        return

    plain(model, windows[:1])  # warm-up
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way, work in WAYS.items():
            begin = time.perf_counter()
            work(model, windows)
            times[way].append(time.perf_counter() - begin)
    print(f"{len(windows)} windows of {LENGTH} tokens, {options.threads} threads")
    print(f"{'way':16} {'seconds':>8} {'÷ plain':>8} {'peak GB':>8}")
    medians = {way: statistics.median(values) for way, values in times.items()}
    for way, median in medians.items():
        ratio = median / medians["plain forward"]
        memory = peak(way, options.windows, options.threads)
        print(f"{way:16} {median:8.1f} {ratio:8.2f} {memory:8.2f}", flush=True)

    low, high = (peak("one boundary", count, options.threads) for count in (8, options.many))
    print(f"one boundary: peak {low:.2f} GB at 8 windows, ", end="")
    print(f"{high:.2f} GB at {options.many}: {high / low - 1:+.1%}")


if __name__ == "__main__":
    main()
