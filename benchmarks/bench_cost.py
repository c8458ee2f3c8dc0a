"""Prefill and decode of the dense, pruned and recovered models, side by side.

    python benchmarks/bench_cost.py [--prompts 512 2048] [--new 16] [--repeats 7] [--threads 2]
    python benchmarks/bench_cost.py --model NAME --start 20 --layers 7 --device cuda

By default layers 12 … 18 of the embedded model are removed. The models take turns in one process.
Ratios of median times are printed with the ratio of counted operations and the ideal, all layers to
kept layers. On a CPU the peak of memory comes from a process of its own that loads a saved model
and runs it once (interpreter and torch included); on a GPU it is the memory allocated beyond the
weights. The operators come from few tokens: their values do not affect their cost.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from memory import peak_gigabytes
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import ghostlib as gl
from ghostlib.evaluation.cost import Spread

REPAIRS = ("linearpatch-r", "ghost", "two-branch-relative", "three-branch-relative")


def dense_and_repaired(options: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """The dense model, the pruned model and every repair."""
    model, tokenizer = gl.load_model(options.model, dtype=options.dtype, device=options.device)
    gap = gl.Boundary(options.start, options.start + options.layers)
    windows = gl.token_windows("wiki", tokenizer, length=1024, count=2)
    regressors = [gl.OPERATORS[name].regressor for name in REPAIRS]
    stats = gl.calibrate(model, windows, [gap], regressors=regressors)
    models = {"dense": model, "pruned": gl.prune(model, gap.removed)}
    for name in REPAIRS:
        models[name] = gl.recover(model, stats, gap.removed, operator=name)
    return models


def peak(model: PreTrainedModel, prompt: int, options: argparse.Namespace) -> float:
    """Peak memory in GB of loading ``model`` and reading one prompt, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        command = [sys.executable, __file__, "--case", folder, "--prompts", str(prompt)]
        command += ["--new", str(options.new), "--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout))


def run_case(folder: Path, options: argparse.Namespace) -> None:
    """Measure one saved model in this process."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    gl.latency({"saved": model}, options.prompts[0], options.new, warmup=0, repeats=1)
    print(json.dumps(peak_gigabytes()))


def milliseconds(seconds: Spread) -> str:
    """Median, minimum and maximum in milliseconds."""
    return "{:8.1f} ({:.1f} … {:.1f})".format(*(1e3 * s for s in seconds))


def compare(models: dict[str, PreTrainedModel], prompt: int, options: argparse.Namespace) -> None:
    """Print times, peaks and ratios for one length of prompt."""
    timed = gl.latency(models, prompt, options.new, repeats=options.repeats)
    counted = {
        name: (gl.flops(m, prompt).total, gl.flops(m, 1, context=prompt).total)
        for name, m in models.items()
    }
    print(f"\nprompt of {prompt:,} tokens, {options.new} new ones; median (least … most)")
    columns = ("model", "prefill ms", "decode ms a token", "cache MB", "peak GB")
    row = "{:22} {:>30} {:>30} {:>9} {:>8}"
    print(row.format(*columns))
    for name, model in models.items():
        times, cache = timed[name], gl.cache_bytes(model, prompt) / 1e6
        on_device = times.peak_bytes
        memory = peak(model, prompt, options) if on_device is None else on_device / 1e9
        spreads = milliseconds(times.prefill), milliseconds(times.decode)
        print(row.format(name, *spreads, f"{cache:.1f}", f"{memory:.2f}"), flush=True)
    pairs = [("ghost", "pruned"), ("dense", "ghost"), *((name, "ghost") for name in REPAIRS)]
    for over, under in (pair for pair in pairs if pair[0] != pair[1]):
        a, b = timed[over], timed[under]
        prefill, decode = (x / y for x, y in zip(counted[over], counted[under], strict=True))
        print(
            f"{over} ÷ {under}: prefill {a.prefill.median / b.prefill.median:.3f} "
            f"(counted {prefill:.3f}), decode {a.decode.median / b.decode.median:.3f} "
            f"(counted {decode:.3f})"
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="name or folder of the dense model")
    parser.add_argument("--dtype", help="its data type, such as bfloat16")
    parser.add_argument("--device", help="where to run it, such as cuda")
    parser.add_argument("--start", type=int, default=12, help="first layer to remove")
    parser.add_argument("--layers", type=int, default=7, help="number of layers to remove")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048], help="their tokens")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        run_case(options.case, options)
        return
    models = dense_and_repaired(options)
    total, kept = (models[name].config.num_hidden_layers for name in ("dense", "pruned"))
    print(f"{total} layers, {kept} kept: ideal dense ÷ ghost {total / kept:.3f}")
    for name, model in models.items():
        print(f"{name:22} {gl.count_parameters(model):13,} parameters, ", end="")
        print(f"{gl.weight_bytes(model) / 1e6:,.0f} MB")
    for prompt in options.prompts:
        compare(models, prompt, options)


if __name__ == "__main__":
    main()
