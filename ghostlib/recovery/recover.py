"""Recover: from calibration windows, or moments collected before, to a repaired model."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.common import AUTO, checked
from ghostlib.models.architectures import check_origin, hidden_size, num_layers
from ghostlib.models.boundaries import Boundary, runs
from ghostlib.operators.families import Family
from ghostlib.operators.solve import check_options, solve, warn_of_massive_activations
from ghostlib.recovery.recipe import Recipe
from ghostlib.recovery.sequential import fit_sequential
from ghostlib.statistics.calibration import Calibration, calibrate
from ghostlib.statistics.moments import Moments
from ghostlib.surgery.cut import check_dense, install
from ghostlib.surgery.installers import check_place


@checked
def recover(
    model: PreTrainedModel,
    calibration: Tensor | Mapping[Boundary, Moments],
    layers: Iterable[int] | int,
    operator: "str | Family" = "ghost",  # in quotes, so that the messages below replace `checked`'s
    *,
    attention_mask: Tensor | None = None,
    skip_leading: int | None = None,
    batch_size: int | None = None,
    fit: str = "teacher",
    share: bool = True,
    verbose: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Remove ``layers`` from a copy of ``model`` and repair each gap with a closed-form operator.

    To install operators that were solved elsewhere, see `install`.

    Args:
        model: the dense model. It keeps its layers and logits; the copy shares its weights, so
            that training the copy changes both: see ``share``.
        calibration: (windows, length) token ids, for one streaming pass; or moments that
            `calibrate` collected, which must hold every boundary of ``layers``.
        layers: decoder layers to remove; adjacent ones share one boundary. With ``"auto"`` it may
            be their number, and the recipe chooses them too.
        operator: a name from `FAMILIES`, a regressor such as ``"x, n(x); 1/|y|"``, or ``"auto"``:
            the `Recipe` tries several repairs on calibration tokens held out of the fit. Repairs
            that need a ridge (``refit`` and its kin) choose it on such tokens as well, where
            windows and no options are given.
        attention_mask: (windows, length), 0 at padding, when windows are given.
        skip_leading: first positions of each window to leave out, when windows are given.
        batch_size: windows per forward pass, when windows are given; 1 by default.
        fit: ``"teacher"``: every boundary from the dense model's streams, in one pass;
            ``"sequential"``: each ``X_pre`` from the model as repaired so far, see
            `fit_sequential`, which needs windows. With one boundary they are the same.
        share: False gives the copy weights of its own, to be trained or changed in place.
        verbose: print one line about the choice of ``"auto"``.
        options: passed on to the solver, such as ``relative_ridge=1e-3``, or to the `Recipe`.

    Returns:
        A model of the same family, in the dtype and on the devices of ``model``, whose
        ``config.recovery`` records the removed layers, the repairs, and the choice of a recipe.

    Raises:
        ValueError: layers that are not integers, out of range or repeated, or all of them; windows
            or mask that do not fit the model; moments of another model, width, boundary or
            regressor; an argument that would have no effect, by name; an unknown operator or
            option; a repair of the MLP before a gap that has no layer before it, or of weights that
            cannot be changed (quantised, offloaded, adapted, shared); a recovered model.

    Warns:
        MassiveActivationWarning: a few tokens own the squared error the operator minimises.
        SingularGramWarning: the tokens do not determine a full matrix and no ridge makes up for it.
    """
    check_dense(model)
    if fit not in ("teacher", "sequential"):
        raise ValueError(f"fit must be 'teacher' or 'sequential', got {fit!r}")
    passes: dict[str, Any] = {
        "attention_mask": attention_mask,
        "skip_leading": skip_leading,
        "batch_size": batch_size,
    }
    passes = {name: value for name, value in passes.items() if value is not None}
    if operator == AUTO:
        unused = [name for name in passes if name != "batch_size"] + ["fit"] * (fit != "teacher")
        if unused:
            raise ValueError(
                "operator='auto' fits whole windows of the dense model's text: leave out "
                f"{unused[0]}"
            )
        if not isinstance(calibration, Tensor):
            raise ValueError(
                "operator='auto' keeps windows out of the fit: give token windows, not statistics"
            )
        allowed = list(inspect.signature(Recipe).parameters)
        if unknown := [name for name in options if name not in allowed]:
            raise ValueError(
                f"operator='auto' has no option {unknown[0]!r}: the recipe takes "
                f"{', '.join(allowed)}"
            )
        choice = Recipe(model, calibration, **passes, **options).choose(layers)
        if verbose:
            print(choice)
        return choice.apply(model, share=share)
    if isinstance(operator, Mapping):
        raise ValueError("these operators are already solved: use install(model, operators)")
    if not isinstance(layers, Iterable):
        raise ValueError(
            f"layers must name the layers to remove, got the number {layers}: choose them with "
            f"select_layers(model, calibration, {layers}), or use operator='auto'"
        )
    family = Family.of(operator)
    check_options(family, options, hidden_size(model))
    gaps = runs(layers, num_layers(model))
    check_place(model, gaps, family)
    if not isinstance(calibration, Tensor):
        if passes or fit == "sequential":
            raise ValueError(
                f"{next(iter(passes), 'fit')!r} belongs to a pass over windows, and statistics "
                "were given: leave it out, or give token windows"
            )
    elif fit == "sequential" and len(gaps) > 1:
        operators = fit_sequential(model, calibration, gaps, family, **passes, **options)
        recovered = install(model, dict(operators), share=share)
        recovered.config.recovery |= {"fit": fit}
        return recovered
    elif family.ridged and len(calibration) > 1 and not (options or set(passes) - {"batch_size"}):
        recipe = Recipe(model, calibration, candidates=[family], **passes)
        removed = [layer for gap in gaps for layer in gap.removed]
        return install(model, dict(recipe.fit(removed, str(family))), share=share)
    else:
        calibration = calibrate(model, calibration, gaps, regressors=[family.regressor], **passes)
    if isinstance(calibration, Calibration):
        calibration = calibration.of(family.regressor)
    moments = {gap: _moments_of(model, calibration, gap) for gap in gaps}
    warn_of_massive_activations(moments, family)
    solved = {gap: solve(moments[gap], family, **options) for gap in gaps}
    return install(model, solved, share=share)


def _moments_of(
    model: PreTrainedModel, collected: Mapping[Boundary, Moments], gap: Boundary
) -> Moments:
    """The moments of a gap; `ValueError` if they are of another model, boundary or width."""
    if gap not in collected:
        raise ValueError(
            f"no moments for boundary {gap}, only for {', '.join(map(str, collected)) or 'none'}: "
            f"calibrate with boundaries=[Boundary{gap}]"
        )
    moments = collected[gap]
    if moments.width != hidden_size(model):
        raise ValueError(
            f"moments of width {moments.width} do not fit a model of width {hidden_size(model)}: "
            "calibrate again"
        )
    if moments.boundary not in (None, gap):
        raise ValueError(f"moments of boundary {moments.boundary} were given for {gap}")
    if moments.model is not None:
        check_origin("moments were", moments.model, model)
    return moments
