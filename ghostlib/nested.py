"""Nested regressors: the moments of many features side by side contain those of some of them.

With one weight of tokens, ``G``, ``B`` and the sums of ``[f_1(X), f_2(X), f_3(X)]`` hold those of
``[f_1(X), f_2(X)]`` as blocks. So a pass collects the widest regressors alone.
"""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ghostlib.features import Regressor
from ghostlib.moments import Moments


def contains(wide: Regressor, narrow: Regressor) -> bool:
    """Whether moments of ``wide`` hold those of ``narrow``."""
    return wide.weight == narrow.weight and set(narrow.features) <= set(wide.features)


def widest(regressors: Iterable[Regressor]) -> list[Regressor]:
    """The fewest of ``regressors`` whose moments hold those of all.

    >>> [str(r) for r in widest(map(Regressor.parse, ["x", "x, n(x)", "x; 1/|y|"]))]
    ['x, n(x)', 'x; 1/|y|']
    """
    found: list[Regressor] = []
    for regressor in sorted(regressors, key=lambda r: (-len(r.features), str(r))):
        if not any(contains(wide, regressor) for wide in found):
            found.append(regressor)
    return found


def part(moments: Moments, places: Sequence[int]) -> Moments:
    """The moments of some of the features that ``moments`` has side by side.

    The first ones are given as views. What does not depend on features is shared: sums are rebound,
    never changed in place.

    Args:
        moments: of k features (tokens, k C) and Delta (tokens, C).
        places: which of them, from 0 to k - 1, in the order they are wanted in.
    """
    C, whole = moments.out_width, Regressor.parse(moments.regressor)
    columns: slice | Tensor = slice(len(places) * C)
    if list(places) != list(range(len(places))):
        columns = torch.cat([torch.arange(place * C, (place + 1) * C) for place in places])
    found = copy.copy(moments)
    found.regressor = str(whole._replace(features=tuple(whole.features[i] for i in places)))
    found.G = moments.G[columns][:, columns]
    found.B, found.x1, found.x_abs = (t[columns] for t in (moments.B, moments.x1, moments.x_abs))
    return found
