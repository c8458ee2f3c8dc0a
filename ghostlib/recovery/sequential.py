"""Sequential fitting: every boundary learns from the model as repaired up to there.

With several boundaries the dense model's ``X_pre`` is not what a later operator will meet: earlier
repairs are not perfect. Here each boundary's ``X_pre`` comes from the model as pruned and repaired
so far, its ``X_post`` still from the dense model.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.common import track
from ghostlib.models.architectures import fingerprint, hidden_size, num_layers
from ghostlib.models.boundaries import Boundary, check_boundary
from ghostlib.models.placement import input_device
from ghostlib.models.streams import check_windows, excerpt, feed, record
from ghostlib.operators.solve import REGRESSORS, Operator, solve
from ghostlib.statistics.calibration import suited
from ghostlib.statistics.features import Regressor, observe
from ghostlib.statistics.moments import Moments


def dense_streams(
    model: PreTrainedModel,
    windows: Tensor,
    indices: Iterable[int],
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 1,
) -> dict[int, Tensor]:
    """The streams that enter layers ``indices`` of the dense model, for `fit_sequential`.

    Several choices of layers can share them. They are kept on the CPU in the model's dtype: 75 MB
    an index for 16 windows of 2,048 tokens at width 576 in float32.

    Returns:
        ``{index: (windows, length, hidden)}``.
    """
    check_windows(model, windows, attention_mask)
    wanted = sorted(set(indices))
    kept: dict[int, list[Tensor]] = {index: [] for index in wanted}
    mask = torch.ones_like(windows) if attention_mask is None else attention_mask
    parts = list(zip(windows.split(batch_size), mask.split(batch_size), strict=True))
    for ids, m in track(parts, "recording", unit="batch"):
        streams = record(model, ids, wanted, attention_mask=m.to(input_device(model)))
        for index, stream in streams.items():
            kept[index].append(stream.cpu())
    return {index: torch.cat(found) for index, found in kept.items()}


def fit_sequential(
    model: PreTrainedModel,
    windows: Tensor,
    boundaries: Sequence[Boundary | tuple[int, int]],
    operator: str = "ghost",
    *,
    attention_mask: Tensor | None = None,
    skip_leading: int = 0,
    batch_size: int = 1,
    streams: Mapping[int, Tensor] | None = None,
    regressor: str | None = None,
    **options: Any,
) -> dict[Boundary, Operator]:
    """Solve one operator per boundary, in order, each on what the earlier ones let through.

    One pass of the dense model records the first ``X_pre`` and every ``X_post``; after that only
    the layers between two boundaries run again, once each. The recorded streams are kept, which
    `calibrate` avoids: (boundaries + 1) times tokens times hidden numbers of the model's dtype.

    Args:
        model: the dense model; it is not changed.
        windows: (windows, length) token ids.
        boundaries: runs of removed layers, in ascending order, with a kept layer between any two.
        operator: a name from `OPERATORS` that acts on the stream.
        attention_mask, skip_leading, batch_size: as in `calibrate`.
        streams: `dense_streams` at the first start and at every stop, where at hand.
        regressor: what ``"branches"`` is solved from, such as ``"x, n(x); 1/|y|"``; the other
            operators' names say it.
        options: passed on to the solver.

    Raises:
        ValueError: boundaries that overlap, touch or are out of order; an operator that does not
            act on the stream; streams of other windows.
    """
    gaps = check_order(boundaries, num_layers(model))
    regressor = regressor or REGRESSORS.get(operator, "stream")
    if regressor == "mlp":
        raise ValueError(f"{operator} does not act on the stream: fit it with fit='teacher'")
    mask = torch.ones_like(windows) if attention_mask is None else attention_mask
    if streams is None:
        wanted = [gaps[0].start, *(gap.stop for gap in gaps)]
        streams = dense_streams(
            model, windows, wanted, attention_mask=attention_mask, batch_size=batch_size
        )
    real = mask.bool()
    used = real & (mask.cumsum(1) > skip_leading)
    x = _stream(streams, gaps[0].start, windows)
    operators: dict[Boundary, Operator] = {}
    for gap, following in zip(gaps, [*gaps[1:], None], strict=True):
        y = _stream(streams, gap.stop, windows)
        moments = _moments(model, gap, regressor, x, y, real, used)
        operators[gap] = solve(moments, operator, **options)
        if following is not None:
            x = operators[gap].apply(x, real)
            part = excerpt(model, gap.stop, following.start)
            x = _through(part, windows, x, mask, batch_size)
    return operators


def check_order(
    boundaries: Iterable[Boundary | tuple[int, int]], num_layers: int
) -> list[Boundary]:
    """Boundaries with a kept layer between any two, in ascending order; `ValueError` otherwise."""
    gaps = [check_boundary(boundary, num_layers) for boundary in boundaries]
    if not gaps:
        raise ValueError("no boundary to fit: name at least one, such as Boundary(12, 19)")
    for before, after in pairwise(gaps):
        if after.start <= before.stop:
            raise ValueError(
                f"boundaries {before} and {after} overlap, touch or are out of order: give the "
                "maximal runs of removed layers in ascending order, as runs(layers, …) does"
            )
    return gaps


def _stream(streams: Mapping[int, Tensor], index: int, windows: Tensor) -> Tensor:
    if index not in streams or streams[index].shape[:2] != windows.shape:
        got = tuple(streams[index].shape) if index in streams else "nothing"
        raise ValueError(
            f"streams must hold index {index} for {tuple(windows.shape)} tokens, got {got}: "
            "record them with dense_streams on the same windows"
        )
    return streams[index]


def _moments(
    model: PreTrainedModel,
    gap: Boundary,
    regressor: str,
    x: Tensor,
    y: Tensor,
    real: Tensor,
    used: Tensor,
) -> Moments:
    width = hidden_size(model)
    about: dict[str, Any] = {"boundary": gap, "model": fingerprint(model)}
    rows = zip(x, y, real, used, strict=True)
    if regressor == "stream":
        moments = Moments(width, **about)
        for before, after, _, u in rows:
            if u.any():
                moments.update(before[u], after[u])
        return moments
    chosen = suited(model, Regressor.parse(regressor))
    moments = Moments(len(chosen.features) * width, width, regressor=str(chosen), **about)
    for before, after, r, u in rows:
        if u.any():
            observe(moments, before, after, r, u)
    return moments


def _through(
    part: PreTrainedModel, windows: Tensor, stream: Tensor, mask: Tensor, batch_size: int
) -> Tensor:
    """What ``stream`` has become behind all layers of ``part``."""
    end, place, passed = num_layers(part), input_device(part), []
    batches = [t.split(batch_size) for t in (windows, stream, mask)]
    for ids, x, m in track(list(zip(*batches, strict=True)), "repairing", unit="batch"):
        with feed(part, x):
            passed.append(record(part, ids, [end], attention_mask=m.to(place))[end].cpu())
    return torch.cat(passed)
