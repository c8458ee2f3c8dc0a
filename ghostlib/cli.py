"""The command line: fetch the embedded files, or recover a model and save it.

ghostlib fetch
ghostlib recover smollm2 out-folder --n 7 --operator ghost --corpus wiki
"""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

import ghostlib as gl
from ghostlib import assets


def parser() -> argparse.ArgumentParser:
    """The parser of ``ghostlib``."""
    top = argparse.ArgumentParser(
        prog="ghostlib", description="Remove decoder layers from a causal LM and repair the gap."
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="fetch and check the embedded model and corpus")
    make = commands.add_parser(
        "recover",
        help="prune, recover, score and save a model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    make.add_argument("model", help="smollm2 (embedded), a local folder, or a hub id")
    make.add_argument("output", help="new folder for the recovered model and its tokenizer")
    make.add_argument("--n", type=int, default=7, help="number of layers to remove")
    make.add_argument("--criterion", default="cosine", help=", ".join(gl.CRITERIA))
    make.add_argument("--layers", type=int, nargs="+", help="remove these instead of choosing")
    make.add_argument("--operator", default="ghost", help=", ".join(gl.OPERATORS))
    make.add_argument("--relative-ridge", type=float, help="ridge in units of the mean eigenvalue")
    make.add_argument("--corpus", default="wiki", help=f"{', '.join(gl.CORPORA)}, hub id or file")
    make.add_argument("--windows", type=int, default=16, help="calibration windows")
    make.add_argument("--length", type=int, default=2048, help="tokens of a window")
    make.add_argument("--test-windows", type=int, default=8, help="held-out windows to score")
    make.add_argument("--seed", type=int, default=0, help="which windows are drawn")
    make.add_argument("--dtype", help="float32, bfloat16, …; by default as the model was saved")
    make.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return top


def recover(options: argparse.Namespace) -> None:
    """Carry out ``ghostlib recover``; prints one line a step."""
    if os.path.isdir(options.output) and os.listdir(options.output):
        raise FileExistsError(f"output folder {options.output} is not empty: name a new one")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model, tokenizer = gl.load_model(options.model, dtype=dtype, device=options.device)
    drawn = {"length": options.length, "seed": options.seed}
    calib = gl.token_windows(options.corpus, tokenizer, count=options.windows, **drawn)
    test = gl.token_windows(
        options.corpus, tokenizer, split="test", count=options.test_windows, **drawn
    )
    layers = options.layers or gl.select_layers(model, calib, options.n, options.criterion)
    print(f"removing layers {', '.join(map(str, layers))}")
    ridge = {} if options.relative_ridge is None else {"relative_ridge": options.relative_ridge}
    recovered = gl.recover(model, calib, layers, options.operator, **ridge)
    for name, scored in (
        ("dense", model),
        ("pruned", gl.prune(model, layers)),
        (options.operator, recovered),
    ):
        print(f"{name:>18}: held-out perplexity {gl.perplexity(scored, test):.2f}")
    recovered.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"saved to {options.output}; load it after `import ghostlib`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Bad input ends in one line on standard error."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "fetch":
            for name, path in assets.fetch_all().items():
                print(f"{name}: {path}")
        else:
            recover(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"ghostlib: {error}", file=sys.stderr)
        return 2
    return 0
