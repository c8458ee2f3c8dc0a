"""Sequential fitting: every boundary learns from the model as repaired before it.

With several boundaries a later operator does not receive the dense model's ``X_pre``, because
earlier repairs are not perfect. Here each boundary's ``X_pre`` comes from the model as pruned and
repaired so far, its ``X_post`` still from the dense model.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.common import at_least, checked, track
from ghostlib.models.architectures import fingerprint, hidden_size, looks_back, num_layers
from ghostlib.models.boundaries import Boundary, check_order
from ghostlib.models.layers import listen
from ghostlib.models.placement import input_device
from ghostlib.models.streams import check_windows, excerpt, feed, record
from ghostlib.operators.families import Family
from ghostlib.operators.solve import Operator, check_options, solve, warn_of_massive_activations
from ghostlib.statistics.calibration import empty_moments, suited, usable
from ghostlib.statistics.features import Sources
from ghostlib.surgery.cut import install


def dense_streams(
    model: PreTrainedModel,
    windows: Tensor,
    indices: Iterable[int],
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 1,
) -> dict[int, Tensor]:
    """The streams that enter layers ``indices`` of the dense model, for `fit_sequential`.

    Several sets of layers can share them. They stay on the CPU in the model's dtype: 75 MB per
    index for 16 windows of 2,048 tokens at width 576 in float32.

    Args:
        indices: from 0 to the number of layers, which stands for the final norm.
        model, windows, attention_mask, batch_size: as in `calibrate`.

    Returns:
        ``{index: (windows, length, width)}``.

    Raises:
        ValueError: windows that do not fit the model, or a batch size below 1.
    """
    check_windows(model, windows, attention_mask)
    at_least(1, batch_size=batch_size)
    batches: dict[int, list[Tensor]] = {index: [] for index in sorted(set(indices))}
    mask = torch.ones_like(windows) if attention_mask is None else attention_mask
    inputs = list(zip(windows.split(batch_size), mask.split(batch_size), strict=True))
    for ids, m in track(inputs, "recording", unit="batch"):
        streams = record(model, ids, list(batches), attention_mask=m.to(input_device(model)))
        for index, stream in streams.items():
            batches[index].append(stream.cpu())
    return {index: torch.cat(parts) for index, parts in batches.items()}


@checked
def fit_sequential(
    model: PreTrainedModel,
    windows: Tensor,
    boundaries: Sequence[Boundary | tuple[int, int]],
    operator: str | Family = "ghost",
    *,
    attention_mask: Tensor | None = None,
    skip_leading: int = 0,
    batch_size: int = 1,
    streams: Mapping[int, Tensor] | None = None,
    **options: Any,
) -> dict[Boundary, Operator]:
    """Solve one operator per boundary, in order, each on the output of the earlier ones.

    One pass of the dense model records the first ``X_pre`` and every ``X_post``; after that only
    the layers between two boundaries run again, once each. Unlike in `calibrate`, the streams are
    stored: (boundaries + 1) times tokens times width numbers of the model's dtype.

    Args:
        model: the dense model; it is not changed.
        windows: (windows, length) token ids.
        boundaries: runs of removed layers, in ascending order, with a kept layer between any two.
        operator: a name from `FAMILIES`, or a regressor such as ``"x, n(x); 1/|y|"``.
        attention_mask, skip_leading, batch_size: as in `calibrate`.
        streams: `dense_streams` at the first start and at every stop, if recorded before.
        options: passed on to the solver.

    Raises:
        ValueError: windows or mask that do not fit the model, or leave no token; boundaries that
            overlap, touch or are out of order; a repair of the MLP before a gap that has no layer
            before it; streams of other windows; an option out of range or of another family.

    Warns:
        MassiveActivationWarning: a few tokens own the squared error at one of the boundaries.
        SingularGramWarning: the tokens do not determine a full matrix and no ridge makes up for it.
    """
    family = Family.of(operator)
    check_windows(model, windows, attention_mask)
    check_options(family, options, hidden_size(model))
    mask, real, used = usable(windows, attention_mask, skip_leading, batch_size)
    gaps = check_order(boundaries, num_layers(model))
    if not gaps:
        raise ValueError("no boundary to fit: name at least one, such as Boundary(12, 19)")
    regressor = suited(model, family.regressor)
    family.check_place(gaps)
    if streams is None:
        indices = [gaps[0].start, *(gap.stop for gap in gaps)]
        streams = dense_streams(model, windows, indices, attention_mask=mask, batch_size=batch_size)
    before = Sources(_stream(streams, gaps[0].start, windows))
    if regressor.reads_mlp:
        before = _run(excerpt(model, 0, gaps[0].start), windows, None, mask, batch_size, True)
    operators: dict[Boundary, Operator] = {}
    for gap, following in zip(gaps, [*gaps[1:], None], strict=True):
        moments = empty_moments(model, gap, regressor, fingerprint(model))
        after = _stream(streams, gap.stop, windows)
        for row in range(len(windows)):
            if used[row].any():
                x, hidden, output = before.map(lambda part, row=row: part[row])  # type: ignore[misc]
                sources = {"hidden": hidden, "output": output}
                moments.update(x, after[row], real=real[row], used=used[row], **sources)
        warn_of_massive_activations({gap: moments}, family)
        operators[gap] = solve(moments, family, **options)
        if following is not None:
            x, hidden, output = before
            repaired: Tensor | None = operators[gap].apply(x, real, hidden=hidden, output=output)
            if looks_back(model):  # every layer before the following gap, repaired so far
                recovered = install(model, dict(operators), at_gap=True)
                removed = sum(len(fitted.removed) for fitted in operators)
                part, repaired = excerpt(recovered, 0, following.start - removed), None
            else:
                part = excerpt(model, gap.stop, following.start)
            before = _run(part, windows, repaired, mask, batch_size, regressor.reads_mlp)
    return operators


def _stream(streams: Mapping[int, Tensor], index: int, windows: Tensor) -> Tensor:
    if index not in streams or streams[index].shape[:2] != windows.shape:
        got = tuple(streams[index].shape) if index in streams else "nothing"
        raise ValueError(
            f"streams must hold index {index} for {tuple(windows.shape)} tokens, got {got}: "
            "record them with dense_streams on the same windows"
        )
    return streams[index]


def _run(
    part: PreTrainedModel,
    windows: Tensor,
    stream: Tensor | None,
    mask: Tensor,
    batch_size: int,
    with_mlp: bool,
) -> Sources:
    """``stream``, or the embeddings, after all layers of ``part``, and the last layer's MLP."""
    end = num_layers(part)
    outputs: list[Sources] = []
    mlp: list[tuple[Tensor, Tensor]] = []
    rows = range(0, len(windows), batch_size)
    with listen(part, [end] if with_mlp else [], lambda _, read, out: mlp.append((read, out))):
        for first in track(rows, "repairing", unit="batch"):
            batch = slice(first, first + batch_size)
            m = mask[batch].to(input_device(part))
            with nullcontext() if stream is None else feed(part, stream[batch]):
                x = record(part, windows[batch], [end], attention_mask=m)[end]
            read = [t.view(*x.shape[:2], -1) for t in mlp.pop()] if with_mlp else ()
            outputs.append(Sources(x, *read).map(lambda t: t.cpu()))
    fields: Any = zip(*outputs, strict=True)
    joined: Any = (None if field[0] is None else torch.cat(field) for field in fields)
    return Sources(*joined)
