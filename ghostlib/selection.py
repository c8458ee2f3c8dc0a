"""Selection: which layers to remove, and the scores that say why."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.boundaries import Boundary, contiguous
from ghostlib.calibration import Calibration, Similarity, calibrate
from ghostlib.models import num_layers
from ghostlib.registry import Registry


class Selection(tuple[int, ...]):
    """The layers to remove, in ascending order, with the scores that decided.

    Attributes:
        criterion: name of the criterion.
        n: how many layers were asked for.
        scores: ``{Boundary: score}`` of every candidate block or layer.
    """

    criterion: str
    scores: dict[Boundary, float]

    def __new__(
        cls, layers: range | list[int], criterion: str, scores: Mapping[Boundary, float]
    ) -> "Selection":
        selection = super().__new__(cls, sorted(layers))
        selection.criterion = criterion
        selection.scores = dict(scores)
        return selection


class Criterion(NamedTuple):
    """The candidates a criterion must see, and the score it gives each; low is removed first."""

    candidates: Callable[[int, int], list[Boundary]]
    score: Callable[[Similarity], float]


def _each_layer(n: int, total: int) -> list[Boundary]:
    contiguous(n, total)  # checks n
    return contiguous(1, total)


CRITERIA: Registry[Criterion] = Registry("criterion")
# The block whose ends point the same way does least (LLM-Streamline, arXiv 2403.19135).
CRITERIA["cosine"] = Criterion(contiguous, lambda s: -s.cosine)
# The same by mean angle (Gromov et al., arXiv 2403.17887).
CRITERIA["angular"] = Criterion(contiguous, lambda s: s.angular)
# Single layers anywhere, by how little each turns the stream (ShortGPT, arXiv 2403.03853).
CRITERIA["block-influence"] = Criterion(_each_layer, lambda s: 1 - s.cosine)


def select_layers(
    model: PreTrainedModel,
    calibration: Tensor | Calibration,
    n: int,
    criterion: str = "cosine",
    *,
    attention_mask: Tensor | None = None,
    skip_leading: int = 0,
    batch_size: int = 1,
) -> Selection:
    """Choose ``n`` decoder layers of ``model`` to remove.

    Args:
        model: the dense model.
        calibration: (windows, length) token ids, or a `Calibration` that holds the similarities.
        n: number of layers to remove.
        criterion: a name from `CRITERIA`. Every candidate is considered, first and last layers
            included; ties go to the lower index.
        attention_mask, skip_leading, batch_size: as in `calibrate`, when windows are given.

    Returns:
        `Selection`: a tuple of layer indices with ``.scores``, lowest removed.

    Raises:
        ValueError: unknown criterion, ``n`` out of range, or a calibration that lacks candidates.
    """
    rule = CRITERIA[criterion]
    candidates = rule.candidates(n, num_layers(model))
    if isinstance(calibration, Tensor):
        calibration = calibrate(
            model,
            calibration,
            candidates,
            attention_mask=attention_mask,
            skip_leading=skip_leading,
            batch_size=batch_size,
            moments=False,
        )
    if missing := [b for b in candidates if b not in calibration.similarities]:
        raise ValueError(
            f"criterion {criterion!r} with n = {n} needs boundaries the calibration lacks, "
            f"such as {missing[0]}: calibrate with boundaries=… all {len(candidates)} of them"
        )
    scores = {b: rule.score(calibration.similarities[b]) for b in candidates}
    ranked = sorted(candidates, key=lambda b: (scores[b], b))
    chosen = ranked[:1] if len(ranked[0].removed) == n else ranked[:n]
    return Selection([layer for b in chosen for layer in b.removed], criterion, scores)
