"""Figures: one function each, from plain data to the `Axes` they drew on.

An operator has the same colour in every notebook: take it from `color`.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from ghostlib.common import Registry

COLORS: Registry[str] = Registry(
    "operator or model colour",
    **{
        "dense": "#404040",
        "pruned": "#c0392b",
        "identity": "#c0392b",
        "scalar": "#e6a57e",
        "magnitude": "#cc79a7",
        "diagonal": "#e69f00",
        "linearpatch-d": "#d4b106",
        "linearpatch-r": "#8c7b00",
        "hadamard-diagonal": "#b8860b",
        "orthogonal": "#7f7fd5",
        "scaled-orthogonal": "#5b5bb0",
        "symmetric": "#56b4e9",
        "low-rank": "#66c2a5",
        "ghost": "#00876c",
        "affine": "#004d40",
        "replaceme": "#a65628",
        "replaceme-cosine": "#d8a27f",
        "ghost sequential": "#3cb371",
        "ghost skip-leading": "#b2df8a",
        "ghost-relative": "#4daf4a",
        "two-branch": "#984ea3",
        "two-branch-relative": "#54278f",
        "three-branch": "#6baed6",
        "three-branch-relative": "#08519c",
        "branches": "#a1558a",
        "auto": "#e7298a",
    },
)


def color(name: str) -> str:
    """The colour of an operator, or of ``"dense"`` and ``"pruned"``, in every figure.

    Raises:
        ValueError: a name without a colour; the message lists those that have one.
    """
    return COLORS[name]


def use_style() -> None:
    """Set the look of all figures: sizes that can be read at 100 % and a light grid."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=1.05)
    plt.rcParams.update(
        {
            "figure.figsize": (8.0, 4.2),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def perplexity_bars(
    table: Mapping[str, Mapping[str, float]], *, reference: str = "dense", ax: Axes | None = None
) -> Axes:
    """Perplexity of each model on each corpus, on a logarithmic axis that starts at the reference.

    Args:
        table: ``{model: {corpus: perplexity}}``; model names pick the colours. The model
            ``reference`` is drawn as a line across its corpus' group, the others as bars from it.
    """
    ax = ax or plt.gca()
    corpora = list(table[reference])
    models = [name for name in table if name != reference]
    width = 0.8 / len(models)
    for group, corpus in enumerate(corpora):
        floor = table[reference][corpus]
        for place, name in enumerate(models):
            x = group + (place - (len(models) - 1) / 2) * width
            value = table[name][corpus]
            bar = ax.bar(x, value - floor, width * 0.92, bottom=floor, color=color(name))
            bar.set_label(name if group == 0 else "_")
            ax.annotate(short(value), (x, value), (0, 3), textcoords="offset points", ha="center")
        ax.hlines(floor, group - 0.46, group + 0.46, color=color(reference), linewidth=2.5)
        ax.annotate(
            f"{reference} {short(floor)}",
            (group - 0.46, floor),
            (0, -14),
            textcoords="offset points",
        )
    ax.set_yscale("log")
    values = [v for row in table.values() for v in row.values()]
    ax.set_ylim(min(values) * 0.8, max(values) * 1.2)
    ax.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(base=10, subs=(1, 1.5, 2, 3, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(corpora)), corpora)
    ax.grid(axis="x", visible=False)
    ax.set(ylabel="perplexity (log scale, lower is better)")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def short(value: float) -> str:
    """Three significant digits, trailing zeros kept, without an exponent."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"


def plain_numbers(axis: Axis) -> None:
    """Label an axis without powers of ten, at its major ticks only."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def through_depth(
    curves: Mapping[str, ArrayLike],
    *,
    ylabel: str,
    title: str = "",
    removed: Sequence[int] = (),
    first: int = 0,
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """One line per curve against the position in the residual stream.

    Args:
        curves: ``{name: values}``; names that have a colour get it. Value ``i`` stands at stream
            index ``first + i`` (the input of that layer; the layer count is the final norm).
        removed: layers whose band is shaded.
    """
    ax = ax or plt.gca()
    for name, values in curves.items():
        y = np.asarray(values, dtype=float)
        known = COLORS.get(name)
        ax.plot(first + np.arange(len(y)), y, marker="o", markersize=4, label=name, color=known)
    if len(removed):
        ax.axvspan(min(removed), max(removed) + 1, color="#c0392b", alpha=0.10, label="removed")
    if log:
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="position in the stream (input of layer)", ylabel=ylabel, title=title)
    if len(curves) > 1 or len(removed):
        ax.legend()
    return ax


def token_depth_heatmap(
    norms: ArrayLike, tokens: Sequence[str], *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Norm of the stream for every token (column) at every depth (row), colours on a log scale.

    Args:
        norms: (depth, tokens). tokens: their texts, as column labels.
    """
    ax = ax or plt.gca()
    values = np.asarray(norms, dtype=float)
    sns.heatmap(
        values[::-1],
        norm=plt.matplotlib.colors.LogNorm(),
        cmap="mako_r",
        xticklabels=list(tokens),
        yticklabels=[str(i) for i in range(len(values))][::-1],
        cbar_kws={"label": "norm of the stream"},
        ax=ax,
    )
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ticks = [t for t in range(0, len(values), 5)]
    ax.set_yticks([len(values) - t - 0.5 for t in ticks], [str(t) for t in ticks], rotation=0)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=60, ha="right", fontsize=9)
    ax.set(xlabel="token", ylabel="position in the stream", title=title)
    return ax


def lattice(
    places: Mapping[str, tuple[float, float]],
    inclusions: Sequence[tuple[str, str]],
    notes: Mapping[str, str] | None = None,
    *,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Sets of operators as a Hasse diagram: a line leads up from a set to one that contains it.

    Args:
        places: ``{operator: (x, y)}``, where its box stands. inclusions: (smaller, larger) pairs.
        notes: a second line for some of the boxes.
    """
    ax = ax or plt.gca()
    for pair in inclusions:
        (x0, y0), (x1, y1) = (places[name] for name in pair)
        ax.plot([x0, x1], [y0, y1], color="#b0b0b0", linewidth=1.5, zorder=1)
    for name, (x, y) in places.items():
        text = "\n".join(filter(None, [name, (notes or {}).get(name, "")]))
        box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": color(name), "linewidth": 2.5}
        ax.text(x, y, text, ha="center", va="center", fontsize=11, bbox=box, zorder=2)
    xs, ys = zip(*places.values(), strict=True)
    ax.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.5, max(ys) + 0.5), title=title)
    ax.set_axis_off()
    return ax


