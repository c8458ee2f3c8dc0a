"""Time and memory of every operator, of one large solve, and of the ridge path.

    python benchmarks/bench_operators.py [--width 4096] [--small 576] [--threads 2]

Each case runs in a process of its own, so that its peak memory is its own too. Peaks include the
interpreter and torch, which the row "moments only" shows by themselves. Activations are random:
the time of a closed form does not depend on what they hold. Processor time, summed over threads,
is the one to compare on a busy machine, and with one thread it hardly depends on the load.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from memory import peak_gigabytes

from ghostlib.operators.paths import RIDGES, ridge_path
from ghostlib.operators.solve import OPERATORS, solve
from ghostlib.statistics.moments import Moments

SEQUENCE = 2048


def random_moments(width: int, seed: int = 0) -> Moments:
    """Moments of twice as many random tokens as channels, collected one sequence at a time."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    moments = Moments(width)
    for _ in range(-(-2 * width // SEQUENCE)):
        X = torch.randn(SEQUENCE, width, generator=generator)
        moments.update(X, X + X @ mix + torch.randn(SEQUENCE, width, generator=generator))
    return moments


def best(work: Callable[[], object], moments: Moments, repeats: int) -> dict[str, float]:
    """Least wall-clock and processor time of a few runs, each from an undecomposed ``G``."""
    wall, processor = [], []
    for _ in range(repeats):
        moments.G = moments.G.clone()  # the decomposition is remembered for the tensor it is of
        begin = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - begin[0])
        processor.append(time.process_time() - begin[1])
    return {"seconds": min(wall), "cpu": min(processor)}


def run_case(name: str, width: int) -> dict[str, float]:
    """Measure one case in this process."""
    moments = random_moments(width)
    repeats = 3 if width <= 1024 else 1
    if name == "moments only":
        found = {"seconds": 0.0, "cpu": 0.0}
    elif name == "ridge path":
        held_out = random_moments(width, seed=1)
        one = best(lambda: solve(moments), moments, repeats)
        found = best(lambda: ridge_path(moments, RIDGES[:50], held_out), moments, repeats)
        found |= {"ratio": found["cpu"] / one["cpu"]}
    else:
        options = {"rank": max(1, width // 8)} if name == "low-rank" else {}
        found = best(lambda: solve(moments, name, **options), moments, repeats)
    return found | {"gigabytes": peak_gigabytes()}


def measure(name: str, width: int, threads: int) -> dict[str, float]:
    """Measure one case in a process of its own, and print its row."""
    command = [sys.executable, __file__, "--case", name, "--width", str(width)]
    done = subprocess.run(
        [*command, "--threads", str(threads)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    row = f"{found['seconds']:9.3f} {found['cpu']:9.3f} {found['gigabytes']:7.2f}"
    print(f"{name:18} {width:6} {row}", flush=True)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096, help="width of the one large solve")
    parser.add_argument("--small", type=int, default=576, help="width at which all are compared")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        print(json.dumps(run_case(arguments.case, arguments.width)))
        return
    print(f"{'case':18} {'width':>6} {'seconds':>9} {'cpu s':>9} {'peak GB':>7}")
    for name in ("moments only", *OPERATORS):
        measure(name, arguments.small, arguments.threads)
    for width in (arguments.small, arguments.width):
        if width != arguments.small:
            measure("ghost", width, arguments.threads)
        path = measure("ridge path", width, arguments.threads)
        ratio = path["ratio"]
        print(f"{'':18} 50 values cost {ratio:.2f} times one solve (processor time)", flush=True)


if __name__ == "__main__":
    main()
