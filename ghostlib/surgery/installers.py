"""Installers: put the matrices of a repair into a pruned model.

A module at the boundary adds parameters and one matrix product; a repair that is folded into
existing weights adds nothing. Each family names its installer.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlib.common import Registry
from ghostlib.models import layers
from ghostlib.models.architectures import num_layers, receiver
from ghostlib.models.boundaries import Boundary
from ghostlib.models.layers import embeddings, present, scale_output, writers
from ghostlib.operators.families import Family
from ghostlib.operators.solve import Operator
from ghostlib.statistics.features import STREAM

# Largest relative error of a folded projection; the rounding of bfloat16 alone is 0.002.
_MAX_FOLD_ERROR = 0.05

# Replaces parameters of a pruned model in place, as the old ones may be shared, and returns the
# operators that modules must apply. Operators are keyed by the index of the layer after the gap.
Installer = Callable[[PreTrainedModel, Mapping[int, Operator]], Mapping[int, Operator]]


def down_projection(
    model: PreTrainedModel, operators: Mapping[int, Operator]
) -> Mapping[int, Operator]:
    """Fold into the down-projection of the last layer before each gap, ``h -> h D + d``.

    A matrix on its output multiplies it: ``D (I + M)``, ``d (I + M)`` (ReplaceMe, arXiv
    2505.02819); one on its input is added: ``D + E``. Computed in float64, cast once.

    Raises:
        ValueError: as `projection_before`; or a bias for a projection without one.
    """
    for index, operator in operators.items():
        projection = projection_before(model, index, operator.name)
        D, d = projection_weights(projection)
        if "output" in operator.regressor.sources:
            D, d = D @ operator.W, None if d is None else d @ operator.W
        else:
            D = D + operator.M.cpu()
        write_projection(projection, D, _add_bias(d, operator.bias, operator.name))
    return {}


def module_and_down_projection(
    model: PreTrainedModel, operators: Mapping[int, Operator]
) -> Mapping[int, Operator]:
    """Fold ``E`` of ``X + X M + h E`` into the down-projection, and leave ``M`` to a module.

    The module multiplies the output of the projection by ``I + M``, so ``E (I + M)^-1`` is added to
    the projection.

    Raises:
        ValueError: as `down_projection`; or ``I + M`` is too close to singular for the fold to be
            exact in the model's dtype.
    """
    modules: dict[int, Operator] = {}
    for index, operator in operators.items():
        projection: Any = projection_before(model, index, operator.name)
        D, d = projection_weights(projection)
        M, E = operator.M.cpu().tensor_split([D.shape[1]])
        A = M + torch.eye(len(M), dtype=M.dtype)
        new = D + torch.linalg.solve(A, E, left=False)
        bias = None
        if operator.bias is not None:
            bias = torch.linalg.solve(A, operator.bias.cpu()[None], left=False)[0]
        dtype = projection.weight.dtype
        write_projection(projection, new, _add_bias(d, bias, operator.name))
        exact = D @ A + E
        error = torch.linalg.norm((new.to(dtype).double() @ A) - exact) / torch.linalg.norm(exact)
        if not error <= _MAX_FOLD_ERROR:
            raise ValueError(
                f"{operator.name}: the new down-projection is {float(error):.0%} off in {dtype}, "
                "because I + M is close to singular: pass a larger relative_ridge, or install in a "
                "wider dtype"
            )
        modules[index] = replace(operator, M=M, regressor=STREAM, bias=None)
    return modules


def _add_bias(old: Tensor | None, new: Tensor | None, name: str) -> Tensor | None:
    if new is None:
        return old
    if old is None:
        raise ValueError(f"{name} has a bias, and the down-projection has none to put it into")
    return old + new.cpu()


def projection_before(model: PreTrainedModel, index: int, name: str) -> nn.Module:
    """The down-projection of the last layer before a gap, if its weights can be changed.

    Raises:
        ValueError: no layer before the gap, or weights that other modules share, or that are
            offloaded, quantised or adapted.
    """
    if index == 0:
        raise ValueError(
            f"{name} acts on the MLP before the gap, and no layer is left before it: keep layer 0"
        )
    projection = present(layers.down_projection(model, index - 1))
    for path, module in model.named_modules():
        if module is not projection and getattr(module, "weight", None) is projection.weight:
            raise ValueError(
                f"{name} changes the last down-projection before the gap, and {path} has the same "
                "weights: use an operator at the gap, such as ghost"
            )
    return projection


def check_place(model: PreTrainedModel, gaps: Iterable[Boundary], family: Family) -> None:
    """Refuse a repair of weights that cannot be changed, before any pass.

    Raises:
        ValueError: as `projection_before`.
    """
    family.check_place(gaps)
    for gap in gaps if family.regressor.reads_mlp else ():
        projection_before(model, gap.start, family.name)


def projection_weights(projection: Any) -> tuple[Tensor, Tensor | None]:
    """``D`` (I, C) and ``d`` (C,) of ``h -> h D + d``, in float64 on the CPU."""
    weight = projection.weight.detach().cpu().double()  # not every device has float64
    bias = None if projection.bias is None else projection.bias.detach().cpu().double()
    # A Linear stores D', a Conv1D stores D.
    return (weight.T if isinstance(projection, nn.Linear) else weight), bias


def write_projection(projection: Any, D: Tensor, d: Tensor | None) -> None:
    """Give ``projection`` new parameters; other modules may share the old ones."""
    weight = D.T if isinstance(projection, nn.Linear) else D
    projection.weight = nn.Parameter(weight.to(projection.weight).contiguous())
    if d is not None:
        projection.bias = nn.Parameter(d.to(projection.weight))


def earlier_writes(
    model: PreTrainedModel, operators: Mapping[int, Operator]
) -> Mapping[int, Operator]:
    """Scale the stream at each gap by scaling everything written to it before (Prune&Comp).

    Pre-norm layers do not see the scale of the stream, so multiplying embeddings and every earlier
    write by ``a`` multiplies the stream at the gap by ``a`` and changes nothing else (arXiv
    2507.18212). If the head is tied to the embeddings, its logits would grow as well: the final
    norm is divided by the factor of the embeddings.
    """
    factor = 1.0
    for index in reversed(range(num_layers(model) + 1)):
        if index in operators:
            factor *= float(operators[index].W[0, 0])
        if factor != 1.0 and index > 0:
            for writer in writers(model, index - 1):
                scale_output(writer, factor)
    head: Any = model.get_output_embeddings()
    for table in embeddings(model):
        tied = head is not None and head.weight is table.weight
        scale_output(table, factor)
        if tied:
            head.weight = table.weight
            scale_output(receiver(model, num_layers(model)), 1 / factor)
    return {}


INSTALLERS: Registry[Installer] = Registry("installer")
INSTALLERS["nothing"] = lambda model, operators: {}  # the pruned model
INSTALLERS["module"] = lambda model, operators: operators  # at the boundary (paper, eq. 8)
INSTALLERS["down-projection"] = down_projection
INSTALLERS["module and down-projection"] = module_and_down_projection
INSTALLERS["earlier-writes"] = earlier_writes


@torch.no_grad()
def fold(
    model: PreTrainedModel, operators: Mapping[int, Operator], *, at_gap: bool = False
) -> dict[int, Operator]:
    """Fold operators into existing weights; returns those that a module must apply.

    Args:
        model: pruned model, changed in place.
        operators: by the index, in the pruned model, of the layer after each gap.
        at_gap: a module instead of folding, for repairs that read only the stream: the same
            function, and the layers before the gap stay as they are.
    """
    modules: dict[int, Operator] = {}
    by_installer: dict[str, dict[int, Operator]] = {}
    for index, operator in operators.items():
        name = operator.family.install
        if at_gap and not operator.regressor.reads_mlp and name != "nothing":
            name = "module"
        by_installer.setdefault(name, {})[index] = operator
    scales = by_installer.pop("earlier-writes", {})  # last: they scale the other folds as well
    for name, group in by_installer.items():
        modules |= INSTALLERS[name](model, group)
    if scales:
        # The output of a module that is not linear in the stream does not scale with it.
        linear = all(
            op.bias is None and op.regressor.features == STREAM.features for op in modules.values()
        )
        modules |= INSTALLERS["earlier-writes" if linear else "module"](model, scales)
    return modules
