"""The numbers the paper reports, with their sources, for comparison with our measurements.

``data/paper_results.csv`` has them as published; numbers read second hand are marked as such.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

# the paper's names of operators: ours
_OPERATORS = {"none": "pruned", "replaceme-ls": "replaceme"}


def published(**filters: Any) -> pd.DataFrame:
    """Published results, filtered by column.

    Args:
        filters: a value, or a list of values, for any of the columns: ``source``, ``section``,
            ``model``, ``criterion``, ``removed`` and ``of`` (layers), ``operator`` (``"pruned"`` is
            no recovery), ``metric``, ``value``.

    Returns:
        A row for each number, in the order of the file.

    Raises:
        ValueError: an unknown column, or a value that no row has; the message lists the known ones.

    >>> rows = published(model="Llama-3.1-8B", criterion="cosine", section="Table 2", removed=7)
    >>> rows.set_index("operator")["value"]["ghost"].item()
    60.01
    """
    with (files("ghostlib.tutorial") / "data" / "paper_results.csv").open(encoding="utf-8") as file:
        rows = pd.read_csv(file).replace({"operator": _OPERATORS})
    for column, value in filters.items():
        if column not in rows:
            raise ValueError(f"no column {column!r}: use one of {', '.join(rows)}")
        values = value if isinstance(value, list | tuple) else [value]
        known = list(dict.fromkeys(rows[column]))
        if unknown := [value for value in values if value not in known]:
            raise ValueError(
                f"nothing published with {column} = {unknown[0]!r} here: "
                f"there is {', '.join(map(str, known))}"
            )
        rows = rows[rows[column].isin(values)]
    return rows.reset_index(drop=True)


_RENAMED = {"Meta-Llama-3-8B": "LLaMA-3-8B"}  # the paper's spelling of a name on the hub
_DEFAULT = "Llama-3.1-8B"


def main_table(
    metric: str, *, model: str = _DEFAULT, criterion: str = "cosine", removed: int = 7
) -> tuple[dict[str, float], str]:
    """A column of the paper's tables 2 and 3: an average for each operator, and its label.

    Args:
        metric: as in `published`, an average over tasks or corpora.
        model: a name or path on the hub; Llama-3.1-8B if the paper does not have it.
        criterion: of the choice of layers; cosine if the paper does not have it.
        removed: number of layers; 7 if the paper does not have it.

    Returns:
        ``({operator: value}, label)``; no values if none were published for the model.

    >>> main_table("accuracy mean of 9 tasks %", model="meta-llama/Llama-3.1-8B")[1]
    'Llama-3.1-8B, 7 of 32, cosine'
    """
    rows, name = published(metric=metric), Path(model).name
    name = _RENAMED.get(name, name)
    name = name if name in set(published()["model"]) else _DEFAULT
    rows = rows[(rows["model"] == name) & rows["section"].isin(["Table 2", "Table 3"])]
    criterion = criterion if criterion in set(rows["criterion"]) else "cosine"
    rows = rows[rows["criterion"].isin([criterion, "-"])]
    depth = removed if removed in set(rows["removed"]) - {0} else 7
    rows = rows[rows["removed"].isin([0, depth])]
    values = {str(k): float(v) for k, v in rows.set_index("operator")["value"].items()}
    return values, f"{name}, {depth} of 32, {criterion}"
