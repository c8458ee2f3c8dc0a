"""Cost of choosing layers: one pass for all blocks, the residuals of all blocks, one trial.

    python benchmarks/bench_selection.py [--windows 4] [--longest 11] [--threads 2]

On the embedded model, in one process, one after the other:

- plain forward: the whole dense model over the windows, head included, nothing collected;
- every block: `calibrate` for all blocks of up to ``--longest`` layers, similarities and moments;
- residuals: `ghost` solved for every block, after the pass;
- trial: the loss without layers 12 … 18, from the dense stream at the input of layer 12, compared
  with a pass of the pruned model on the same windows.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from memory import peak_gigabytes

import ghostlib as gl
from ghostlib.selection.trials import Trials

REMOVED = tuple(range(12, 19))


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Print seconds, their ratio to a plain forward pass, and the peak of memory so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=4, help="windows of 2,048 tokens")
    parser.add_argument("--longest", type=int, default=11, help="most layers in a block")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = gl.load_model()
    windows = gl.token_windows("wiki", tokenizer, length=2048, count=options.windows)
    total = model.config.num_hidden_layers
    blocks = [b for n in range(1, options.longest + 1) for b in gl.contiguous(n, total)]
    gl.perplexity(model, windows[:1])  # warm-up

    plain = seconds(lambda: gl.perplexity(model, windows))
    print(f"{len(windows)} windows of 2,048 tokens, {len(blocks)} blocks, ", end="")
    print(f"{options.threads} threads")
    print(f"{'what':24} {'seconds':>8} {'÷ plain':>8} {'peak GB':>8}")

    def show(name: str, time: float) -> None:
        print(f"{name:24} {time:8.1f} {time / plain:8.2f} {peak_gigabytes():8.2f}", flush=True)

    show("plain forward", plain)
    stats = gl.Calibration(model="")

    def every_block() -> None:
        nonlocal stats
        stats = gl.calibrate(model, windows, blocks)

    show("every block", seconds(every_block))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gl.SingularGramWarning)  # few windows: not the point here
        show("residuals", seconds(lambda: [gl.solve(stats[b], "ghost") for b in blocks]))
    trials = Trials(model, windows)
    show("trial from layer 12", seconds(lambda: trials.loss(REMOVED)))
    pruned = gl.prune(model, REMOVED)
    show("whole pruned model", seconds(lambda: gl.perplexity(pruned, windows)))


if __name__ == "__main__":
    main()
