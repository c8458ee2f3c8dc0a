"""The explorer: any block of layers, any family, from streams recorded once."""

import base64
import io
import warnings
from functools import lru_cache
from html import escape

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import PRUNED
from ghostlib.evaluation.generation import generate
from ghostlib.models.architectures import hidden_size, num_layers
from ghostlib.models.boundaries import Boundary, spell
from ghostlib.models.streams import record
from ghostlib.operators.families import Family
from ghostlib.operators.solve import Operator, solve
from ghostlib.plotting.style import alt_text, color, describe, plain_numbers
from ghostlib.statistics.moments import Moments
from ghostlib.surgery.cut import install


class Explorer:
    """Repairs of any block of layers of ``model``, each solved in a moment.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        calibration: (windows, length) token ids to fit repairs on.
        held_out: (windows, length) token ids to measure them on.

    The streams of all layers are kept, in float32: (layers + 1) x tokens x width numbers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Tensor,
        held_out: Tensor,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.layers = num_layers(model)
        self._fit, self._test = self._record(calibration), self._record(held_out)
        self.tokens = len(self._fit[0])
        self.moments = lru_cache(maxsize=32)(self._moments)

    def _record(self, windows: Tensor) -> dict[int, Tensor]:
        """{layer: (tokens, width)}: inputs of all layers, and the output of the last."""
        streams = record(self.model, windows, range(self.layers + 1))
        return {index: stream.flatten(0, 1).float().cpu() for index, stream in streams.items()}

    def _moments(self, boundary: Boundary, tokens: int) -> Moments:
        """Moments of the first ``tokens`` calibration tokens."""
        X_pre, X_post = (self._fit[index][:tokens] for index in boundary)
        return Moments(hidden_size(self.model)).update(X_pre, X_post)

    def solve(
        self, start: int, n: int, family: str, tokens: int, ridge: float
    ) -> tuple[Operator | None, str]:
        """Repair of layers ``start … start + n - 1``, and the solver's warnings.

        Args:
            family: a name; ``"pruned"`` for no repair.
            tokens: number of calibration tokens.
            ridge: relative, for families that take one; 0 for no ridge.

        Raises:
            ValueError: the block does not lie within the model; an unknown family.
        """
        if not 0 <= start < start + n <= self.layers:
            raise ValueError(
                f"layers {start} … {start + n - 1} are not within 0 … {self.layers - 1}"
            )
        if family == PRUNED:
            return None, ""
        options = {"relative_ridge": ridge} if ridge > 0 and _takes_ridge(family) else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            op = solve(self.moments(Boundary(start, start + n), tokens), family, **options)
        return op, "; ".join(str(warning.message).split(":")[0] for warning in caught)

    def figure(self, start: int, n: int, family: str, tokens: int, ridge: float) -> Figure:
        """Error without and with the repair, spectrum of the repair, and error of every token."""
        op, warning = self.solve(start, n, family, tokens, ridge)
        X, Y = self._test[start], self._test[start + n]
        before = (X - Y).norm(dim=1)
        repaired = X if op is None else op.apply(X.double()).float()
        after = (repaired - Y).norm(dim=1)
        share = float(after.square().sum() / before.square().sum())
        shade = color(family)
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
        left.bar([PRUNED, family], [1.0, share], color=[color(PRUNED), shade])
        left.set(title="Squared error, held-out text")
        left.set_ylabel("share of that without repair\n(lower is better)")
        left.annotate(f"{share:.2f}", (1, share), (0, 4), textcoords="offset points", ha="center")
        describe(left, f"Without repair 1, {family} {share:.2f}.")
        values = torch.zeros(1) if op is None else torch.linalg.svdvals(op.W - torch.eye(len(op.W)))
        middle.plot(range(1, len(values) + 1), values, color=shade)
        middle.set(title="Spectrum of W − I", xlabel="index", ylabel="singular value")
        describe(middle, f"Singular values from {float(values[0]):.3g} down.")
        right.loglog(before, after, ".", color=shade, markersize=3)
        both = torch.cat([before, after])
        ends = float(both.min()) / 1.1, float(both.max()) * 1.1
        right.plot(ends, ends, color="#808080", linewidth=1)
        right.set(xlim=ends, ylim=ends, aspect="equal", title="The error of each token")
        right.set(xlabel="its length without repair")
        right.set_ylabel(f"its length with {family}\n(lower is better)")
        better = float((after < before).double().mean())
        describe(right, f"{better:.0%} of {len(after):,} tokens have a smaller error.")
        ticks = (1, 2, 3, 5, 7) if ends[1] < 10 * ends[0] else (1, 3)  # in a decade
        for axis in (right.xaxis, right.yaxis):
            axis.set_major_locator(LogLocator(base=10, subs=ticks))
            plain_numbers(axis)
        options = (f", ridge {ridge:g}" if ridge > 0 else ", no ridge") * _takes_ridge(family)
        title = f"Layers {spell(range(start, start + n))} removed, {family}{options}"
        figure.suptitle(f"{title}, {tokens:,} tokens {warning}", x=0.01, ha="left")
        return figure

    def html(self, start: int, n: int, family: str, tokens: int, ridge: float) -> str:
        """`figure` as an HTML element with its alternative text."""
        figure = self.figure(start, n, family, tokens, ridge)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        plt.close(figure)
        source, alt = base64.b64encode(png.getvalue()).decode(), escape(alt_text(figure))
        return f'<img alt="{alt}" style="max-width: 100%" src="data:image/png;base64,{source}">'

    def sentence(
        self, start: int, n: int, family: str, tokens: int, ridge: float, prompt: str
    ) -> str:
        """Continuation of ``prompt`` by the repaired model."""
        op, _ = self.solve(start, n, family, tokens, ridge)
        repaired = install(self.model, {Boundary(start, start + n): op})
        return generate(repaired, self.tokenizer, prompt, max_new_tokens=24)[0]


def _takes_ridge(family: str) -> bool:
    return family != PRUNED and "relative_ridge" in Family.of(family).options
