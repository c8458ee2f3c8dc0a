"""Folding: repairs that go into weights the pruned model already has, and add no parameter."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ghostlib.models.architectures import num_layers, receiver
from ghostlib.models.boundaries import Boundary
from ghostlib.models.layers import embeddings, mlp_output, present, scale_output, writers
from ghostlib.operators.solve import Operator


def fold_mlp(model: PreTrainedModel, operators: Mapping[int, Operator]) -> None:
    """ReplaceMe: multiply what the last MLP before each gap returns by ``T`` (arXiv 2505.02819).

    The MLP ends with a projection ``h -> h A + a``, so its new weights are ``A T`` and ``a T``.

    Args:
        model: pruned model, changed in place; the old parameters stay as they are.
        operators: ``{index of the layer behind the gap: operator with W = T}``.

    Raises:
        ValueError: a gap with no layer before it, or an architecture that leaves no room.
    """
    for index, operator in operators.items():
        if index == 0:
            raise ValueError(
                f"{operator.name} acts on the MLP before the gap, and no layer is left before it: "
                "keep layer 0"
            )
        module: Any = present(mlp_output(model, index - 1))
        stands = isinstance(module, nn.Linear)  # a Linear keeps A', a Conv1D keeps A
        A, T = module.weight.cpu().double(), operator.W.cpu()  # not every device has float64
        folded = (A.T @ T).T if stands else A @ T
        module.weight = nn.Parameter(folded.to(module.weight).contiguous())
        if module.bias is not None:
            module.bias = nn.Parameter((module.bias.cpu().double() @ T).to(module.bias))


def fold_scale(model: PreTrainedModel, operators: Mapping[int, Operator]) -> None:
    """Prune&Comp: scale the stream at each gap by scaling all that was written to it before.

    Pre-norm layers do not see the scale of the stream, so multiplying embeddings and every earlier
    write by ``a`` multiplies the stream at the gap by ``a`` and changes nothing else (arXiv
    2507.18212). Where the head is tied to the embeddings its logits would grow as well: the final
    norm is divided by what the embeddings were multiplied by.

    Args:
        model: pruned model, changed in place; the old parameters stay as they are.
        operators: ``{index of the layer behind the gap: operator with W = a I}``.
    """
    factor = 1.0
    for index in reversed(range(num_layers(model) + 1)):
        if index in operators:
            factor *= float(operators[index].W[0, 0])
        if factor != 1.0 and index > 0:
            for module in writers(model, index - 1):
                scale_output(model, module, factor)
    tied: Any = model.get_output_embeddings()
    for table in embeddings(model):
        shared = tied is not None and tied.weight is table.weight
        scale_output(model, table, factor)
        if shared:
            tied.weight = table.weight
            scale_output(model, receiver(model, num_layers(model)), 1 / factor)


Fold = Callable[[PreTrainedModel, Mapping[int, Operator]], None]
FOLDED: dict[str, Fold] = {
    "replaceme": fold_mlp,
    "replaceme-cosine": fold_mlp,
    "magnitude": fold_scale,
}
"""Operators that are folded into weights, and how; all others become a module at the gap."""


def fold(
    model: PreTrainedModel, operators: Mapping[Boundary, Operator], places: Mapping[Boundary, int]
) -> set[Boundary]:
    """Fold those of ``operators`` that can be; returns the gaps that are done.

    Args:
        model: pruned model, changed in place.
        places: index in the pruned model of the layer behind each gap.
    """
    done: set[Boundary] = set()
    for how in dict.fromkeys(FOLDED.values()):
        mine = {gap for gap, operator in operators.items() if FOLDED.get(operator.name) is how}
        if mine:
            with torch.no_grad():
                how(model, {places[gap]: operators[gap] for gap in mine})
        done |= mine
    return done
