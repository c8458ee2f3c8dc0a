"""Stored results with the embedded model: experiments, and further draws of the text."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ghostlib.common import atomic_file
from ghostlib.experiments.results import Results, read_results

_DATA = resources.files("ghostlib.tutorial") / "data"

FILES = {"wikitext2.valid.raw": "WikiText-2 valid", "c4.sample.jsonl": "C4 sample"}
"""Local files that some stored results were scored on, and their labels in tables and figures."""


def stored(name: str) -> Results:
    """The results stored under a name.

    ``"grid"``, ``"starts"``, ``"beyond"``, ``"ablation"``: notebooks 15 and 17 name the commands
    that computed them. ``"zeroshot"``, all items of both embedded tasks: notebook 10.
    ``"abilities"``, text and every probe for every block of seven and of four layers: notebook 12.
    Three draws of calibration and test text for claims: ``"seeds"`` of notebooks 08, 10 and 17,
    ``"recipe"`` of 15, ``"draws"`` of 17 on the paper's table 3.
    """
    with resources.as_file(_DATA / f"{name}-smollm2.jsonl") as path:
        return read_results(path)


def over_seeds(
    name: str,
    compute: Callable[[int], Mapping[str, Any]],
    first: Mapping[str, Any],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    rtol: float = 2e-3,
) -> list[dict[str, np.ndarray]]:
    """Measurements of a notebook on several draws of the text, the first computed, the rest stored.

    With ``GHOSTLIB_RECOMPUTE=1`` in the environment all are computed and stored again.

    Args:
        name: of the stored draws.
        compute: function from a seed to ``{name: numbers}``.
        first: its result for the first seed, which the notebook has computed.
        seeds: of the draws.
        rtol: relative tolerance between ``first`` and the stored draw of that seed.

    Raises:
        ValueError: ``first`` differs from the stored draw, so that the others may be stale too.
    """
    path = Path(str(_DATA / f"{name}-draws.json"))
    if os.environ.get("GHOSTLIB_RECOMPUTE") == "1":
        computed = {seed: first if seed == seeds[0] else compute(seed) for seed in seeds}
        lists = {
            seed: {k: np.asarray(v).tolist() for k, v in computed[seed].items()} for seed in seeds
        }
        with atomic_file(path) as new:
            new.write_text(json.dumps(lists), encoding="utf-8")
    by_seed = json.loads(path.read_text(encoding="utf-8"))
    draws = [{k: np.array(v) for k, v in by_seed[str(seed)].items()} for seed in seeds]
    for key, values in draws[0].items():
        if key not in first or not np.allclose(first[key], values, rtol=rtol, atol=0):
            raise ValueError(
                f"{key!r} differs from what is stored in {path.name}: with GHOSTLIB_RECOMPUTE=1 "
                "all draws are computed again"
            )
    return draws
