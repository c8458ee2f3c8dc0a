"""Copying after calibration on text with repetitions, at layers 12 … 18.

    python benchmarks/bench_repetition.py [--seeds 3] [--windows 12] [--length 1024]

Two-branch-relative is fitted four times. Text: as drawn; or with half of each corpus' windows
replaced by a repeated passage of 64, 128, 256 or 512 tokens. Weights: equal; or ten times higher
for tokens whose successor completes a pair seen before in the window. The last two columns are the
squared error of the fit, relative to no repair, on windows as drawn and on repeated windows (some
fits have seen them). Scores: see `copying.py`.
"""

from itertools import cycle, pairwise

import torch
from copying import GAP, Scorer, arguments, calibration
from torch import Tensor
from transformers import PreTrainedModel

import ghostlib as gl
from ghostlib.recovery.sequential import dense_streams

REPEATS, PASSAGES = 10.0, (64, 128, 256, 512)


def repeated(windows: Tensor) -> Tensor:
    """Each window replaced by repetitions of its own beginning."""
    length = windows.shape[1]
    passages = [row[:size] for row, size in zip(windows, cycle(PASSAGES), strict=False)]
    return torch.stack([p.repeat(length // len(p) + 1)[:length] for p in passages])


def weights(ids: Tensor) -> Tensor:
    """(length,) `REPEATS` where the next token completes a pair seen before, 1 elsewhere."""
    seen, values = set(), torch.ones(len(ids))
    for place, pair in enumerate(pairwise(ids.tolist())):
        if pair in seen:
            values[place] = REPEATS
        seen.add(pair)
    return values


def compare(model: PreTrainedModel, windows: Tensor, score: Scorer, seed: int) -> None:
    """Print a line for each calibration of two-branch-relative."""
    family = gl.OPERATORS["two-branch-relative"]
    by_corpus = windows.unflatten(0, (2, -1))
    one, other = (half.flatten(0, 1) for half in by_corpus.tensor_split(2, 1))
    parts = {"one": one, "other": other, "repeated": repeated(other)}
    moments = {}
    for name, rows in parts.items():
        streams = dense_streams(model, rows, GAP)
        x, y = (streams[index] for index in GAP)
        for way in ("alike", "weighted"):
            moments[name, way] = gl.Moments(x.shape[-1], regressor=family.regressor)
            for row, ids in enumerate(rows):
                weight = weights(ids) if way == "weighted" else None
                moments[name, way].update(x[row], y[row], weight)
    for way in ("alike", "weighted"):
        for second in ("other", "repeated"):
            operator = gl.solve(moments["one", way] + moments[second, way], family)
            tests = [moments[part, "alike"] for part in ("other", "repeated")]
            errors = "  ".join(f"{m.error(operator) / m.pruned_error:.3f}" for m in tests)
            case = f"seed {seed} {second:8} {way:8}"
            print(f"{case} {score(operator.apply)}  error {errors}", flush=True)


def main() -> None:
    """Print four lines for each draw of the windows."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="draws of the windows, from 0")
    options = parser.parse_args()
    model, tokenizer = gl.load_model()
    score = Scorer(model, tokenizer, options.rows, options.test_windows)
    for seed in range(options.seeds):
        windows = calibration(tokenizer, options.windows, options.length, seed)
        compare(model, windows, score, seed)


if __name__ == "__main__":
    main()
