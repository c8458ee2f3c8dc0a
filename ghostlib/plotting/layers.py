"""Figures of layer selection: one function each, from plain data to the `Axes` they drew on."""

from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter

from ghostlib.plotting.figures import color, short


def start_by_length(
    values: Mapping[tuple[int, int], float],
    *,
    label: str,
    title: str = "",
    best: str = "min",
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """A value for every block of layers, first removed layer across, number of layers upward.

    Args:
        values: ``{(start, stop): value}``, such as by `Boundary`. label: what a colour means.
        best: ``"min"`` or ``"max"``: the block marked in every row by a dot.
        log: colours by the logarithm of the value.
    """
    ax = ax or plt.gca()
    rows: dict[int, dict[int, float]] = {}
    for (start, stop), value in values.items():
        rows.setdefault(stop - start, {})[start] = value
    table = pd.DataFrame(rows).T.sort_index(ascending=False).sort_index(axis=1)
    sns.heatmap(
        table,
        norm=LogNorm() if log else None,
        cmap="viridis_r" if best == "min" else "viridis",
        cbar_kws={"label": label},
        ax=ax,
    )
    _plain_colour_bar(ax)
    for place, length in enumerate(table.index):
        row = table.loc[length]
        start = row.idxmin() if best == "min" else row.idxmax()
        ax.plot(table.columns.get_loc(start) + 0.5, place + 0.5, "o", color="#d62728", markersize=5)
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
    ax.set(xlabel="first removed layer", ylabel="layers removed", title=title)
    return ax


def removed_layers(
    choices: Mapping[str, Iterable[int]], total: int, *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Which of ``total`` layers each criterion removes: one row a criterion, one cell a layer.

    Args:
        choices: ``{name: layers}``, drawn from top to bottom.
    """
    ax = ax or plt.gca()
    for row, layers in enumerate(choices.values()):
        removed = set(layers)
        for layer in range(total):
            shade = color("pruned") if layer in removed else "#e8e8e8"
            ax.add_patch(plt.Rectangle((layer - 0.45, row - 0.4), 0.9, 0.8, color=shade))
    ax.set(xlim=(-0.7, total - 0.3), xlabel="decoder layer (red: removed)", title=title)
    ax.set_ylim(len(choices) - 0.5, -0.5)
    ax.set_yticks(range(len(choices)), list(choices))
    ax.set_xticks(range(0, total, 2))
    ax.grid(visible=False)
    return ax


def against_score(
    score: Mapping[int, float],
    perplexity: Mapping[int, float],
    *,
    xlabel: str,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Perplexity of the repaired model against a criterion's score, one dot a block.

    Args:
        score, perplexity: ``{first removed layer: value}``; the dots are named by the layer.
    """
    ax = ax or plt.gca()
    for start, value in score.items():
        ax.plot(value, perplexity[start], "o", color=color("ghost"), markersize=6)
        ax.annotate(str(start), (value, perplexity[start]), (4, 3), textcoords="offset points")
    ax.set(yscale="log", xlabel=xlabel, ylabel="perplexity with ghost", title=title)
    for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        axis(FuncFormatter(lambda value, _: f"{value:g}"))
    return ax


def grid(
    table: pd.DataFrame, *, label: str = "perplexity", title: str = "", ax: Axes | None = None
) -> Axes:
    """Perplexities as a heat map with their numbers, on a logarithmic colour scale.

    Args:
        table: one row a choice of layers, one column a repair; missing cells stay white.
    """
    ax = ax or plt.gca()
    values = table.to_numpy(dtype=float)
    names = np.vectorize(lambda v: "" if np.isnan(v) else short(v))(values)
    sns.heatmap(
        table,
        annot=names,
        fmt="",
        norm=LogNorm(),
        cmap="viridis_r",
        cbar_kws={"label": f"{label} (log colours)"},
        annot_kws={"fontsize": 9},
        ax=ax,
    )
    _plain_colour_bar(ax)
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=30, ha="right")
    ax.set(xlabel="", ylabel="", title=title)
    return ax


def _plain_colour_bar(ax: Axes) -> None:
    """Numbers beside the colours without powers of ten, and over a wide range only some of them."""
    bar: Any = ax.collections[0].colorbar
    low, high = bar.mappable.get_clim()

    def written(value: float, _: object) -> str:
        return "" if high > 20 * low and f"{value:e}"[0] not in "125" else f"{value:,g}"

    axis = bar.ax.yaxis
    for write in (axis.set_major_formatter, axis.set_minor_formatter):
        write(FuncFormatter(written))