def train_and_held_out(
    errors: Mapping[str, tuple[float, float]],
    *,
    xlabel: str = "error relative to doing nothing (1 = no better than pruning)",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Two horizontal bars for each operator: training tokens (pale) and held-out ones.

    Args:
        errors: ``{operator: (training, held out)}``, drawn from top to bottom.
    """
    ax = ax or plt.gca()
    for row, (name, (train, held_out)) in enumerate(errors.items()):
        for y, value, alpha in ((row - 0.2, train, 0.45), (row + 0.2, held_out, 1.0)):
            ax.barh(y, value, 0.38, color=color(name), alpha=alpha)
            ax.text(value, y, f" {value:.2f}", fontsize=10, va="center")
    for label, alpha in (("training tokens", 0.45), ("held-out tokens", 1.0)):
        ax.barh(np.nan, np.nan, color="#606060", alpha=alpha, label=label)
    ax.set_xlim(0, 1.12 * max(max(pair) for pair in errors.values()))
    ax.set_yticks(range(len(errors)), list(errors))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=xlabel, title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def against_tokens(
    curves: Mapping[str, Mapping[int, ArrayLike]],
    *,
    width: int | None = None,
    ylabel: str = "error relative to doing nothing",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Curves against the number of calibration tokens, both axes logarithmic.

    Args:
        curves: ``{label: {tokens: values}}``, one value or one for each independent draw: the line
            is their median, the band runs from the least to the greatest. A label is the name of an
            operator, or ``"name, note"``; the note ``"training"`` is dashed, any other dotted.
        width: marked by a vertical line.
    """
    ax = ax or plt.gca()
    for label, curve in curves.items():
        name, _, note = label.partition(", ")
        tokens = sorted(curve)
        values = [np.atleast_1d(np.asarray(curve[n], dtype=float)) for n in tokens]
        style = {"": "-", "training": "--"}.get(note, ":")
        middle = [float(np.median(v)) for v in values]
        ax.plot(tokens, middle, style, color=color(name), marker="o", markersize=4, label=label)
        low, high = [v.min() for v in values], [v.max() for v in values]
        ax.fill_between(tokens, low, high, color=color(name), alpha=0.18, linewidth=0)
    if width is not None:
        ax.axvline(width, color="#404040", linewidth=1, linestyle="-.", label=f"width {width}")
    ax.set(xscale="log", yscale="log", xlabel="calibration tokens", ylabel=ylabel, title=title)
    for axis in (ax.xaxis, ax.yaxis):
        plain_numbers(axis)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def published_and_measured(
    published: Mapping[str, float],
    measured: Mapping[str, float],
    *,
    errors: Mapping[str, float] | None = None,
    labels: tuple[str, str] = ("published", "measured here"),
    ylabel: str,
    log: bool = False,
    axes: Sequence[Axes] | None = None,
) -> tuple[Axes, Axes]:
    """The paper's numbers and ours in two panels, an operator in the same place and colour in both.

    Two panels, because model and scale differ: what can be compared is the order.

    Args:
        published, measured: ``{operator: value}``; an operator may be in one only.
        errors: half widths of the measured values' intervals.
        labels: titles of the panels, which say the models.
        log: logarithmic axes, for perplexities.
        axes: two of them; None to make them in the current figure.
    """
    left, right = plt.gcf().subplots(1, 2) if axes is None else axes
    names = list(dict.fromkeys([*published, *measured]))
    for ax, label, table in ((left, labels[0], published), (right, labels[1], measured)):
        for name, value in table.items():
            x = names.index(name)
            half = (errors or {}).get(name) if ax is right else None
            ax.bar(x, value, color=color(name), yerr=half, capsize=4)
            top = value + (half or 0)
            ax.annotate(short(value), (x, top), (0, 3), textcoords="offset points", ha="center")
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        ax.grid(axis="x", visible=False)
        ax.margins(y=0.12)
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.set(title=label, ylabel=ylabel, yscale="log" if log else "linear")
    return left, right
