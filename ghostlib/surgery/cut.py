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
    change_class,
    ghosted_class,
    install_boundaries,
    save_stock,
)
from ghostlib.surgery.installers import fold


@checked
def prune(model: PreTrainedModel, layers: Iterable[int], *, share: bool = True) -> PreTrainedModel:
    """A copy of ``model``, of the same class, without ``layers`` and without a repair.

    Args:
        model: the dense model; it is not changed.
        layers: decoder layers to remove.
        share: as in `install`.

    Raises:
        ValueError: layers that are not integers, out of range or repeated, no layer left, or a
            model that was recovered before.
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
    """A copy of ``model`` with operators in place of the layers of these boundaries.

    Args:
        model: the dense model. It is not changed, but the copy shares its weights, so that training
            the copy changes both: see ``share``.
        operators: solved operators by boundary; None removes the layers without a repair.
            Boundaries are maximal runs of removed layers, as from `runs`.
        at_gap: a module at the boundary also for repairs that could be folded into weights.
        share: False copies the weights, for a copy that is trained or changed in place.

    Returns:
        A model of the same family, in the dtype and on the devices of ``model``, whose
        ``config.recovery`` lists removed layers and repairs. Offloaded weights stay offloaded; the
        operators do not.

    Raises:
        ValueError: boundaries that do not fit the model, overlap, touch or leave no layer; an
            operator of the wrong width, with NaN, for another kind of norm, or too large for the
            model's dtype; a repair that does not fit the architecture; a gap that nothing
            receives; or a model that was recovered before.
    """
    check_dense(model)
    total = num_layers(model)
    operators = {check_boundary(gap): operator for gap, operator in operators.items()}
    gaps = check_order(sorted(operators), total)
    removed = [layer for gap in gaps for layer in gap.removed]
    if removed:
        runs(removed, total)  # refuses to leave no layer
    for gap in gaps:
        receiver(model, gap.stop)  # refuses a gap that nothing receives
        if (operator := operators[gap]) is not None:
            _check_operator(model, gap, operator)
    kept = [layer for layer in range(total) if layer not in removed]
    recovered = streams.share(model, kept)
    check_layers(recovered, model)

    places = {sum(layer < gap.stop for layer in kept): gap for gap in gaps}
    repairs = {place: op for place, gap in places.items() if (op := operators[gap]) is not None}
    recovered.config.recovery = {
        "removed": removed,
        "repairs": [_record(gap, operators[gap]) for gap in gaps],
    }
    modules = fold(recovered, repairs, at_gap=at_gap)
    if modules:
        _install_modules(recovered, modules, places)
    _check_new_weights(model, recovered)
    if not isinstance(recovered, GhostedMixin):
        recovered.save_pretrained = partial(save_stock, recovered)
    return recovered if share else copy.deepcopy(recovered)


def check_dense(model: PreTrainedModel) -> None:
    """Refuse a model that was recovered before.

    Raises:
        ValueError: it has operators or lacks layers, or is not a causal language model.
    """
    check_model(model)
    if model.config.model_type.startswith(GHOSTED) or removed_layers(model):
        raise ValueError(
            "this model was recovered before: start from the dense model, name all layers"
        )


def removed_layers(model: PreTrainedModel) -> list[int]:
    """Layers of the dense model that ``model`` lacks."""
    removed: list[int] = getattr(model.config, "recovery", {}).get("removed", [])
    return removed


def _record(gap: Boundary, operator: Operator | None) -> dict[str, Any]:
    """Entry of a repair in the configuration, as JSON."""
    if operator is None:
        return {"boundary": list(gap), "operator": "pruned"}
    return {"boundary": list(gap), "operator": operator.name, "reads": str(operator.regressor)}


def _check_operator(model: PreTrainedModel, gap: Boundary, operator: Operator) -> None:
    """Refuse an operator of another width, with NaN, or with features of another kind of norm."""
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
    regressor = suited(model, operator.regressor)
    if operator.regressor != regressor:
        raise ValueError(
            f"operator for boundary {gap} reads {operator.regressor}, and the layers of a "
            f"{model.config.model_type} read {regressor}: solve it from this model"
        )


def _check_new_weights(model: PreTrainedModel, recovered: PreTrainedModel) -> None:
    """Refuse weights that became infinite when they were cast to the model's dtype."""
    shared = {id(parameter) for parameter in model.parameters()}
    for name, parameter in recovered.named_parameters():
        new = id(parameter) not in shared and parameter.device.type != "meta"
        if new and not torch.isfinite(parameter).all():
            raise ValueError(
                f"the repair does not fit into {parameter.dtype}: {name} would be infinite; use a "
                "larger relative_ridge or a model in a wider dtype"
            )


def _install_modules(
    recovered: PreTrainedModel, modules: Mapping[int, Operator], places: Mapping[int, Boundary]
) -> None:
    """Make ``recovered`` a ghosted model, in place, with a module for each operator."""
    weights = {place: _weights(operator) for place, operator in modules.items()}
    model_type = recovered.config.model_type
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"a {model_type} is made by code that transformers does not know, so that a module at "
            "the gap could not be loaded again: use a repair of the weights, such as refit, or "
            "register its classes with AutoConfig.register and AutoModelForCausalLM.register"
        )
    cls = ghosted_class(model_type)
    change_class(recovered, cls)
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
            "rank": len(weights[place]["B"]) if "B" in weights[place] else None,
            "features": [feature.name for feature in operator.regressor.features],
            "layout": structure(recovered).layout,
        }
        for place, operator in modules.items()
    ]
    install_boundaries(recovered)
    for place, tensors in weights.items():
        module = receiver(recovered, place)
        dtypes = (p.dtype for p in module.parameters() if p.is_floating_point())
        device, dtype = compute_device(module), next(dtypes, recovered.dtype)
        for name, tensor in tensors.items():
            # Cast on the CPU: not every device has float64.
            getattr(module.boundary, name).data = tensor.cpu().to(dtype).to(device)


def _weights(operator: Operator) -> dict[str, Tensor]:
    """``M`` of a module, or ``A`` and ``B`` if it was solved with a lower rank; and ``b``."""
    bias = {} if operator.bias is None else {"b": operator.bias}
    dof = operator.dof - sum(map(len, bias.values()))
    if "rank" not in operator.family.options or dof >= operator.M.numel():
        return {"M": operator.M} | bias
    U, s, Vh = torch.linalg.svd(operator.M, full_matrices=False)
    rank = max(int((s > 1e-10 * s[0]).sum()), 1)
    root = s[:rank].sqrt()
    A, B = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return {"A": A.contiguous(), "B": B.contiguous()} | bias
