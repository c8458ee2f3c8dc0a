"""Repairs with ridges chosen on held-out calibration tokens, scored over several seeds.

    python benchmarks/bench_ridges.py refit.jsonl --seed 0

Of 4 calibration windows of 1,024 tokens of each corpus the last is kept out of the fit and chooses
a relative ridge for each feature; the operator is then solved from all of them. Scored on 16
held-out windows of 128 tokens of each corpus. The file resumes, and files of several seeds are
joined by ``cat``: this made ``refit-smollm2.jsonl``, which notebook 16 reads.
"""

import argparse
import math

import torch

import ghostlib as gl
from ghostlib.experiments.results import Results

REPAIRS = {gl.Boundary(12, 19): ("replaceme", "refit", "ghost", "ghost-refit")}


def main() -> None:
    """Append the cells of one seed to a results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="results file, made or resumed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    layers = [gap.removed for gap in REPAIRS]
    plan = gl.Specification(
        layers=layers, windows=4, length=1024, test_windows=16, test_length=128, seed=options.seed
    )
    model, tokenizer = plan.load()
    results = Results(options.output)
    results.begin(plan.identity(model) | {"ridges": "chosen"})

    windows = plan.draw_calibration(tokenizer)
    judges = torch.zeros(len(windows), dtype=torch.bool)
    judges[3::4] = True
    trials = {}
    for corpus in plan.perplexity:
        text = plan.draw_test(tokenizer, corpus)
        trials[corpus] = gl.Trials(model, text.windows), text
    models = [((), "dense", {})] + [(tuple(gap.removed), "pruned", {}) for gap in REPAIRS]
    for gap, repairs in REPAIRS.items():
        regressors = {gl.OPERATORS[name].regressor for name in repairs}
        fit = gl.calibrate(model, windows[~judges], [gap], regressors=regressors)
        held_out = gl.calibrate(model, windows[judges], [gap], regressors=regressors)
        for name in repairs:
            here, there = (part.of(gl.OPERATORS[name].regressor)[gap] for part in (fit, held_out))
            ridges = gl.choose_ridges(here, there)
            solved = gl.solve(here + there, name, relative_ridge=ridges)
            models.append((tuple(gap.removed), name, {gap: solved}))
    for removed, name, operators in models:
        for corpus, (trial, text) in trials.items():
            losses = trial.losses(removed, operators)
            count, length = text.windows.shape
            value, half = float(losses.mean()), float(losses.std()) * 2.131 / math.sqrt(count)
            results.append(
                "score",
                layers=gl.spell(removed) if removed else "",
                operator=name,
                measure="perplexity",
                dataset=corpus,
                **dict(
                    zip(
                        ("value", "low", "high"),
                        map(math.exp, (value, value - half, value + half)),
                        strict=True,
                    )
                ),
                split=text.split,
                windows=count,
                length=length,
                tokens=count * (length - 1),
                bytes=text.bytes,
                losses=losses,
            )
    results.close()


if __name__ == "__main__":
    main()
