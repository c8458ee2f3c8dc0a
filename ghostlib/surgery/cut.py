"""Cut: remove decoder layers from a copy of a model and install operators at the gaps."""

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from ghostlib.common import GHOSTED, checked
from ghostlib.models import streams
from ghostlib.models.architectures import (
    check_layers,
    check_model,
    hidden_size,
    num_layers,
    receiver,
    structure,
)
from ghostlib.models.boundaries import Boundary, check_boundary, check_order, runs
from ghostlib.models.placement import compute_device
from ghostlib.operators.solve import Operator
from ghostlib.statistics.calibration import suited
from ghostlib.surgery.ghosted import (
    GhostedMixin,
    become,
    ghosted_class,
    install_boundaries,
    save_stock,
)
from ghostlib.surgery.installers import fold


@checked
def prune(model: PreTrainedModel, layers: Iterable[int], *, share: bool = True) -> PreTrainedModel:
    """A copy of ``model`` without ``layers`` and without any repair; see `recover`.

    It is of the model's own class, and leaves ``model`` as it is.

    Args:
        model: the dense model.
        layers: decoder layers to remove.
        share: as in `install`.

    Raises:
        ValueError: layers that are no integers, out of range or repeated, none left, or a model
            that was recovered.
    """
    return install(model, dict.fromkeys(runs(layers, num_layers(model))), share=share)


@checked
def install(
    model: PreTrainedModel,
    operators: Mapping[Boundary, Operator | None],
    *,
    at_gap: bool = False,
    share: bool = True,
) -> PreTrainedModel:
    """A copy of ``model`` without the layers of these boundaries, with operators in their place.

    Args:
        model: the dense model. It keeps its layers and logits; the copy shares its weights, so
            that training the copy changes both: see ``share``.
        operators: solved operators by boundary; None removes the layers without a repair.
            Boundaries are maximal runs of removed layers, as `runs` gives them.
        at_gap: a module at the boundary also for repairs that could be folded into weights.
        share: False gives the copy weights of its own, to be trained or changed in place.

    Returns:
        A model of the same family, in the dtype and on the devices of ``model``, whose
        ``config.recovery`` says what was removed and installed. Offloaded weights stay offloaded;
        the operators do not.

    Raises:
        ValueError: boundaries that do not fit the model, overlap, touch or leave no layer; an
            operator of the wrong width, with NaN, for another kind of norm, or too large for the
            model's dtype; a repair that this architecture has no place for; a gap that nothing
            receives; or a model that was recovered before.
    """
    check_dense(model)
    total = num_layers(model)
    given = {check_boundary(gap): operator for gap, operator in operators.items()}
    gaps = check_order(sorted(given), total)
    removed = [layer for gap in gaps for layer in gap.removed]
    if removed:
        runs(removed, total)  # refuses to leave no layer
    for gap in gaps:
        receiver(model, gap.stop)  # refuses a gap that nothing receives
        if (operator := given[gap]) is not None:
            _check_operator(model, gap, operator)
    kept = [layer for layer in range(total) if layer not in set(removed)]
    recovered = streams.share(model, kept)
    check_layers(recovered, model)

    places = {sum(layer < gap.stop for layer in kept): gap for gap in gaps}
    repairs = {place: op for place, gap in places.items() if (op := given[gap]) is not None}
    recovered.config.recovery = {
        "removed": removed,
        "repairs": [_record(gap, given[gap]) for gap in gaps],
    }
    modules = fold(recovered, repairs, at_gap=at_gap)
    if modules:
        _install_modules(recovered, modules, places)
    _check_new_weights(model, recovered)
    if not isinstance(recovered, GhostedMixin):  # of which transformers says nothing
        recovered.save_pretrained = partial(save_stock, recovered)
    return recovered if share else copy.deepcopy(recovered)


def check_dense(model: PreTrainedModel) -> None:
    """Refuse a model that was recovered before.

    Raises:
        ValueError: it has operators, or lost layers, already, or is no causal language model.
    """
    check_model(model)
    if model.config.model_type.startswith(GHOSTED) or removed_before(model):
        raise ValueError(
            "this model was recovered before: start from the dense model, name all layers"
        )


def removed_before(model: PreTrainedModel) -> list[int]:
    """The layers that the dense model has and ``model`` no longer has."""
    removed: list[int] = getattr(model.config, "recovery", {}).get("removed", [])
    return removed


