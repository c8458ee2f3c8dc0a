"""Trials: score many ways to prune and repair one model on the same windows.

Whatever two ways have in common up to a layer, they compute alike up to there. The streams of one
of them, the base, are kept, and a trial runs only from where it begins to differ.
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
"""Bytes of streams that are kept at most."""


class Trials:
    """Losses of pruned and repaired variants of ``model`` on ``windows``, and their abilities.

    The streams of the base take (layers + 1) times tokens times hidden numbers of its dtype, and
    little where ``starts`` says which are needed. They are kept of as many windows as fit in `KEPT`
    bytes; of the others every trial is a whole pass.

    Args:
        model: the dense model; it is not changed, and it is the first base.
        windows: (windows, length) token ids, at least two tokens long; None for no text.
        batch_size: windows per forward pass.
        probes: what `abilities` asks.
        starts: dense layers before which the streams are kept, such as the first removed one; a
            trial runs from the last of them before it differs. None: before every layer.

    Raises:
        ValueError: windows that do not fit the model, or of one token; a batch size below 1; a
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
        self.starts = None if starts is None else frozenset(starts)
        for start in self.starts or ():
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
        self.total = num_layers(model)
        self.rebase(())

    @checked
    def rebase(self, layers: tuple[int, ...], operators: Operators | None = None) -> None:
        """Make the variant without ``layers`` the base: its streams are computed and kept."""
        self.base, self.repairs = gaps_without(layers, self.total), operators or {}
        variant = self._variant(layers, self.repairs)
        keys = _entered(_survivors(layers, self.total))
        places = [place for place, key in enumerate(keys) if self._keeps(key)]
        self.streams: list[dict[int, Tensor]] = []
        numbers, held = len(places) * hidden_size(self.model) * self.model.dtype.itemsize, 0
        for ids in self.batches:
            held += numbers * ids.numel()
            if held > KEPT or not places:
                self.streams.append({})
                continue
            streams = record(variant, ids, places)
            self.streams.append({keys[place]: streams[place] for place in places})

    @checked
    def losses(self, layers: tuple[int, ...], operators: Operators | None = None) -> Tensor:
        """Mean negative log-likelihood per predicted token (nats) of each window, float64.

        Args:
            layers: removed layers.
            operators: repairs; of the gaps in common with the base the same ones as there.

        Raises:
            ValueError: there are no windows.
        """
        if not self._texts:
            raise ValueError("no windows to score: give Trials(model, windows)")
        texts = range(self._texts)
        hidden = zip(self._hidden(layers, operators or {}, texts), self.batches, strict=False)
        # The head is that of every variant, and what it does to logits is found once a model.
        return torch.cat([token_losses(self.model, h, ids).mean(1) for h, ids in hidden])

    @checked
    def abilities(
        self, layers: tuple[int, ...], operators: Operators | None = None
    ) -> dict[str, np.ndarray]:
        """Scores of the items of each probe; arguments as of `losses`.

        Raises:
            ValueError: there are no probes.
        """
        if self.probes is None:
            raise ValueError("no probe to ask: give Trials(model, windows, probes=ProbeSet(…))")
        asked = range(self._texts, len(self.batches))
        return self.probes.values(self.model, self._hidden(layers, operators or {}, asked))

    def _hidden(
        self, layers: tuple[int, ...], operators: Operators, batches: range
    ) -> Iterator[Tensor]:
        """What the head receives of each of these batches, (windows, length, hidden)."""
        variant = self._variant(layers, operators)
        kept = _survivors(layers, self.total)
        place = sum(layer < self._first_change(layers, operators) for layer in kept)
        place = min(place, len(kept) - 1)  # no model is made for less than a layer
        if looks_back(self.model):
            place = 0
        keys = _entered(kept)
        place = max((p for p in range(place + 1) if self._keeps(keys[p])), default=0)
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

    def _keeps(self, key: int) -> bool:
        return self.starts is None or key in self.starts

    def _variant(self, layers: tuple[int, ...], operators: Operators) -> PreTrainedModel:
        gaps = gaps_without(layers, self.total)
        # At the gap, so that the layers before it stay as they are in the base.
        return install(self.model, {gap: operators.get(gap) for gap in gaps}, at_gap=True)

    def _first_change(self, layers: tuple[int, ...], operators: Operators) -> int:
        """Index of the first dense layer from which this variant differs from the base."""
        different = set(gaps_without(layers, self.total)) ^ set(self.base)
        first = min((gap.start for gap in different), default=self.total)
        # A repair that reads the last MLP before the gap is folded into it: that layer changes too.
        repairs = (*operators.items(), *self.repairs.items())
        folded = any(gap.start == first and repair.regressor.reads_mlp for gap, repair in repairs)
        return first - 1 if folded else first


def _survivors(layers: tuple[int, ...], total: int) -> list[int]:
    removed = set(layers)
    return [layer for layer in range(total) if layer not in removed]


def _entered(kept: list[int]) -> list[int]:
    """For every place in a variant of these layers, the dense layer whose stream enters there."""
    return [0, *(layer + 1 for layer in kept)]
