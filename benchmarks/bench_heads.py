"""Whether heads of the removed layers bring copying back, beside one layer more kept whole.

    python benchmarks/bench_heads.py [--heads 12] [--layers 16 17] [--windows 12] [--seeds 3]

Layers 12 … 18 of the embedded model are removed, but for some heads. Each of these reads a map of
one token's stream (and of the outputs of the heads kept before it) that estimates what its layer
would receive; the stream and all outputs are regressed on together after the gap, in closed form.
Fitted on the dense model's streams (teacher), and with what the kept heads really read (sequence).
Beside them one of the seven layers is kept whole, with a matrix in every gap, fitted in sequence.

The heads are chosen in two ways. `attends`: those that attend most to the token before, or after
the last occurrence of the present one, on rows written twice. `returns`: all are kept and a quarter
of them dropped, again and again, those without which copying is lost least (on rows of another
seed, calibrated on windows of another seed). A head costs as many multiplications as any other.

Multiplications of a token, in millions: those of weights, and of attention to half a window, beyond
the one matrix that closes the gap. What is scored: `copying.py`.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from copying import GAP, Map, Scorer, arguments, calibration
from torch import Tensor
from transformers import PreTrainedModel

import ghostlib as gl
from ghostlib.models.streams import excerpt, feed, record
from ghostlib.recovery.sequential import dense_streams
from ghostlib.statistics.moments import Stream

CHOOSING = 100  # the seed of windows and rows on which heads are chosen
RIDGE = {"relative_ridge": 1e-4}
Head = tuple[int, int]  # layer, and its number there


def outputs(model: PreTrainedModel, layer: int, x: Tensor, heads: list[int]) -> Tensor:
    """(windows, length, heads * size) of some heads of a layer that receives ``x``."""
    block: Any = gl.decoder_layers(model)[layer]
    attention, caught = block.self_attn, []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    rotary = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    with torch.no_grad():
        attention(block.input_layernorm(x), position_embeddings=rotary, attention_mask=None)
    hook.remove()
    by_head: Tensor = caught[0].unflatten(-1, (-1, attention.head_dim))
    return by_head[:, :, heads].flatten(2)


class Circuit:
    """Kept heads, and the maps of one token around them."""

    def __init__(self, model: PreTrainedModel, heads: Iterable[Head]) -> None:
        self.model = model
        self.heads: dict[int, list[int]] = {}
        for layer, head in sorted(heads):
            self.heads.setdefault(layer, []).append(head)
        self.maps: dict[int, gl.Operator] = {}

    def fit(self, streams: dict[int, Tensor], *, teacher: bool) -> "Circuit":
        x, kept = streams[GAP.start], None
        for layer in [*self.heads, GAP.stop]:
            if layer > GAP.start:
                regressor = gl.Regressor.parse("x" if kept is None else "x, h")
                hidden = None if kept is None else kept.shape[-1]
                moments = gl.Moments(x.shape[-1], regressor=regressor, hidden=hidden)
                for row, y in enumerate(streams[layer]):
                    moments.update(x[row], y, hidden=None if kept is None else kept[row])
                family = replace(gl.OPERATORS["branches"], regressor=regressor)
                self.maps[layer] = gl.solve(moments, family, **RIDGE)
            if layer < GAP.stop:
                kept = self._more(
                    layer, streams[layer] if teacher else self._at(layer, x, kept), kept
                )
        return self

    def _at(self, layer: int, x: Tensor, kept: Tensor | None) -> Tensor:
        return self.maps[layer].apply(x, hidden=kept) if layer in self.maps else x

    def _more(self, layer: int, y: Tensor, kept: Tensor | None) -> Tensor:
        found = outputs(self.model, layer, y, self.heads[layer])
        return found if kept is None else torch.cat([kept, found], -1)

    def __call__(self, x: Tensor) -> Tensor:
        kept = None
        for layer in self.heads:
            kept = self._more(layer, self._at(layer, x, kept), kept)
        return self._at(GAP.stop, x, kept)

    def cost(self, context: int) -> int:
        """Beyond those of one matrix; the output projections are part of the maps."""
        C: int = self.model.config.hidden_size
        total = sum(op.M.numel() for op in self.maps.values()) - C * C
        for layer, heads in self.heads.items():
            attention: Any = gl.decoder_layers(self.model)[layer].self_attn
            sharing = {h // attention.num_key_value_groups for h in heads}
            total += C * attention.head_dim * (len(heads) + 2 * len(sharing))
            total += 2 * attention.head_dim * context * len(heads)
        return total


def attends(model: PreTrainedModel, vocabulary: int) -> list[Head]:
    """Heads of the removed layers, first those that attend most to one of the two places."""
    once = torch.randint(vocabulary, (6, 64), generator=torch.Generator().manual_seed(0))[:2]
    model.set_attn_implementation("eager")  # which returns its weights
    with torch.no_grad():
        found = model(torch.cat([once, once], 1), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    i = torch.arange(64, 127)
    shares: dict[Head, float] = {}
    for layer in GAP.removed:
        A = found[layer].mean(0)  # (heads, 128, 128)
        both = torch.maximum(A[:, i, i - 63].mean(-1), A[:, i, i - 1].mean(-1))
        shares |= {(layer, head): float(share) for head, share in enumerate(both)}
    return sorted(shares, key=lambda head: -shares[head])


def returns(model: PreTrainedModel, streams: dict[int, Tensor], score: Scorer) -> list[Head]:
    """Heads of the removed layers, those last without which copying suffers least."""
    config = model.config
    C, count = config.hidden_size, config.num_attention_heads
    size = C // count
    total = C + len(GAP.removed) * count * size
    regressor = gl.Regressor.parse("x, h")
    family = replace(gl.OPERATORS["branches"], regressor=regressor)
    after = range(GAP.start + 1, GAP.stop + 1)
    whole = {y: gl.Moments(C, regressor=regressor, hidden=total - C) for y in after}
    everything = list(range(count))
    for row, x in enumerate(streams[GAP.start]):
        kept = [outputs(model, y, streams[y][[row]], everything)[0] for y in GAP.removed]
        F, before = torch.cat([x, *kept], -1).double(), Stream.of(x)
        for y, moments in whole.items():  # they differ in what is regressed, and share one Gram
            last = y == GAP.stop
            moments.add_sequence(F, before, Stream.of(streams[y][row]), with_gram=last)
    G = whole[GAP.stop].G

    def circuit(heads: list[Head]) -> Circuit:
        """As `Circuit.fit` with a teacher would find it, from parts of the same moments."""
        chosen = Circuit(model, heads)
        for layer in [*chosen.heads, GAP.stop]:
            if layer == GAP.start:
                continue
            starts = [C + ((y - GAP.start) * count + h) * size for y, h in heads if y < layer]
            columns = torch.tensor([*range(C), *(s + i for s in starts for i in range(size))])
            cross, f1 = whole[layer].cross[columns], whole[layer].f1[columns]
            part = whole[layer].replaced(
                {"G": G[columns][:, columns], "cross": cross, "f1": f1}, {}
            )
            part.regressor = regressor if starts else gl.Regressor.parse("x")
            part.blocks = part.regressor.widths(C, len(columns) - C or None)
            chosen.maps[layer] = gl.solve(part, replace(family, regressor=part.regressor), **RIDGE)
        return chosen

    left = [(y, h) for y in GAP.removed for h in everything]
    dropped: list[Head] = []
    while len(left) > 4:
        without = {head: score.copying(circuit([h for h in left if h != head])) for head in left}
        weakest = sorted(left, key=lambda head: without[head])[: max(len(left) // 4, 1)]
        left = [head for head in left if head not in weakest]
        dropped = [*reversed(weakest), *dropped]
        print(f"{len(left)} heads left: copying {score.copying(circuit(left)):5.2f}", flush=True)
    return left + dropped


def run(part: PreTrainedModel, x: Tensor) -> Tensor:
    """The stream ``x`` after all layers of an excerpt."""
    with feed(part, x):
        end = part.config.num_hidden_layers
        return record(part, torch.zeros(x.shape[:2], dtype=torch.long), [end])[end]


def whole_layer(
    model: PreTrainedModel, layer: int, windows: Tensor, streams: dict[int, Tensor]
) -> tuple[Map, int]:
    """One of the removed layers kept whole, and its multiplications beyond one matrix."""
    gaps = gl.runs(
        [other for other in GAP.removed if other != layer], model.config.num_hidden_layers
    )
    options: dict[str, Any] = {"streams": streams, **RIDGE}
    operators = gl.fit_sequential(model, windows, gaps, "ghost", **options)
    part = excerpt(model, layer, layer + 1)

    def f(x: Tensor) -> Tensor:
        for gap in gaps:
            x = run(part, x) if gap.start > layer == GAP.start else x
            x = operators[gap].apply(x)
            x = run(part, x) if gap.stop == layer else x
        return x

    weights = sum(p.numel() for p in gl.decoder_layers(part)[0].parameters() if p.ndim == 2)
    C = model.config.hidden_size
    return f, weights + C * windows.shape[1] + (len(gaps) - 1) * C * C


def main() -> None:
    """Print a line for each way to keep something of the removed layers."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="*", type=int, default=[12], help="how many are kept")
    parser.add_argument("--layers", nargs="*", type=int, default=[16, 17], help="to keep whole")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the windows, from 0")
    options = parser.parse_args()
    model, tokenizer = gl.load_model()
    layers = range(GAP.start, GAP.stop + 1)

    def draw(seed: int) -> tuple[Tensor, dict[int, Tensor]]:
        windows = calibration(tokenizer, options.windows, options.length, seed)
        return windows, dense_streams(model, windows, layers)

    orders = {"attend": attends(model, len(tokenizer))}
    if options.heads:
        other = Scorer(model, tokenizer, options.rows // 2, 1, seed=CHOOSING)
        orders["return"] = returns(model, draw(CHOOSING)[1], other)
    score = Scorer(model, tokenizer, options.rows, options.test_windows)

    def line(name: str, f: Map, cost: float) -> None:
        print(f"{name:30} {score(f)}  {cost / 1e6:5.2f} M", flush=True)

    line("no repair", lambda x: x, 0)
    for seed in range(options.seeds):
        windows, streams = draw(seed)
        line(f"seed {seed}, one matrix", Circuit(model, []).fit(streams, teacher=True), 0)
        for count, (order, heads) in product(options.heads, orders.items()):
            if seed == 0:
                print("kept:", " ".join(f"{y}.{head}" for y, head in sorted(heads[:count])))
            for way in ("teacher", "sequence"):
                circuit = Circuit(model, heads[:count]).fit(streams, teacher=way == "teacher")
                cost = circuit.cost(options.length // 2)
                line(f"seed {seed}, {count} that {order}, {way}", circuit, cost)
        for layer in options.layers:
            line(f"seed {seed}, layer {layer} whole", *whole_layer(model, layer, windows, streams))


if __name__ == "__main__":
    main()
