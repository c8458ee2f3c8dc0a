"""Evidence: what a criterion may ask about a set of layers, computed when it is first asked."""

import warnings
from collections.abc import Mapping
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.boundaries import Boundary, gaps_without, runs
from ghostlib.collector import Calibration, Similarity
from ghostlib.gram import SingularGramWarning
from ghostlib.importance import taylor_importance
from ghostlib.models import num_layers
from ghostlib.operators import Operator, solve
from ghostlib.trials import Trials

Layers = tuple[int, ...]


class Evidence:
    """Facts about removing layers of ``model``.

    Args:
        model: the dense model.
        calibration: similarities and moments, or None where the criterion needs none.
        windows: (windows, length) token ids to score, or None.
        operator: the repair whose residual and loss are asked for.
        batch_size: windows per forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration | None,
        windows: Tensor | None,
        *,
        operator: str = "ghost",
        batch_size: int = 1,
    ) -> None:
        self.model, self.calibration, self.windows = model, calibration, windows
        self.operator, self.batch_size = operator, batch_size
        self.total = num_layers(model)
        self._operators: dict[Boundary, Operator] = {}
        self._repaired: bool | None = None
        self._parent: Layers = ()

    def similarity(self, layers: Layers) -> Similarity:
        """How alike the stream is before and behind the block ``layers``."""
        assert self.calibration is not None
        return self.calibration.similarities[self._block(layers)]

    def residual(self, layers: Layers) -> float:
        """Squared error that the repair of a block leaves, relative to ``||X_post||^2``.

        On the tokens the repair was solved from. The unit is what the next layer should have
        received, so that blocks of any place and length compare.
        """
        assert self.calibration is not None
        gap = self._block(layers)
        return self._repair(gap).residual / self.calibration[gap].t

    def importance(self, layers: Layers) -> float:
        """Summed first-order importance of the weights of ``layers``."""
        return sum(self._importance[layer] for layer in layers)

    def loss(self, layers: Layers) -> float:
        """Mean loss on the windows without ``layers``."""
        self._settle(repaired=False)
        return self._trials.loss(layers)

    def recovered_loss(self, layers: Layers) -> float:
        """Mean loss on the windows without ``layers`` and with every gap repaired."""
        self._settle(repaired=True)
        return self._trials.loss(layers, self._repairs(layers))

    def grow_from(self, parent: Layers) -> None:
        """The sets asked for next are ``parent`` and one layer more: keep its streams."""
        self._parent, self._repaired = parent, None

    def _settle(self, repaired: bool) -> None:
        if self._parent and self._repaired != repaired:  # trials begin with the dense model
            self._trials.rebase(self._parent, self._repairs(self._parent) if repaired else None)
            self._repaired = repaired

    @cached_property
    def _trials(self) -> Trials:
        assert self.windows is not None
        return Trials(self.model, self.windows, batch_size=self.batch_size)

    @cached_property
    def _importance(self) -> list[float]:
        assert self.windows is not None
        return taylor_importance(self.model, self.windows)

    def _block(self, layers: Layers) -> Boundary:
        (gap,) = runs(layers, self.total)
        return gap

    def _repairs(self, layers: Layers) -> Mapping[Boundary, Operator]:
        return {gap: self._repair(gap) for gap in gaps_without(layers, self.total)}

    def _repair(self, gap: Boundary) -> Operator:
        if gap not in self._operators:
            assert self.calibration is not None
            with warnings.catch_warnings():
                # A candidate that is not chosen need not trouble anyone.
                warnings.simplefilter("ignore", SingularGramWarning)
                found = solve(self.calibration[gap], self.operator)
            self._operators[gap] = found
        return self._operators[gap]
