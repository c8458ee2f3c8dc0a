"""Held-out alignment error of repairs with more features of a token.

    python benchmarks/bench_features.py [--start 12] [--layers 7] [--windows 16] [--held-out 4]
    python benchmarks/bench_features.py --corpora c4.sample.jsonl --windows 64

One pass, no activation kept. Every set of features is fitted with token weight 1/|y| on the train
windows, with the ridge that is best on the held-out windows: the error printed is the lowest that
this set of features and this many tokens can reach, which no recipe can know. Errors are relative
to the error without repair, with the same weights. Features that `ghostlib` does not have: absolute
values of the normalised stream, its products with the token before, and random layers of it (ReLU
and SwiGLU), fixed by the seed.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

import ghostlib as gl
from ghostlib.models.architectures import hidden_size
from ghostlib.statistics.features import FEATURES, Feature, Regressor, rms_norm

SETS = (
    "x",
    "n(x)",
    "x, n(x)",
    "x, n(x), |n(x)|",
    "x, n(x), relu(n(x) R)",
    "n(x), swiglu(n(x) R)",
    "x, n(x), n(prev)",
)


def add_features(width: int, seed: int) -> None:
    """Register the features that `ghostlib` does not have."""
    generator = torch.Generator().manual_seed(seed)
    R, S = torch.randn(2, width, width, generator=generator).double() / math.sqrt(width)

    def swiglu(X: Tensor) -> Tensor:
        n = rms_norm(X)
        gate: Tensor = silu(n @ R.to(X))
        up: Tensor = n @ S.to(X)
        return gate * up

    features: dict[str, Callable[[Tensor], Tensor]] = {
        "|n(x)|": lambda X: rms_norm(X).abs(),
        "relu(n(x) R)": lambda X: torch.relu(rms_norm(X) @ R.to(X)),
        "swiglu(n(x) R)": swiglu,
    }
    for name, function in features.items():
        FEATURES[name] = Feature(name, function)


def main() -> None:
    """Print a line for each set of features."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=int, default=12, help="first layer to remove")
    parser.add_argument("--layers", type=int, default=7, help="number of layers to remove")
    parser.add_argument("--corpora", nargs="+", default=["wiki", "pydoc"], help="of all windows")
    parser.add_argument("--windows", type=int, default=16, help="to fit, of all corpora together")
    parser.add_argument("--held-out", type=int, default=4, help="to score, of all corpora together")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--weight", default="1/|y|", help="of a token")
    parser.add_argument("--seed", type=int, default=0, help="of windows and random features")
    options = parser.parse_args()
    model, tokenizer = gl.load_model()
    gap, width = gl.Boundary(options.start, options.start + options.layers), hidden_size(model)
    add_features(width, options.seed)
    regressors = [Regressor.parse(f"{features}; {options.weight}") for features in SETS]
    parts = []
    for split, count in (("train", options.windows), ("test", options.held_out)):
        count //= len(options.corpora)
        sampling = {"length": options.length, "count": count, "seed": options.seed, "split": split}
        windows = torch.cat([gl.token_windows(c, tokenizer, **sampling) for c in options.corpora])
        parts.append(gl.calibrate(model, windows, [gap], regressors=regressors))
    print(f"layers {gap.start} … {gap.stop - 1}, weight {options.weight}, seed {options.seed}")
    print(f"{parts[0].tokens:,} tokens to fit, {parts[1].tokens:,} held out")
    for features, regressor in zip(SETS, regressors, strict=True):
        fitted, held_out = (part.of(regressor)[gap] for part in parts)
        path = gl.ridge_path(fitted, held_out=held_out)
        assert path.held_out_error is not None  # held-out moments were given
        error, best = (path.held_out_error / held_out.pruned_error).min(0)
        print(f"{features:24} {float(error):.4f}   ridge {path.ridges[best]:.0e}", flush=True)


if __name__ == "__main__":
    main()
