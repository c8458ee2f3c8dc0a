"""Files of a grid, read back as tables."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import pandas as pd

from ghostlib.models.boundaries import spell


def stored(name: str) -> dict[str, Any]:
    """A results file of the embedded model that comes with the package: ``"grid"``, ``"starts"``.

    Notebook 13 names the commands that computed them.
    """
    path = resources.files("ghostlib.tutorial") / "data" / f"{name}-smollm2.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def scored(results: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of what was scored: layers, repair, corpus, perplexity, dense perplexity.

    Args:
        results: the cells of a `Results` file.
    """
    dense = {corpus: _perplexity(losses) for corpus, losses in results["dense"].items()}
    rows = []
    for key, by_corpus in results.items():
        repair, found, layers = key.rpartition(" without ")
        if found:
            rows += [
                {
                    "layers": layers,
                    "repair": repair,
                    "corpus": corpus,
                    "perplexity": _perplexity(losses),
                    "dense": dense[corpus],
                }
                for corpus, losses in by_corpus.items()
            ]
    return pd.DataFrame(rows)


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of a grid: criterion and n, and what was `scored` of the layers they choose."""
    chosen = []
    for key, value in results.items():
        if key.startswith("select "):
            _, criterion, n = key.split()
            chosen.append({"criterion": criterion, "n": int(n), "layers": spell(value["layers"])})
    return pd.DataFrame(chosen).merge(scored(results), on="layers")


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(sum(losses) / len(losses))
