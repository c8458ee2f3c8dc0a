"""The numbers the paper reports, and where each was read, to compare with what is measured here.

They stand in ``data/paper_results.csv`` as published; those read second hand are marked as such.
"""

from importlib.resources import files
from typing import Any

import pandas as pd

# The paper's rows, under the names that operators have here.
_OPERATORS = {"none": "pruned", "replaceme-ls": "replaceme"}


def published(**wanted: Any) -> pd.DataFrame:
    """Published results, all or those with the given values.

    Args:
        wanted: a value, or a list of values, for any of the columns: ``source``, ``section`` (where
            it stands), ``model``, ``criterion``, ``removed`` and ``of`` (layers), ``operator``
            (``"pruned"`` is no recovery), ``metric``, ``value``.

    Returns:
        A row for each number, in the order of the file.

    Raises:
        ValueError: no such column, or a value that no row has; the message lists what there is.

    >>> rows = published(model="Llama-3.1-8B", criterion="cosine", section="Table 2", removed=7)
    >>> rows.set_index("operator")["value"]["ghost"].item()
    60.01
    """
    with (files("ghostlib.tutorial") / "data" / "paper_results.csv").open(encoding="utf-8") as file:
        rows = pd.read_csv(file).replace({"operator": _OPERATORS})
    for column, values in wanted.items():
        if column not in rows:
            raise ValueError(f"no column {column!r}: use one of {', '.join(rows)}")
        listed = values if isinstance(values, list | tuple) else [values]
        known = list(dict.fromkeys(rows[column]))
        if unknown := [value for value in listed if value not in known]:
            raise ValueError(
                f"nothing published with {column} = {unknown[0]!r} here: "
                f"there is {', '.join(map(str, known))}"
            )
        rows = rows[rows[column].isin(listed)]
    return rows.reset_index(drop=True)
