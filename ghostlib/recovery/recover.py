"""Recovery: from calibration windows, or moments collected before, to a repaired model."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.models.architectures import fingerprint, hidden_size, num_layers
from ghostlib.models.boundaries import Boundary, runs
from ghostlib.operators.solve import (
    OPERATORS,
    REGRESSORS,
    Operator,
    solve,
    warn_of_massive_activations,
)
from ghostlib.recovery.recipe import AUTO, Recipe
from ghostlib.recovery.sequential import fit_sequential
from ghostlib.statistics.calibration import Calibration, calibrate
from ghostlib.statistics.moments import Moments
from ghostlib.surgery.cut import operate


def recover(
    model: PreTrainedModel,
    calibration: Tensor | Mapping[Boundary, Moments],
    layers: Iterable[int] | int,
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
        layers: decoder layers to remove; adjacent ones share one boundary. With ``"auto"`` it may
            be their number, and the recipe chooses them too.
        operator: a name from `OPERATORS`, or solved operators by boundary; or
            ``"auto"``: the `Recipe` tries several repairs on calibration tokens that it keeps out
            of the fit, and prints one line about its choice. It needs windows.
        attention_mask, skip_leading, batch_size: as in `calibrate`, when windows are given.
        fit: ``"teacher"``: every boundary from the dense model's streams, in one pass;
            ``"sequential"``: each ``X_pre`` from the model as repaired so far, see
            `fit_sequential`, which needs windows. With one boundary they are the same.
        options: passed on to the solver, such as ``relative_ridge=1e-3``, or to the `Recipe`.

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
    if operator == AUTO:
        if not isinstance(calibration, Tensor):
            raise ValueError(
                "operator='auto' keeps windows out of the fit: give token windows, not statistics"
            )
        if attention_mask is not None or skip_leading or fit != "teacher":
            raise ValueError(
                "operator='auto' fits whole windows of the dense model's text: leave out "
                "attention_mask, skip_leading and fit"
            )
        choice = Recipe(model, calibration, batch_size=batch_size, **options).choose(layers)
        print(choice)
        return choice.apply(model)
    if isinstance(layers, int):
        raise ValueError(
            f"layers must name the layers to remove, got the number {layers}: choose them with "
            f"select_layers(model, calibration, {layers}), or use operator='auto'"
        )
    gaps = runs(layers, num_layers(model))
    if fit not in ("teacher", "sequential"):
        raise ValueError(f"fit must be 'teacher' or 'sequential', got {fit!r}")
    if isinstance(operator, Mapping):
        return operate(model, gaps, {gap: _lookup(operator, gap, "operator") for gap in gaps})
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
        return operate(
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
    return operate(model, gaps, {gap: solve(moments[gap], operator, **options) for gap in gaps})


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
