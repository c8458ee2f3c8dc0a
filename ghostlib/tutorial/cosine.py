"""ReplaceMe's other objective: the angle between streams, which has no closed form."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlib.common import checked, track
from ghostlib.models.architectures import num_layers
from ghostlib.models.boundaries import Boundary, check_boundary
from ghostlib.models.layers import listen
from ghostlib.models.placement import input_device
from ghostlib.models.streams import check_windows, tap
from ghostlib.operators.families import FAMILIES
from ghostlib.operators.solve import Operator

REPLACEME_COSINE = replace(
    FAMILIES["replaceme"],
    name="replaceme-cosine",
    searches="every matrix on the output of the last MLP, by the angle of the stream",
    color="#d8a27f",
    least_squares=False,
)


class MlpActivations(NamedTuple):
    """Activations around a gap, each (tokens, hidden) in float32 on the CPU.

    Attributes:
        F: output of the last MLP before the gap.
        R: rest of the stream there, ``X_pre - F``.
        Y: ``X_post``.
    """

    F: Tensor
    R: Tensor
    Y: Tensor


def mlp_activations(
    model: PreTrainedModel, windows: Tensor, boundary: Boundary | tuple[int, int]
) -> MlpActivations:
    """`MlpActivations` of every token: 3 x tokens x hidden x 4 bytes.

    Raises:
        ValueError: a boundary at layer 0, or windows that do not fit the model.
    """
    gap = check_boundary(boundary, num_layers(model))
    check_windows(model, windows)
    if gap.start == 0:
        raise ValueError("boundary starts at layer 0: no MLP is before it")
    outputs: list[Tensor] = []
    streams: dict[int, Tensor] = {}
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with (
        listen(model, [gap.start], lambda start, read, output: outputs.append(output)),
        tap(model, gap, streams.__setitem__) as run,
    ):
        for ids in track(torch.split(windows, 1), "collecting"):
            run(input_ids=ids.to(input_device(model)))
            F, x, y = (
                t.float().cpu().flatten(0, -2)
                for t in (outputs.pop(), streams[gap.start], streams[gap.stop])
            )
            parts.append((F, x - F, y))
    return MlpActivations(*(torch.cat(column) for column in zip(*parts, strict=True)))


@checked
def fit_cosine(
    activations: MlpActivations,
    *,
    steps: int = 200,
    batch: int = 1024,
    learning_rate: float = 1e-3,
    seed: int = 0,
    start: Tensor | None = None,
) -> Operator:
    """``T`` that minimises the mean of ``1 - cos(R + F T, Y)`` over tokens (arXiv 2505.02819).

    Adam on random batches, with cosine decay of the learning rate to zero. Unlike in least squares,
    all tokens have the same weight, independent of their norm.

    Args:
        activations: from `mlp_activations`.
        steps: of the optimiser.
        batch: tokens per step, drawn with replacement.
        learning_rate: at the first step.
        seed: of the batches.
        start: initial ``T`` (hidden, hidden), such as the solution of `replaceme`; the identity by
            default, which needs many more steps.

    Returns:
        `Operator` of the family `REPLACEME_COSINE`, for `install`.

    Raises:
        ValueError: an option out of range, or an objective that became NaN.
    """
    for name, value in (("steps", steps), ("batch", batch), ("learning_rate", learning_rate)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    F, R, Y = activations
    generator = torch.Generator().manual_seed(seed)
    T = (torch.eye(F.shape[1]) if start is None else start.float().clone()).requires_grad_()
    optimiser = torch.optim.Adam([T], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in track(range(steps), "fitting", unit="step"):
        rows = torch.randint(len(F), (min(batch, len(F)),), generator=generator)
        loss = 1 - nn.functional.cosine_similarity(R[rows] + F[rows] @ T, Y[rows]).mean()
        if not math.isfinite(loss.item()):
            raise ValueError(f"the cosine objective became {loss.item()}: lower learning_rate")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    W = T.detach()
    residual = float((R + F @ W - Y).double().square().sum())
    return Operator.of(W.double(), REPLACEME_COSINE, residual=residual)
