"""Surgery: remove decoder layers from a model and install operators at the gaps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.models.architectures import (
    GHOSTED,
    check_layers,
    hidden_size,
    keep_layers,
    num_layers,
    receiver,
)
from ghostlib.models.boundaries import Boundary, runs
from ghostlib.models.placement import compute_device
from ghostlib.models.streams import share
from ghostlib.operators.solve import Operator
from ghostlib.statistics.calibration import suited
from ghostlib.statistics.features import Regressor
from ghostlib.surgery.folding import fold
from ghostlib.surgery.ghosted import become, ghosted_class, install_boundaries


def prune(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """A copy of ``model`` without ``layers`` and without any repair; see `recover`.

    It is of the model's own class, shares every weight with ``model`` and leaves that as it is.
    """
    return operate(model, runs(layers, num_layers(model)), {})


def operate(
    model: PreTrainedModel, gaps: Sequence[Boundary], operators: Mapping[Boundary, Operator]
) -> PreTrainedModel:
    """A copy of ``model`` without the layers in ``gaps`` and with solved ``operators`` in place.

    Args:
        model: the dense model; it is not changed, and the copy shares its weights.
        gaps: maximal runs of removed layers, as `runs` gives them.
        operators: of all gaps or some; the others stay without repair.

    Raises:
        ValueError: as `recover`.
    """
    if model.config.model_type.startswith(GHOSTED):
        raise ValueError(
            "this model was recovered before: start from the dense model, name all layers"
        )
    total = num_layers(model)
    for gap in gaps:
        receiver(model, gap.stop)  # refuses a gap that nothing receives
        if operator := operators.get(gap):
            _check_operator(model, gap, operator)
    recovered = share(model)
    removed = {layer for gap in gaps for layer in gap.removed}
    kept = [layer for layer in range(total) if layer not in removed]
    keep_layers(recovered, kept)
    check_layers(recovered, model)

    places = {gap: sum(layer < gap.stop for layer in kept) for gap in gaps}
    folded = fold(recovered, operators, places)
    install = {
        gap: op
        for gap in gaps
        if (op := operators.get(gap)) and op.name != "identity" and gap not in folded
    }
    if install:
        _install(recovered, install, places)
    return recovered


def _check_operator(model: PreTrainedModel, gap: Boundary, operator: Operator) -> None:
    """Refuse an operator of another width, or one that reads what this model's layers do not."""
    width, features = hidden_size(model), operator.features
    shape = (max(len(features), 1) * width, width)
    if operator.W.shape != shape:
        raise ValueError(
            f"operator for boundary {gap} must have shape {shape}, got {tuple(operator.W.shape)}"
        )
    fitting = suited(model, Regressor(features)).features
    if features != fitting:
        raise ValueError(
            f"operator for boundary {gap} reads {', '.join(features)}, and the layers of a "
            f"{model.config.model_type} read {', '.join(fitting)}: solve it from this model"
        )


def _install(
    recovered: PreTrainedModel, install: Mapping[Boundary, Operator], places: Mapping[Boundary, int]
) -> None:
    """Make ``recovered`` a ghosted model, in place, with a module for each operator."""
    factors = {gap: _factors(op.M) for gap, op in install.items() if _is_low_rank(op)}
    cls = ghosted_class(recovered.config.model_type)
    become(recovered, cls)
    recovered.config.__class__ = cls.config_class  # type: ignore[assignment]
    recovered.config.ghost = [
        {
            "receiver": places[gap],
            "removed": list(gap.removed),
            "operator": operator.name,
            "bias": operator.bias is not None,
            "rank": factors[gap][0].shape[1] if gap in factors else None,
            "features": list(operator.features or ("x",)),
        }
        for gap, operator in install.items()
    ]
    install_boundaries(recovered)
    for (gap, operator), entry in zip(install.items(), recovered.config.ghost, strict=True):
        module: Any = receiver(recovered, entry["receiver"])
        device, dtype = compute_device(module), next(module.parameters()).dtype
        low_rank = gap in factors
        values = dict(zip("AB", factors[gap], strict=True)) if low_rank else {"M": operator.M}
        if operator.bias is not None:
            values["b"] = operator.bias
        for name, value in values.items():
            # on the CPU first: not every device has float64
            getattr(module.boundary, name).data = value.cpu().to(dtype).to(device)


def _is_low_rank(operator: Operator) -> bool:
    """Whether its matrix has fewer degrees of freedom than numbers, because its rank is bounded."""
    bias = 0 if operator.bias is None else len(operator.bias)
    branched = bool(operator.features) and operator.dof - bias < operator.W.numel()
    return operator.name == "low-rank" or branched


def _factors(M: Tensor) -> tuple[Tensor, Tensor]:
    """``M = A B`` with as few columns of ``A`` as the rank of ``M``, and both alike in size."""
    U, s, Vh = torch.linalg.svd(M)
    rank = max(int((s > 1e-10 * s[0]).sum()), 1)
    root = s[:rank].sqrt()
    return (U[:, :rank] * root).contiguous(), (root[:, None] * Vh[:rank]).contiguous()
