"""Evidence: what criteria compute scores from, on first use."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ghostlib.common import track
from ghostlib.evaluation.abilities import ProbeSet
from ghostlib.models.architectures import decoder_layers, num_layers
from ghostlib.models.boundaries import Boundary, gaps_without, runs
from ghostlib.models.placement import input_device
from ghostlib.models.streams import check_scored, evaluating
from ghostlib.operators.families import Family
from ghostlib.operators.solve import Operator, Operators, solve_quietly
from ghostlib.selection.trials import Trials
from ghostlib.statistics.calibration import Calibration, Similarity

Layers = tuple[int, ...]
WEIGHT = 0.1
"""Default weight of the probe's loss relative to the loss on text, both in nats."""


def check_weight(weight: float) -> None:
    """Refuse, by `ValueError`, a weight that is negative, infinite or NaN."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must not be negative or infinite, got {weight}")


@dataclass
class Evidence:
    """Effects of removing layers of ``model``.

    Attributes:
        model: the dense model.
        calibration: similarities and moments; empty if the criterion needs none.
        windows: (windows, length) token ids to score, or None.
        family: the repair of residuals and losses.
        batch_size: windows per forward pass.
        keep: a probe of random tokens to score in addition to the windows, or None.
        weight: weight of the probe's loss relative to the loss on the windows.
    """

    model: PreTrainedModel
    calibration: Calibration
    windows: Tensor | None
    family: Family
    batch_size: int
    keep: str | None
    weight: float

    def __post_init__(self) -> None:
        self.total = num_layers(self.model)
        self._operators: dict[Boundary, Operator] = {}

    def similarity(self, layers: Layers) -> Similarity:
        """Similarity of the stream before and after the block ``layers``."""
        return self.calibration.similarities[self._block(layers)]

    def residual(self, layers: Layers) -> float:
        """Squared error of a block's repair relative to ``||X_post||^2``, on calibration tokens.

        Relative to the input of the next layer, so that blocks of any place and length compare.
        """
        gap = self._block(layers)
        if self.family.regressor.reads_mlp and gap.start == 0:
            return math.inf  # no layer before the gap to repair
        target = self.calibration.of(self.family.regressor.stream)[gap]
        return self._repair(gap).residual / target.t

    def importance(self, layers: Layers) -> float:
        """First-order importance of ``layers``, summed."""
        return sum(self._importance[layer] for layer in layers)

    def loss(self, layers: Layers) -> float:
        """Mean loss on the windows without ``layers``."""
        return self._trials.loss(layers)

    def recovered_loss(self, layers: Layers) -> float:
        """Mean loss on the windows without ``layers``, with every gap repaired."""
        if self.family.regressor.reads_mlp and 0 in layers:
            return math.inf
        return self._trials.loss(layers, self._repairs(layers))

    def balance(self, layers: Layers) -> float:
        """`recovered_loss` plus ``weight`` times the probe's loss of the same model."""
        loss = self.recovered_loss(layers)
        if math.isinf(loss):
            return loss
        (values,) = self._trials.abilities(layers, self._repairs(layers)).values()
        return loss + self.weight * float(values.mean())

    def grow_from(self, parent: Layers, *, repaired: bool) -> None:
        """Prepare for candidates that remove ``parent`` and one more layer: keep its streams."""
        if parent:  # the first base is the dense model
            self._trials.rebase(parent, self._repairs(parent) if repaired else None)

    @cached_property
    def _trials(self) -> Trials:
        probes = None if self.keep is None else probe_to_keep(self.model, self.keep)
        return Trials(self.model, self.windows, batch_size=self.batch_size, probes=probes)

    @cached_property
    def _importance(self) -> list[float]:
        assert self.windows is not None, "the criterion declares that it needs windows"
        return taylor_importance(self.model, self.windows)

    def _block(self, layers: Layers) -> Boundary:
        (gap,) = runs(layers, self.total)
        return gap

    def _repairs(self, layers: Layers) -> Operators:
        return {gap: self._repair(gap) for gap in gaps_without(layers, self.total)}

    def _repair(self, gap: Boundary) -> Operator:
        if gap not in self._operators:
            moments = self.calibration.of(self.family.regressor)[gap]
            # Warnings about candidates that are not chosen would only distract.
            self._operators[gap] = solve_quietly(moments, self.family)
        return self._operators[gap]


def probe_to_keep(model: PreTrainedModel, name: str) -> ProbeSet:
    """The probe to choose layers or repairs by, on items that `abilities` does not use.

    Raises:
        ValueError: an unknown probe, one that needs a tokenizer, or rows longer than the context.
    """
    return ProbeSet(model, None, [name], seed=-1, count=4, strict=True)


def taylor_importance(model: PreTrainedModel, windows: Tensor) -> list[float]:
    """``sum |w dL/dw|`` over the weights of each layer (Shortened LLaMA, arXiv 2402.02834).

    To first order, setting the weight ``w`` to zero changes the loss ``L`` by ``-w dL/dw``. ``L``
    is the mean negative log-likelihood over ``windows``, one backward pass each; gradients are
    summed over windows before the absolute value, as in the published code. Weights and their
    ``.grad`` do not change.

    Returns:
        Importance of each layer, in nats.

    Raises:
        ValueError: ``windows`` (windows, length) do not fit the model, or have one token.
    """
    check_scored(model, windows)
    layer_of = {
        id(parameter): index
        for index, layer in enumerate(decoder_layers(model))
        for parameter in layer.parameters()
    }
    # Detached views with gradients of their own, so that the model's parameters keep theirs.
    weights = {
        name: parameter.detach().requires_grad_()
        for name, parameter in model.named_parameters()
        if id(parameter) in layer_of
    }
    owner = [layer_of[id(p)] for p in model.parameters() if id(p) in layer_of]
    totals = [torch.zeros_like(weight) for weight in weights.values()]
    with evaluating(model), torch.enable_grad():
        for ids in track(windows.to(input_device(model)).split(1), "differentiating"):
            inputs = {"input_ids": ids, "use_cache": False}
            logits = functional_call(model, weights, (), inputs).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, ids[0, 1:]) / len(windows)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient
    importance = [0.0] * len(decoder_layers(model))
    for index, weight, total in zip(owner, weights.values(), totals, strict=True):
        importance[index] += float((weight.detach() * total).abs().sum(dtype=torch.float64))
    return importance
