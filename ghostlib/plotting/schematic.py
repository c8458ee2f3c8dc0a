"""Schematic of the removed layers and of the matrix in their place."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ghostlib.plotting.style import color, describe

_DENSE, _REPAIRED = 2.0, 0.0  # heights of the two rows
_HALF = 0.36  # half the width of a box


def schematic(layers: int, removed: Sequence[int], *, ax: Axes | None = None) -> Axes:
    """A dense model above, the repaired one below: block, gap, boundary, X_pre, X_post and W.

    Args:
        layers: decoder layers of the dense model.
        removed: the block of adjacent layers to remove, such as ``range(12, 19)``.

    Raises:
        ValueError: layers that the model does not have, all layers, or not a single block.
    """
    start, stop = min(removed, default=0), max(removed, default=-1) + 1
    if sorted(removed) != list(range(start, stop)) or not 0 <= start < stop <= layers:
        raise ValueError(
            f"removed must be one block of adjacent layers of 0 … {layers - 1}, such as "
            f"range(12, 19), got {list(removed)}"
        )
    if stop - start == layers:
        raise ValueError(f"removing all {layers} layers leaves no model: keep at least one")
    ax = ax or plt.gca()
    before = ["embed", *_abbreviated(0, start)]
    block = _abbreviated(start, stop)
    after = [*_abbreviated(stop, layers), "norm"]
    names = [*before, *block, *after]
    entry, leave = len(before), len(before) + len(block)  # columns: the block's, the next layer's

    arrow = {"arrowstyle": "-|>", "color": "#606060", "linewidth": 1.5}
    for height, label in ((_DENSE, "dense"), (_REPAIRED, "repaired")):
        ax.text(-0.75, height, label, ha="right", va="center", fontweight="bold")
        head, tail = (len(names) - 0.2, height), (-0.7, height)
        ax.annotate("", head, tail, arrowprops=arrow, zorder=0)
    for column, name in enumerate(names):
        if entry <= column < leave:
            _layer(ax, column, _DENSE, name, color("pruned"), "--")
        else:
            for height in (_DENSE, _REPAIRED):
                _layer(ax, column, height, name, "#404040")
    middle = (entry + leave - 1) / 2
    _layer(ax, middle, _REPAIRED, "W", color("ghost"), fill=color("ghost"))

    pre, post = entry - 0.5, leave - 0.5
    heights = [_REPAIRED - 0.1, _DENSE + 0.1]
    for x, name in ((pre, "X_pre"), (post, "X_post")):
        ax.plot([x, x], heights, ":", color="#606060", linewidth=1.2, zorder=1)
        ax.text(x, _DENSE + 0.55, name, ha="center", va="bottom", fontweight="bold")
    ax.text(pre + 0.1, _REPAIRED - 0.55, "X_pre", ha="right", va="top")
    ax.text(post - 0.1, _REPAIRED - 0.55, "X_pre W ≈ X_post", ha="left", va="top")
    arrow = {"arrowstyle": "<->", "color": color("pruned")}
    ax.annotate("", (post - 0.03, 1.0), (pre + 0.03, 1.0), arrowprops=arrow)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    gap = "gap" if len(block) == 1 else f"gap: {stop - start} layers removed"
    ax.text(middle, 1.0, gap, ha="center", va="center", color=color("pruned"), bbox=white)
    span = f"layer {start}" if len(block) == 1 else f"layers {start} … {stop - 1}"
    ax.text(middle, _DENSE + 1.0, f"block: {span}", ha="center", color=color("pruned"))
    text = f"boundary ({start}, {stop}): one matrix W stands in for the block"
    ax.text(middle, _REPAIRED - 1.0, text, ha="center", va="top", color=color("ghost"))
    ax.set(xlim=(-1.9, len(names) + 0.1), ylim=(_REPAIRED - 1.5, _DENSE + 1.5))
    ax.set_axis_off()
    return describe(
        ax,
        f"A model of {layers} layers, above. Its layers {start} to {stop - 1}, the block, are "
        "removed. X_pre enters the block, X_post leaves it for "
        f"{'the final norm' if stop == layers else f'layer {stop}'}. Below, the repaired model: "
        "at the boundary in the gap a matrix W takes X_pre to nearly X_post.",
    )


def _abbreviated(start: int, stop: int) -> list[str]:
    """Names of layers ``start … stop - 1``; of more than three the first and the last."""
    names = [str(layer) for layer in range(start, stop)]
    return names if len(names) <= 3 else [names[0], "…", names[-1]]


def _layer(
    ax: Axes, x: float, y: float, name: str, edge: str, dash: str = "-", fill: str = "white"
) -> None:
    if name != "…":
        box = Rectangle((x - _HALF, y - _HALF), 2 * _HALF, 2 * _HALF, zorder=2)
        box.set(facecolor=fill, edgecolor=edge, linestyle=dash, linewidth=1.8)
        ax.add_patch(box)
    text = ax.text(x, y, name, ha="center", va="center", zorder=3)
    text.set(color="white" if fill != "white" else edge, fontsize=8 if len(name) > 2 else 12)
    if name == "…":
        text.set(fontsize=16, backgroundcolor="white")
