"""Trials: score many ways to prune and repair one model on the same windows.

Variants that are equal up to a layer have the same streams up to there. The streams of one variant,
the base, are kept, and a trial runs from the first layer that differs.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlib.common import at_least, checked
from ghostlib.evaluation.abilities import ProbeSet
from ghostlib.evaluation.perplexity import token_losses
from ghostlib.models.architectures import (
    check_index,
    check_model,
    hidden_size,
    looks_back,
    num_layers,
)
from ghostlib.models.boundaries import gaps_without
from ghostlib.models.streams import check_scored, excerpt, feed, final_hidden, record
from ghostlib.operators.solve import Operators
from ghostlib.surgery.cut import install

KEPT = 2**31
"""Largest number of bytes of streams to keep."""


class Trials:
    """Losses of pruned and repaired variants of ``model`` on ``windows``, and their abilities.

    The streams of the base are (layers + 1) x tokens x hidden numbers of its dtype, or fewer with
    ``starts``. They are kept for as many windows as fit in `KEPT` bytes; for the others every trial
    is a whole pass.

    Args:
        model: the dense model; it is not changed, and it is the first base.
        windows: (windows, length) token ids, at least two tokens long; None for no text.
        batch_size: windows per forward pass.
        probes: the items of `abilities`.
        starts: dense layers before which streams are kept, such as the first removed one; a trial
            runs from the last of them before it differs. All layers by default.

    Raises:
        ValueError: windows that do not fit the model or have one token, a batch size below 1, or a
            start that is neither a layer nor the number of layers.
    """

    @checked
    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor | None,
        *,
        batch_size: int = 1,
        probes: ProbeSet | None = None,
        starts: Iterable[int] | None = None,
    ) -> None:
        at_least(1, batch_size=batch_size)
        check_model(model)
        self.total = num_layers(model)
        self.starts = frozenset(range(self.total + 1) if starts is None else starts)
        for start in self.starts:
            check_index(model, start)
        if windows is None and probes is None:
            raise ValueError("nothing to score: give windows, probes, or both")
        self.model, self.probes = model, probes
        self.batches: list[Tensor] = []
        if windows is not None:
            check_scored(model, windows)
            self.batches += windows.split(batch_size)
        self._texts = len(self.batches)
        if probes is not None:
            self.batches += probes.batches
        self.rebase(())

    @checked
    def rebase(self, layers: tuple[int, ...], operators: Operators | None = None) -> None:
        """Make the variant without ``layers`` the base: compute and keep its streams."""
        self.base, self.repairs = gaps_without(layers, self.total), operators or {}
        variant = self._variant(layers, self.repairs)
        keys = self._keys(layers)
        places = [place for place, key in enumerate(keys) if key in self.starts]
        self.streams: list[dict[int, Tensor]] = []
        bytes_per_token = len(places) * hidden_size(self.model) * self.model.dtype.itemsize
        size = 0
        for ids in self.batches:
            size += bytes_per_token * ids.numel()
            streams = record(variant, ids, places) if places and size <= KEPT else {}
            self.streams.append({keys[place]: stream for place, stream in streams.items()})

    @checked
    def losses(self, layers: tuple[int, ...], operators: Operators | None = None) -> Tensor:
        """Mean negative log-likelihood per predicted token (nats) of each window, float64.

        Args:
            layers: removed layers.
            operators: repairs; at a gap of the base, the same repair as there.

        Raises:
            ValueError: there are no windows.
        """
        if not self._texts:
            raise ValueError("no windows to score: give Trials(model, windows)")
        texts = range(self._texts)
        hidden = zip(self._hidden(layers, operators or {}, texts), self.batches, strict=False)
        # All variants share the head of the dense model, which caches what it does to logits.
        return torch.cat([token_losses(self.model, h, ids).mean(1) for h, ids in hidden])

    @checked
    def abilities(
        self, layers: tuple[int, ...], operators: Operators | None = None
    ) -> dict[str, np.ndarray]:
        """Scores of the items of each probe; arguments as in `losses`.

        Raises:
            ValueError: there are no probes.
        """
        if self.probes is None:
            raise ValueError("no probe to ask: give Trials(model, windows, probes=ProbeSet(…))")
        probes = range(self._texts, len(self.batches))
        return self.probes.values(self.model, self._hidden(layers, operators or {}, probes))

    def _hidden(
        self, layers: tuple[int, ...], operators: Operators, batches: range
    ) -> Iterator[Tensor]:
        """Inputs of the head for each of these batches, (windows, length, hidden)."""
        variant, keys = self._variant(layers, operators), self._keys(layers)
        first = 0 if looks_back(self.model) else self._first_change(layers, operators)
        # At least one layer remains to run: no model is made of fewer.
        places = [p for p, key in enumerate(keys[:-1]) if key <= first and key in self.starts]
        place = max(places, default=0)
        part, key = excerpt(variant, place), keys[place]
        for index in batches:
            ids, streams = self.batches[index], self.streams[index]
            if key in streams:
                with feed(part, streams[key]):
                    hidden = final_hidden(part, ids)
            else:
                hidden = final_hidden(variant, ids)
            yield hidden

    @checked
    def loss(self, layers: tuple[int, ...], operators: Operators | None = None) -> float:
        """Mean of `losses`; its exponential is the perplexity."""
        return float(self.losses(layers, operators).mean())

    def _keys(self, layers: tuple[int, ...]) -> list[int]:
        """Dense layer whose input is the stream at each place of the variant without ``layers``."""
        return [0, *(layer + 1 for layer in range(self.total) if layer not in layers)]

    def _variant(self, layers: tuple[int, ...], operators: Operators) -> PreTrainedModel:
        gaps = gaps_without(layers, self.total)
        # Modules at the gap leave the layers before it as they are in the base.
        return install(self.model, {gap: operators.get(gap) for gap in gaps}, at_gap=True)

    def _first_change(self, layers: tuple[int, ...], operators: Operators) -> int:
        """Index of the first dense layer from which this variant differs from the base."""
        different = set(gaps_without(layers, self.total)) ^ set(self.base)
        first = min((gap.start for gap in different), default=self.total)
        # A repair that reads the last MLP before the gap is folded into that layer.
        repairs = (*operators.items(), *self.repairs.items())
        folded = any(gap.start == first and repair.regressor.reads_mlp for gap, repair in repairs)
        return first - 1 if folded else first
