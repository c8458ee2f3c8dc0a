"""Scores of any map in the gap of layers 12 … 18 on copying and on text, for other benchmarks.

Copying: nats on the second half of 64 random tokens repeated, up to 8 rows of one seed. Text: nats
on windows of 512 tokens of Wikipedia's test split.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ghostlib as gl
from ghostlib.evaluation.abilities import ProbeSet
from ghostlib.evaluation.perplexity import token_losses
from ghostlib.models.streams import excerpt, feed, final_hidden, record

GAP = gl.Boundary(12, 19)
Map = Callable[[Tensor], Tensor]


def arguments(description: str) -> ArgumentParser:
    """Parser with the options of all these benchmarks."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--windows", type=int, default=12, help="to fit, of both corpora together")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--rows", type=int, default=8, help="to copy")
    parser.add_argument("--test-windows", type=int, default=6, help="of Wikipedia")
    return parser


def calibration(tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int) -> Tensor:
    """(count, length) token ids, half of them of each embedded corpus."""
    sampling: dict[str, Any] = {"length": length, "count": count // 2, "seed": seed}
    return torch.cat([gl.token_windows(c, tokenizer, **sampling) for c in ("wiki", "pydoc")])


class Scorer:
    """Scores a map of the stream at the gap; the layers before it are run once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: int = 8,
        windows: int = 6,
        *,
        seed: int = 4,
    ) -> None:
        test = gl.token_windows("wiki", tokenizer, split="test", length=512, count=windows, seed=0)
        self.model, self.tail = model, excerpt(model, GAP.stop)
        self.probes = ProbeSet(model, None, ["copying"], seed=seed, count=rows)
        self.batches, self.rows = [*self.probes.batches, *test.split(2)], len(self.probes.batches)
        self.streams = [record(model, ids, [GAP.start])[GAP.start] for ids in self.batches]

    def _hidden(self, f: Map, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids and final hidden states of some batches."""
        for ids, x in list(zip(self.batches, self.streams, strict=True))[part]:
            with torch.no_grad(), feed(self.tail, f(x)):
                yield ids, final_hidden(self.tail, ids)

    def copying(self, f: Map) -> float:
        """Mean over rows."""
        hidden = [h for _, h in self._hidden(f, slice(self.rows))]
        return float(self.probes.values(self.model, hidden)["copying"].mean())

    def text(self, f: Map) -> float:
        """Mean over windows."""
        pairs = self._hidden(f, slice(self.rows, None))
        return float(torch.cat([token_losses(self.model, h, ids) for ids, h in pairs]).mean())

    def __call__(self, f: Map) -> str:
        """Both, for a line of a table."""
        return f"copying {self.copying(f):5.2f}  text {self.text(f):.3f}"
