"""Figures that set repairs side by side: along the model, and over seeds."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from ghostlib.plotting.figures import COLORS, color, plain_numbers, short


def by_start(
    curves: Mapping[str, Mapping[int, float]],
    *,
    most: float | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Perplexity after removing a block, against its first layer; one line a repair.

    Args:
        curves: ``{repair: {first removed layer: perplexity}}``.
        most: upper end of the axis; what lies above it is cut off.
    """
    ax = ax or plt.gca()
    for name, curve in curves.items():
        starts = sorted(curve)
        values = [curve[start] for start in starts]
        ax.plot(starts, values, marker="o", markersize=4, color=color(name), label=name)
    ax.set_yscale("log")
    if most is not None:
        ax.set_ylim(top=most)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    plain_numbers(ax.yaxis)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="first removed layer", ylabel="perplexity (log scale)", title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def ratios(
    table: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    reference: str = "ghost",
    names: Mapping[str, str] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Perplexity relative to a reference: a dot for each seed, a bar at their geometric mean.

    The axis is logarithmic where ratios differ by more than a factor of three.

    Args:
        table: ``{repair: {corpus: one ratio a seed}}``, drawn from top to bottom; within a row the
            corpora follow each other in the order of the first repair's.
        names: the operator whose colour a row has, where its label is another.
    """
    ax = ax or plt.gca()
    corpora = list(next(iter(table.values())))
    step = 0.8 / len(corpora)
    for row, (label, by_corpus) in enumerate(table.items()):
        shade = COLORS.get((names or {}).get(label, label), "#808080")
        for place, corpus in enumerate(corpora):
            values = np.asarray(by_corpus[corpus], dtype=float)
            y = row + (place - (len(corpora) - 1) / 2) * step
            mean = float(np.exp(np.log(values).mean()))
            ax.plot([mean, mean], [y - 0.4 * step, y + 0.4 * step], color=shade, linewidth=3)
            ax.scatter(values, np.full(len(values), y), s=16, color=shade, alpha=0.6, zorder=3)
            right = float(values.max())
            note = f"{corpus} {short(mean) if mean < 0.01 else f'{mean:.2f}'}"
            ax.annotate(
                note, (right, y), (7, 0), textcoords="offset points", va="center", fontsize=9
            )
    ax.axvline(1.0, color=color(reference), linewidth=1.5)
    every = [value for row in table.values() for values in row.values() for value in values]
    label = f"perplexity relative to {reference}"
    if max(1.0, *every) > 3 * min(1.0, *every):
        label += " (log scale)"
        ax.set_xscale("log")
    plain_numbers(ax.xaxis)
    ax.set_yticks(range(len(table)), list(table))
    ax.set_ylim(len(table) - 0.5, -0.5)  # from top to bottom, also where panels share the axis
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=label, title=title)
    return ax
