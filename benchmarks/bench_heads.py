"""Copying with some heads of the removed layers kept, compared with keeping one layer.

    python benchmarks/bench_heads.py [--heads 12] [--layers 16 17] [--windows 12] [--seeds 3]

Layers 12 … 18 of the embedded model are removed, except for some heads. Each of these reads a map
of one token's stream (and of the outputs of the kept heads before it) that estimates the input of
its layer; after the gap the stream and all outputs are regressors together, in closed form. Fitted
on the dense model's streams (teacher), and on the actual inputs of the kept heads (sequence). For
comparison one of the seven layers is kept, with a matrix in every gap, fitted in sequence.

The heads are chosen in two ways. `by_attention`: the heads that attend most to the token before, or
after the last occurrence of the present one, on repeated rows. `by_elimination`: of all heads a
quarter is dropped repeatedly, those without which copying suffers least (on rows of another seed,
calibrated on windows of another seed). All heads cost the same number of multiplications.

Multiplications per token, in millions: of weights, and of attention to half a window, beyond the
one matrix that closes the gap. Scores: see `copying.py`.
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

CHOOSING = 100  # seed of the windows and rows on which heads are chosen
RIDGE = {"relative_ridge": 1e-4}
Head = tuple[int, int]  # layer, index in the layer


def outputs(model: PreTrainedModel, layer: int, x: Tensor, heads: list[int]) -> Tensor:
    """(windows, length, heads * size) of some heads of a layer with input ``x``."""
    block: Any = gl.decoder_layers(model)[layer]
    attention, inputs = block.self_attn, []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    rotary = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    with torch.no_grad():
        attention(block.input_layernorm(x), position_embeddings=rotary, attention_mask=None)
    hook.remove()
    by_head: Tensor = inputs[0].unflatten(-1, (-1, attention.head_dim))
    return by_head[:, :, heads].flatten(2)


class Circuit:
    """Kept heads, and the maps of a token between them."""

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
                y = streams[layer] if teacher else self._input(layer, x, kept)
                kept = self._append(layer, y, kept)
        return self

    def _input(self, layer: int, x: Tensor, kept: Tensor | None) -> Tensor:
        """Estimated input of a layer."""
        return self.maps[layer].apply(x, hidden=kept) if layer in self.maps else x

    def _append(self, layer: int, y: Tensor, kept: Tensor | None) -> Tensor:
        """``kept`` with the outputs of the heads of a layer with input ``y``."""
        heads = outputs(self.model, layer, y, self.heads[layer])
        return heads if kept is None else torch.cat([kept, heads], -1)

    def __call__(self, x: Tensor) -> Tensor:
        kept = None
        for layer in self.heads:
            kept = self._append(layer, self._input(layer, x, kept), kept)
        return self._input(GAP.stop, x, kept)

    def cost(self, context: int) -> int:
        """Multiplications beyond one matrix; the output projections are part of the maps."""
        C: int = self.model.config.hidden_size
        total = sum(op.M.numel() for op in self.maps.values()) - C * C
        for layer, heads in self.heads.items():
            attention: Any = gl.decoder_layers(self.model)[layer].self_attn
            groups = {h // attention.num_key_value_groups for h in heads}
            total += C * attention.head_dim * (len(heads) + 2 * len(groups))
            total += 2 * attention.head_dim * context * len(heads)
        return total


def by_attention(model: PreTrainedModel, vocabulary: int) -> list[Head]:
    """Heads of the removed layers, in descending order of attention to either place."""
    ids = torch.randint(vocabulary, (6, 64), generator=torch.Generator().manual_seed(0))[:2]
    model.set_attn_implementation("eager")  # returns its weights
    with torch.no_grad():
        attentions = model(torch.cat([ids, ids], 1), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    i = torch.arange(64, 127)
    shares: dict[Head, float] = {}
    for layer in GAP.removed:
        A = attentions[layer].mean(0)  # (heads, 128, 128)
        larger = torch.maximum(A[:, i, i - 63].mean(-1), A[:, i, i - 1].mean(-1))
        shares |= {(layer, head): float(share) for head, share in enumerate(larger)}
    return sorted(shares, key=lambda head: -shares[head])


def by_elimination(model: PreTrainedModel, streams: dict[int, Tensor], score: Scorer) -> list[Head]:
    """Heads of the removed layers, the least important for copying last."""
    config = model.config
    C, count = config.hidden_size, config.num_attention_heads
    size = C // count
    total = C + len(GAP.removed) * count * size
    regressor, family = gl.Regressor.parse("x, h"), gl.OPERATORS["branches"]
    after = range(GAP.start + 1, GAP.stop + 1)
    moments = {y: gl.Moments(C, regressor=regressor, hidden=total - C) for y in after}
    every = list(range(count))
    for row, x in enumerate(streams[GAP.start]):
        kept = [outputs(model, y, streams[y][[row]], every)[0] for y in GAP.removed]
        F, before = torch.cat([x, *kept], -1).double(), Stream.of(x)
        for y, target in moments.items():  # different targets, one Gram matrix
            last = y == GAP.stop
            target.add_sequence(F, before, Stream.of(streams[y][row]), with_gram=last)
    G = moments[GAP.stop].G

    def fit(heads: list[Head]) -> Circuit:
        """`Circuit.fit` with a teacher, from submatrices of the moments of all heads."""
        circuit = Circuit(model, heads)
        for layer in [*circuit.heads, GAP.stop]:
            if layer == GAP.start:
                continue
            starts = [C + ((y - GAP.start) * count + h) * size for y, h in heads if y < layer]
            columns = torch.tensor([*range(C), *(s + i for s in starts for i in range(size))])
            target = moments[layer]
            sums = {"cross": target.cross[columns], "f1": target.f1[columns]}
            part = target.replaced({"G": G[columns][:, columns], **sums}, {})
            part.regressor = regressor if starts else gl.Regressor.parse("x")
            part.blocks = part.regressor.widths(C, len(columns) - C or None)
            branches = replace(family, regressor=part.regressor)
            circuit.maps[layer] = gl.solve(part, branches, **RIDGE)
        return circuit

    heads = [(y, h) for y in GAP.removed for h in every]
    dropped: list[Head] = []
    while len(heads) > 4:
        losses = {head: score.copying(fit([h for h in heads if h != head])) for head in heads}
        weakest = sorted(heads, key=lambda head: losses[head])[: max(len(heads) // 4, 1)]
        heads = [head for head in heads if head not in weakest]
        dropped = [*reversed(weakest), *dropped]
        print(f"{len(heads)} heads left: copying {score.copying(fit(heads)):5.2f}", flush=True)
    return heads + dropped


def run(part: PreTrainedModel, x: Tensor) -> Tensor:
    """The stream ``x`` after all layers of an excerpt."""
    with feed(part, x):
        end = part.config.num_hidden_layers
        return record(part, torch.zeros(x.shape[:2], dtype=torch.long), [end])[end]


def kept_layer(
    model: PreTrainedModel, layer: int, windows: Tensor, streams: dict[int, Tensor]
) -> tuple[Map, int]:
    """The gap with one of its layers kept, and its multiplications beyond one matrix."""
    removed = [other for other in GAP.removed if other != layer]
    gaps = gl.runs(removed, model.config.num_hidden_layers)
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
    """Print a line for each choice of kept heads and for each kept layer."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="*", type=int, default=[12], help="numbers to keep")
    parser.add_argument("--layers", nargs="*", type=int, default=[16, 17], help="to keep, one each")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the windows, from 0")
    options = parser.parse_args()
    model, tokenizer = gl.load_model()
    layers = range(GAP.start, GAP.stop + 1)

    def draw(seed: int) -> tuple[Tensor, dict[int, Tensor]]:
        windows = calibration(tokenizer, options.windows, options.length, seed)
        return windows, dense_streams(model, windows, layers)

    orders = {"attend": by_attention(model, len(tokenizer))}
    if options.heads:
        scorer = Scorer(model, tokenizer, options.rows // 2, 1, seed=CHOOSING)
        orders["return"] = by_elimination(model, draw(CHOOSING)[1], scorer)
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
            line(f"seed {seed}, layer {layer} whole", *kept_layer(model, layer, windows, streams))


if __name__ == "__main__":
    main()
