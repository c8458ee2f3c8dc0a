"""Time and memory of every operator, of one large solve, of the ridge path, and of a joint fit.

    python benchmarks/bench_operators.py [--width 4096] [--small 576] [--joint 14336] [--threads 2]

The ridge solution of the large width takes turns, in one process, with a Cholesky factorisation and
solve of the same matrices in plain torch; its memory is measured without the moments, in units of
their Gram matrix. ``--joint`` adds the hidden activations of an MLP of that width to the stream
(18,432 features for an 8B model: about 20 minutes and 14 GB).

Each case runs in a process of its own, for its peak memory. Peaks include the interpreter and
torch, see the row "moments only". Activations are random: the time of a closed form does not depend
on their values. On a busy machine compare processor time, summed over threads; with one thread it
hardly depends on the load.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from memory import peak_gigabytes, restart_peak

from ghostlib.operators.families import FAMILIES
from ghostlib.operators.paths import RIDGES, ridge_path
from ghostlib.operators.solve import solve
from ghostlib.statistics.features import STREAM
from ghostlib.statistics.moments import Moments

SEQUENCE, RIDGE = 2048, 1e-3
STREAM_FAMILIES = [name for name, family in FAMILIES.items() if family.regressor == STREAM]


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
    """Minimum wall-clock and processor time of a few runs, each from an undecomposed ``G``."""
    wall, processor = [], []
    for _ in range(repeats):
        moments.G = moments.G.clone()  # the decomposition is cached with the tensor
        begin = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - begin[0])
        processor.append(time.process_time() - begin[1])
    return {"seconds": min(wall), "cpu": min(processor)}


def cholesky(moments: Moments) -> torch.Tensor:
    """The same ridge solution without the package."""
    A = moments.G.clone()
    A.diagonal().add_(RIDGE * A.diagonal().mean())
    return torch.cholesky_solve(moments.cross, torch.linalg.cholesky(A))


def against_cholesky(moments: Moments, rounds: int = 3) -> dict[str, float]:
    """A ridge solution compared with `cholesky`: processor time, and memory in Gram matrices."""
    matrix = moments.G.numel() * 8 / 1e9
    wall, ours, plain, matrices = [], [], [], []
    for _ in range(rounds):
        moments.G = moments.G.clone()
        begin = time.process_time()
        expected = cholesky(moments)
        plain.append(time.process_time() - begin)
        restart_peak()
        before, begin, clock = peak_gigabytes(), time.process_time(), time.perf_counter()
        operator = solve(moments, "ghost", relative_ridge=RIDGE)
        ours.append(time.process_time() - begin)
        wall.append(time.perf_counter() - clock)
        matrices.append((peak_gigabytes() - before) / matrix)
        torch.testing.assert_close(operator.M, expected)
        del operator, expected
    ratio = min(ours) / min(plain)
    return {"seconds": min(wall), "cpu": min(ours), "ratio": ratio, "matrices": max(matrices)}


def joint_moments(width: int, hidden: int) -> Moments:
    """Moments of the stream and an MLP's hidden activations, one sequence, for a ridge solution."""
    generator = torch.Generator().manual_seed(0)
    moments = Moments(width, regressor="x, h", hidden=hidden)
    X = torch.randn(SEQUENCE, width, generator=generator)
    h = torch.randn(SEQUENCE, hidden, generator=generator)
    return moments.update(X, X + h[:, :width], hidden=h)


def run_joint(width: int, hidden: int) -> dict[str, float]:
    """One joint fit in this process."""
    begin = time.perf_counter()
    moments = joint_moments(width, hidden)
    collected = time.perf_counter()
    operator = solve(moments, "ghost-refit", relative_ridge=RIDGE)
    times = {"seconds": time.perf_counter() - collected, "cpu": collected - begin}
    product = moments.G @ operator.M + RIDGE * moments.gram.unit.square()[:, None] * operator.M
    off = float((product - moments.cross).norm() / moments.cross.norm())
    return times | {"off": off, "gigabytes": peak_gigabytes()}


def run_case(name: str, width: int) -> dict[str, float]:
    """Measure one case in this process."""
    moments = random_moments(width)
    repeats = 3 if width <= 1024 else 1
    if name == "moments only":
        result = {"seconds": 0.0, "cpu": 0.0}
    elif name == "ridge":
        result = against_cholesky(moments)
    elif name == "ridge path":
        held_out = random_moments(width, seed=1)
        one = best(lambda: solve(moments), moments, repeats)
        result = best(lambda: ridge_path(moments, RIDGES[:50], held_out), moments, repeats)
        result |= {"ratio": result["cpu"] / one["cpu"]}
    else:
        options = {"rank": max(1, width // 8)} if name == "low-rank" else {}
        result = best(lambda: solve(moments, name, **options), moments, repeats)
    return result | {"gigabytes": peak_gigabytes()}


def measure(name: str, width: int, threads: int, hidden: int = 0) -> dict[str, float]:
    """Measure one case in a process of its own, and print its row."""
    command = [sys.executable, __file__, "--case", name, "--width", str(width)]
    if name == "joint":
        command += ["--joint", str(hidden)]
    done = subprocess.run(
        [*command, "--threads", str(threads)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    row = f"{result['seconds']:9.3f} {result['cpu']:9.3f} {result['gigabytes']:7.2f}"
    print(f"{name:18} {width:6} {row}", flush=True)
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096, help="width of the one large solve")
    parser.add_argument("--small", type=int, default=576, help="width of all cases")
    parser.add_argument("--joint", type=int, default=0, help="width of the MLP of a joint fit")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        if arguments.case == "joint":
            print(json.dumps(run_joint(arguments.width, arguments.joint)))
        else:
            print(json.dumps(run_case(arguments.case, arguments.width)))
        return
    print(f"{'case':18} {'width':>6} {'seconds':>9} {'cpu s':>9} {'peak GB':>7}")
    for name in ("moments only", *STREAM_FAMILIES):
        measure(name, arguments.small, arguments.threads)
    for width in (arguments.small, arguments.width):
        if width != arguments.small:
            measure("ghost", width, arguments.threads)
        ridge = measure("ridge", width, arguments.threads)
        print(
            f"{'':18} {ridge['ratio']:.2f} times a plain Cholesky factorisation and solve; "
            f"needs {ridge['matrices']:.1f} matrices beside the moments",
            flush=True,
        )
        path = measure("ridge path", width, arguments.threads)
        ratio = path["ratio"]
        print(f"{'':18} 50 values cost {ratio:.2f} times one solve (processor time)", flush=True)
    if arguments.joint:
        joint = measure("joint", arguments.width, arguments.threads, arguments.joint)
        print(
            f"{'':18} {arguments.width + arguments.joint} features: moments of {SEQUENCE} tokens "
            f"in {joint['cpu']:.0f} s, solved in {joint['seconds']:.0f} s; normal equations off by "
            f"{joint['off']:.0e} of the right side",
            flush=True,
        )


if __name__ == "__main__":
    main()
