"""Surgery: remove decoder layers from a model and install operators at the gaps."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.boundaries import Boundary, runs
from ghostlib.calibration import calibrate
from ghostlib.checks import warn_of_massive_activations
from ghostlib.collector import Calibration, suited
from ghostlib.excerpts import share
from ghostlib.features import Regressor
from ghostlib.folding import fold
from ghostlib.ghosted import become, ghosted_class, install_boundaries
from ghostlib.models import GHOSTED, fingerprint, hidden_size, keep_layers, num_layers, receiver
from ghostlib.moments import Moments
from ghostlib.operators import OPERATORS, REGRESSORS, Operator, solve
from ghostlib.placement import compute_device
from ghostlib.sequential import fit_sequential


def prune(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """A copy of ``model`` without ``layers`` and without any repair; see `recover`.

    It is of the model's own class, shares every weight with ``model`` and leaves that as it is.
    """
    return _operate(model, runs(layers, num_layers(model)), {})


def recover(
    model: PreTrainedModel,
    calibration: Tensor | Mapping[Boundary, Moments],
    layers: Iterable[int],
    operator: str | Mapping[Boundary, Operator] = "ghost",
    *,
    attention_mask: Tensor | None = None,
    skip_leading: int = 0,
    batch_size: int = 1,
    fit: str = "teacher",
    **options: Any,
) -> PreTrainedModel:
    """Remove ``layers`` from a copy of ``model`` and repair each gap with a closed-form operator.

    Args:
        model: the dense model. It keeps its layers and logits; the copy shares its weights.
        calibration: (windows, length) token ids, for one streaming pass; or moments collected
            before (`calibrate`), which must hold every boundary of ``layers``.
        layers: decoder layers to remove; adjacent ones share one boundary.
        operator: a name from `ghostlib.operators.OPERATORS`, or solved operators by boundary.
        attention_mask, skip_leading, batch_size: as in `calibrate`, when windows are given.
        fit: ``"teacher"``: every boundary from the dense model's streams, in one pass;
            ``"sequential"``: each ``X_pre`` from the model as repaired so far, see
            `fit_sequential`, which needs windows. With one boundary they are the same.
        options: passed on to the solver, such as ``relative_ridge=1e-3``.

    Returns:
        A model of the same family whose ``config.ghost`` lists what was removed and installed, in
        the dtype and on the devices of ``model``. Offloaded weights stay offloaded; the operators
        do not.

    Raises:
        ValueError: layers out of range or repeated, none left, moments of another model, width or
            boundary, an operator of the wrong shape or for another kind of norm, or a model that
            was recovered before.

    Warns:
        MassiveActivationWarning: a few tokens own the squared error the operator minimises.
    """
    gaps = runs(layers, num_layers(model))
    if fit not in ("teacher", "sequential"):
        raise ValueError(f"fit must be 'teacher' or 'sequential', got {fit!r}")
    if isinstance(operator, Mapping):
        return _operate(model, gaps, {gap: _lookup(operator, gap, "operator") for gap in gaps})
    OPERATORS[operator]  # an unknown name is refused before the long pass, not after it
    how: dict[str, Any] = {
        "attention_mask": attention_mask,
        "skip_leading": skip_leading,
        "batch_size": batch_size,
    }
    if fit == "sequential" and len(gaps) > 1:
        if not isinstance(calibration, Tensor):
            raise ValueError(
                "fit='sequential' runs the model as repaired so far: give token windows, "
                "not statistics of the dense model"
            )
        return _operate(
            model, gaps, fit_sequential(model, calibration, gaps, operator, **how, **options)
        )
    regressor = REGRESSORS.get(operator, "stream")
    if isinstance(calibration, Tensor):
        calibration = calibrate(model, calibration, gaps, regressors=[regressor], **how)
    if isinstance(calibration, Calibration):
        calibration = calibration.of(regressor)
    _check_source(model, calibration)
    moments = {gap: _lookup(calibration, gap, "moments") for gap in gaps}
    warn_of_massive_activations(moments, operator)
    return _operate(model, gaps, {gap: solve(moments[gap], operator, **options) for gap in gaps})


def _lookup(known: Mapping[Boundary, Any], gap: Boundary, what: str) -> Any:
    if gap not in known:
        raise ValueError(
            f"no {what} for boundary {gap}, only for {', '.join(map(str, known)) or 'none'}: "
            f"calibrate with boundaries=[Boundary{gap}]"
        )
    return known[gap]


def _check_source(model: PreTrainedModel, calibration: Mapping[Boundary, Moments]) -> None:
    """Refuse moments of another model, another boundary or another width."""
    mine = fingerprint(model)
    for boundary, moments in calibration.items():
        if moments.out_width != hidden_size(model):
            raise ValueError(
                f"moments of width {moments.out_width} do not fit a model of width "
                f"{hidden_size(model)}"
            )
        if moments.boundary not in (None, boundary):
            raise ValueError(f"moments of boundary {moments.boundary} were given for {boundary}")
        if moments.model not in (None, mine):
            raise ValueError(
                f"moments were collected on model {moments.model}, not on {mine}: calibrate again"
            )


def _operate(
    model: PreTrainedModel, gaps: list[Boundary], operators: Mapping[Boundary, Operator]
) -> PreTrainedModel:
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