def _record(gap: Boundary, operator: Operator | None) -> dict[str, Any]:
    """What is kept of a repair in the configuration, as JSON."""
    if operator is None:
        return {"boundary": list(gap), "operator": "pruned"}
    return {"boundary": list(gap), "operator": operator.name, "reads": str(operator.regressor)}


def _check_operator(model: PreTrainedModel, gap: Boundary, operator: Operator) -> None:
    """Refuse an operator of another width, or one that reads what this model's layers do not."""
    width = operator.M.shape[1]
    if width != hidden_size(model):
        raise ValueError(
            f"operator for boundary {gap} must have width {hidden_size(model)}, got {width}"
        )
    for values in (operator.M, operator.bias):
        if values is not None and not torch.isfinite(values).all():
            raise ValueError(
                f"operator for boundary {gap} has NaN or infinite entries: solve it again"
            )
    fitting = suited(model, operator.regressor)
    if operator.regressor != fitting:
        raise ValueError(
            f"operator for boundary {gap} reads {operator.regressor}, and the layers of a "
            f"{model.config.model_type} read {fitting}: solve it from this model"
        )


def _check_new_weights(model: PreTrainedModel, recovered: PreTrainedModel) -> None:
    """Refuse what became infinite when it was cast to the model's dtype."""
    shared = {id(parameter) for parameter in model.parameters()}
    for name, parameter in recovered.named_parameters():
        known = id(parameter) in shared or parameter.device.type == "meta"
        if not known and not torch.isfinite(parameter).all():
            raise ValueError(
                f"the repair does not fit into {parameter.dtype}: {name} would be infinite; use a "
                "larger relative_ridge or a model in a wider dtype"
            )


def _install_modules(
    recovered: PreTrainedModel, modules: Mapping[int, Operator], places: Mapping[int, Boundary]
) -> None:
    """Make ``recovered`` a ghosted model, in place, with a module for each operator."""
    factors = {place: _factors(op.M) for place, op in modules.items() if _is_low_rank(op)}
    name = recovered.config.model_type
    if name not in CONFIG_MAPPING:
        raise ValueError(
            f"a {name} is made by code that transformers does not know, so that a module at the "
            "gap could not be loaded again: use a repair of the weights, such as refit, or "
            "register its classes with AutoConfig.register and AutoModelForCausalLM.register"
        )
    cls = ghosted_class(name)
    become(recovered, cls)
    recovered.config.__class__ = cls.config_class
    names = {module: name for name, module in recovered.named_modules()}
    recovered.config.ghost = [
        {
            "module": names[receiver(recovered, place)],
            "receiver": place,
            "width": operator.M.shape[1],
            "removed": list(places[place].removed),
            "operator": operator.name,
            "bias": operator.bias is not None,
            "rank": factors[place][0].shape[1] if place in factors else None,
            "features": [feature.name for feature in operator.regressor.features],
            "layout": structure(recovered).layout,
        }
        for place, operator in modules.items()
    ]
    install_boundaries(recovered)
    for (place, operator), entry in zip(modules.items(), recovered.config.ghost, strict=True):
        module = recovered.get_submodule(entry["module"])
        floating = (p.dtype for p in module.parameters() if p.is_floating_point())
        device, dtype = compute_device(module), next(floating, recovered.dtype)
        values = {"M": operator.M}
        if place in factors:
            values = dict(zip("AB", factors[place], strict=True))
        if operator.bias is not None:
            values["b"] = operator.bias
        for name, value in values.items():
            # on the CPU first: not every device has float64
            getattr(module.boundary, name).data = value.cpu().to(dtype).to(device)


def _is_low_rank(operator: Operator) -> bool:
    """Whether least squares bounded the rank of its matrix, so that fewer numbers say it."""
    bias = 0 if operator.bias is None else len(operator.bias)
    return "rank" in operator.family.options and operator.dof - bias < operator.M.numel()


def _factors(M: Tensor) -> tuple[Tensor, Tensor]:
    """``M = A B`` with as few columns of ``A`` as the rank of ``M``, and both alike in size."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    rank = max(int((s > 1e-10 * s[0]).sum()), 1)
    root = s[:rank].sqrt()
    return (U[:, :rank] * root).contiguous(), (root[:, None] * Vh[:rank]).contiguous()
