"""Figures of results: one function each, from plain data to `Axes`.

Every function attaches an alternative text made of its data (`ghostlib.plotting.alt_text`).
"""

import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import ArrayLike
from scipy import stats

from ghostlib.evaluation.abilities import NOTHING, t_interval
from ghostlib.operators.families import FAMILIES, Shape
from ghostlib.plotting.style import (
    LOOKS,
    NEUTRAL,
    clip,
    color,
    describe,
    label_points,
    look,
    plain_numbers,
    short,
    style,
)

PERPLEXITY = "perplexity (log scale, lower is better)"
ERROR = "error relative to no repair (lower is better)"
# (smaller, larger) sets of plain operators
INCLUSIONS = (
    ("identity", "scalar"),
    ("scalar", "diagonal"),
    ("scalar", "hadamard-diagonal"),
    ("diagonal", "symmetric"),
    ("hadamard-diagonal", "symmetric"),
    ("symmetric", "ghost"),
    ("identity", "orthogonal"),
    ("orthogonal", "scaled-orthogonal"),
    ("scalar", "scaled-orthogonal"),
    ("scaled-orthogonal", "ghost"),
    ("identity", "low-rank"),
    ("low-rank", "ghost"),
    ("ghost", "affine"),
)
# a legend to the right of the axes
_OUTSIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}


# ---------------------------------------------------------------- perplexities and accuracies


def perplexity_bars(
    table: Mapping[str, Mapping[str, float]],
    *,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    names: Mapping[str, str] | None = None,
    note: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Bars of perplexity by model and corpus, on a logarithmic axis, from the dense model's up.

    Args:
        table: ``{model: {corpus: perplexity}}``; model names pick the colours. ``"dense"``
            is drawn as a line across its corpus' group, the others as bars from it.
        intervals: ``{model: {corpus: (low, high)}}``, for some or all bars.
        names: labels for some of the models and corpora.
        note: small print below, such as the model and the tokens scored.
    """
    ax = ax or plt.gca()
    labels = {name: name for name in (*table, *table["dense"])} | dict(names or {})
    corpora = list(table["dense"])
    models = [name for name in table if name != "dense"]
    width = 0.8 / max(len(models), 1)
    handles: dict[str, Any] = {}
    for group, corpus in enumerate(corpora):
        floor = table["dense"][corpus]
        for place, name in enumerate(models):
            x = group + (place - (len(models) - 1) / 2) * width
            value = table[name][corpus]
            bar = ax.bar(x, value - floor, width * 0.92, bottom=floor, color=color(name))
            (dot,) = ax.plot(x, value, look(name).marker, color=color(name), mec="white", ms=8)
            handles[name] = (bar, dot)
            top = value
            if intervals and corpus in intervals.get(name, {}):
                low, top = intervals[name][corpus]
                ax.errorbar(x, value, [[value - low], [top - value]], color="#242424", capsize=3)
            ax.annotate(short(value), (x, top), (0, 8), textcoords="offset points", ha="center")
        ax.hlines(floor, group - 0.46, group + 0.46, color=color("dense"), linewidth=2.5)
        text = f"{labels['dense']} {short(floor)}"
        ax.annotate(text, (group - 0.46, floor), (0, -14), textcoords="offset points")
    values = [v for row in table.values() for v in row.values()]
    highest = max(values + [high for row in (intervals or {}).values() for _, high in row.values()])
    ax.set(yscale="log", ylim=(min(values) * 0.8, highest * 1.25), ylabel=PERPLEXITY)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5)))
    plain_numbers(ax.yaxis)
    ax.set_xticks(range(len(corpora)), [labels[corpus] for corpus in corpora])
    ax.grid(axis="x", visible=False)
    overlaid: dict[Any, Any] = {tuple: HandlerTuple(ndivide=1)}
    texts = [labels[name] for name in handles]
    ax.legend([*handles.values()], texts, handler_map=overlaid, **_OUTSIDE)
    if note:
        ax.set_xlabel(note, fontsize=10, loc="left")
    groups = []
    for corpus in corpora:
        row = [f"{labels[name]} {short(values[corpus])}" for name, values in table.items()]
        groups.append(f"{labels[corpus]}: {', '.join(row)}")
    return describe(ax, f"Bars of perplexity, lower is better. {'; '.join(groups)}. {note}".strip())


def published_and_measured(
    published: Mapping[str, float],
    measured: Mapping[str, float],
    *,
    errors: Mapping[str, float] | None = None,
    labels: tuple[str, str] = ("published", "measured here"),
    ylabel: str,
    log: bool = False,
    chance: float | None = None,
    axes: Sequence[Axes] | None = None,
) -> tuple[Axes, Axes]:
    """The paper's numbers and ours in two panels, each operator in the same place and colour.

    Model and tasks differ, so that only the order can be compared. The panels have one scale; the
    dense and the pruned model come first.

    Args:
        published: ``{operator: value}``.
        measured: the same; some operators may be in one of the two only.
        errors: half widths of the measured values' 95 % intervals.
        labels: titles of the panels, which name the models.
        ylabel: the quantity, its unit, and whether lower or higher is better.
        log: points on logarithmic axes, for perplexities.
        chance: accuracy of guessing, drawn as a line in the measured panel.
        axes: two of them; None to create them in the current figure.
    """
    left, right = plt.gcf().subplots(1, 2) if axes is None else axes
    names = list(dict.fromkeys([*published, *measured]))
    names.sort(key=lambda name: {"dense": 0, "pruned": 1}.get(name, 2))
    texts = []
    for ax, label, table in ((left, labels[0], published), (right, labels[1], measured)):
        for name, value in table.items():
            x, half = names.index(name), (errors or {}).get(name) if ax is right else None
            if log:  # the foot of a bar would be arbitrary
                ax.plot(x, value, look(name).marker or "_", color=color(name), ms=10, mew=2)
            else:
                ax.bar(x, value, color=color(name))
            if half is not None:
                ax.errorbar(x, value, half, color="#242424", capsize=4)
            top = value + (half or 0)
            above = (0, 9 if log else 5)  # points
            number = ax.annotate(
                short(value), (x, top), above, textcoords="offset points", ha="center", zorder=1.5
            )
            number.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # over grid
        if chance is not None and ax is right:
            ax.axhline(chance, color=NEUTRAL.color, linestyle=":")
            margin = ax.get_yaxis_transform()  # a fraction of the width, a value
            ax.text(1.01, chance, f"chance\n{short(chance)}", transform=margin, va="center")
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        ax.grid(axis="x", visible=False)
        interval = "\n(whiskers: 95 % interval)" if errors and ax is right else ""
        ax.set(title=label, ylabel=ylabel + interval, yscale="log" if log else "linear")
        plain_numbers(ax.yaxis)
        ax.margins(y=0.12)
        row = [f"{name} {short(table[name])}" for name in names if name in table]
        texts.append(f"{ylabel}: {', '.join(row) or 'none'}.")
    limits = [ax.get_ylim() for ax, table in ((left, published), (right, measured)) if table]
    for ax, text in zip((left, right), texts, strict=True):
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        describe(ax, text)
    return left, right


def by_start(
    curves: Mapping[str, Mapping[int, float]],
    *,
    ranges: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
    rings: Collection[str] = (),
    most: float | None = None,
    ylabel: str = PERPLEXITY,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Perplexity after removing a block, against its first layer; one line per repair.

    Args:
        curves: ``{repair: {first removed layer: perplexity}}``; the dense model has the same value
            at every start.
        ranges: ``{repair: {first removed layer: (lowest, highest)}}`` over seeds, a shade behind
            some or all lines.
        rings: repairs with large open markers, around the markers of a line that coincides.
        most: upper end of the axis; triangles mark values above, the legend gives the highest.
        ylabel: another score, on a linear axis.
    """
    ax, ranges = ax or plt.gca(), ranges or {}
    for name, curve in curves.items():
        starts = sorted(curve)
        line = style(name)
        if name in rings:
            line |= {"markersize": 13, "markeredgewidth": 1.8, "markerfacecolor": "none"}
            line["zorder"] = 1
        ax.plot(starts, [curve[start] for start in starts], **line, label=name)
        if name in ranges:
            starts = sorted(ranges[name])
            lows, highs = zip(*(ranges[name][start] for start in starts), strict=True)
            ax.fill_between(starts, lows, highs, color=color(name), alpha=0.2, linewidth=0)
    if ylabel == PERPLEXITY:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    plain_numbers(ax.yaxis)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="first removed layer", ylabel=ylabel, title=title)
    if most is not None:
        clip(ax, 0.8 * min(min(curve.values()) for curve in curves.values()), most)
    ax.legend(**_OUTSIDE)
    texts = []
    for name, curve in curves.items():
        best, worst = min(curve, key=curve.__getitem__), max(curve, key=curve.__getitem__)
        ends = f"{short(curve[best])} at start {best} to {short(curve[worst])} at start {worst}"
        widest = max((high - low for low, high in ranges.get(name, {}).values()), default=0)
        texts.append(f"{name} from {ends}" + f", seeds up to {short(widest)} apart" * (widest > 0))
    measured = "Perplexity" if ylabel == PERPLEXITY else ylabel
    better = ", lower is better" if ylabel == PERPLEXITY else ""
    return describe(ax, f"{measured} by first removed layer{better}. {'; '.join(texts)}.")


def abilities(
    tables: Mapping[str, pd.DataFrame], *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Share of each ability that is kept, one row per probe: 0 is chance, 1 the dense model.

    Bars are 95 % intervals over items. Probes that decide nothing are left out.

    Args:
        tables: ``{model: table}`` of profiles with the dense model as reference
            (`ghostlib.Profile.table`); the names pick colours and markers.
    """
    ax = ax or plt.gca()
    first = next(iter(tables.values()))
    probes = [name for name in first.index if first.loc[name, "verdict"] != NOTHING]
    texts = []
    for place, (model, table) in enumerate(tables.items()):
        rows = table.loc[probes]
        scale = rows["dense"] - rows["chance"]
        ends = [(rows[end] - rows["chance"]) / scale for end in ("low", "high")]
        y = np.arange(len(probes)) + (place - (len(tables) - 1) / 2) * 0.7 / len(tables)
        ax.plot(rows["kept"], y, look(model).marker, color=color(model), markersize=7, label=model)
        ax.hlines(y, np.minimum(*ends), np.maximum(*ends), color=color(model), linewidth=1.2)
        kept = [f"{name} {value:.2f}" for name, value in rows["kept"].items()]
        texts.append(f"{model}: {', '.join(kept)}")
    ax.axvline(1, **style("dense"), label="dense model")
    ax.axvline(0, color=NEUTRAL.color, linestyle=":", label="chance")
    ax.set_yticks(range(len(probes)), probes)
    ax.set(ylim=(len(probes) - 0.5, -0.5), xlabel="share kept (higher is better)", title=title)
    ax.grid(axis="y", visible=False)
    ax.legend(**_OUTSIDE)
    return describe(ax, f"Share of each ability kept, 1 is the dense model. {'; '.join(texts)}.")


def front(
    points: Mapping[str, tuple[float, float]],
    *,
    labels: Mapping[str, str],
    xlabel: str,
    ylabel: str,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Two losses of several models, and the Pareto front.

    Args:
        points: ``{name: (x, y)}``, lower is better for both.
        labels: ``{name: text}`` for some of the points.
        xlabel: the quantity x and its unit.
        ylabel: the quantity y and its unit.
    """
    ax = ax or plt.gca()
    best: list[str] = []
    for name in sorted(points, key=points.__getitem__):
        if not best or points[name][1] < points[best[-1]][1]:
            best.append(name)
    shades = {True: "#242424", False: NEUTRAL.color}
    for name, (x, y) in points.items():
        ax.plot(x, y, "o", color=shades[name in labels], markersize=7 if name in labels else 4)
    edge = np.array([points[name] for name in best])
    corners = np.repeat(edge, 2, axis=0)
    steps = np.column_stack([corners[1:, 0], corners[:-1, 1]])  # right, then down
    ax.plot(*steps.T, color=NEUTRAL.color, zorder=0, label="none is better in both")
    ax.set(xlabel=f"{xlabel} (lower is better)", ylabel=f"{ylabel} (lower is better)", title=title)
    ax.margins(0.08)
    ax.legend(loc="upper right")
    along = np.linspace(steps[:-1], steps[1:], 50).reshape(-1, 2) if len(steps) > 1 else steps
    unlabelled = [xy for name, xy in points.items() if name not in labels]
    wrapped = [
        (*points[name], textwrap.fill(text, 22, break_on_hyphens=False))
        for name, text in labels.items()
    ]
    label_points(ax, wrapped, beside=[*along, *unlabelled])
    texts = ["{} {:.3g}, {:.3g}".format(text, *points[name]) for name, text in labels.items()]
    ends = "; ".join(f"{x:.3g}, {y:.3g}" for x, y in edge)
    return describe(ax, f"{ylabel} against {xlabel}: {'; '.join(texts)}. Front: {ends}.")


def differences(
    table: Mapping[str, ArrayLike], *, ylabel: str, title: str = "", ax: Axes | None = None
) -> Axes:
    """Paired differences of two models: one dot per window, and the mean with its 95 % interval.

    Args:
        table: ``{group: differences}``, two or more in each (such as windows of a corpus).
        ylabel: the subtraction, its unit, and which sign is better.
    """
    ax = ax or plt.gca()
    texts = []
    for place, (label, values) in enumerate(table.items()):
        y = np.asarray(values, dtype=float)
        mean, low, high = t_interval(y)
        x = place + np.linspace(-0.3, 0, len(y))  # side by side: equal ones stay visible
        ax.plot(x, y, "o", color=NEUTRAL.color, mec="white")
        ax.errorbar(
            place + 0.1, mean, (high - low) / 2, fmt="_", color="#242424", capsize=5, markersize=14
        )
        text = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        ax.annotate(text, (place + 0.1, mean), (10, 0), textcoords="offset points", va="center")
        spread = f"{len(y)} differences from {y.min():+.3f} to {y.max():+.3f}"
        texts.append(f"{label} mean {text}, {spread}")
    ax.axhline(0, color="#404040", linewidth=1)
    ax.set_xticks(range(len(table)), list(table))
    ax.set(xlim=(-0.4, len(table) - 0.3), ylabel=ylabel, title=title)
    ax.grid(axis="x", visible=False)
    return describe(ax, f"{ylabel}; with 95 % intervals: {'; '.join(texts)}.")


def ratios(
    table: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    names: Mapping[str, str] | None = None,
    title: str = "",
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Perplexity relative to ghost: one panel per corpus, one row per repair, one dot per seed.

    A bar stands at the seeds' geometric mean, which is written next to the panel. The axes are
    logarithmic where ratios differ by more than a factor of three.

    Args:
        table: ``{repair: {corpus: one ratio per seed}}``, drawn from top to bottom.
        names: ``{repair: operator}`` for rows with the look of an operator of another name.
        title: above all panels.
        axes: one per corpus; None to create them in the current figure.
    """
    corpora = list(dict.fromkeys(corpus for row in table.values() for corpus in row))
    if axes is None:
        axes = list(plt.gcf().subplots(1, len(corpora), sharex=True, sharey=True, squeeze=False)[0])
    pooled = [value for row in table.values() for values in row.values() for value in values]
    log = max(1.0, *pooled) > 3 * min(1.0, *pooled)
    for ax, corpus in zip(axes, corpora, strict=True):
        means = {}
        for row, (label, by_corpus) in enumerate(table.items()):
            values = np.asarray(by_corpus.get(corpus, []), dtype=float)
            if not len(values):
                continue
            name = (names or {}).get(label, label)
            shade, marker, *_ = look(name) if name in {*LOOKS, *FAMILIES} else NEUTRAL
            means[label] = mean = float(np.exp(np.log(values).mean()))
            ax.plot([mean, mean], [row - 0.3, row + 0.3], color=shade, linewidth=3)
            ax.plot(values, np.full(len(values), row), marker, color=shade, alpha=0.7, mec="white")
            text = f"{mean:#.2g}" if mean < 0.1 else f"{mean:.2f}"
            margin = ax.get_yaxis_transform()  # a fraction of the width, a row
            ax.text(1.02, row, text, transform=margin, va="center", fontsize=10)
        ax.axvline(1.0, color=color("ghost"), linewidth=1.5, zorder=0)
        ax.set(xscale="log" if log else "linear", title=corpus)
        plain_numbers(ax.xaxis)
        ax.set_yticks(range(len(table)), list(table))
        ax.set_ylim(len(table) - 0.5, -0.5)  # from top to bottom, also where panels share the axis
        ax.grid(axis="y", visible=False)
        parts = ", ".join(f"{label} {short(mean)}" for label, mean in means.items())
        describe(ax, f"Perplexity relative to ghost, lower is better: {parts}.")
    figure: Any = axes[0].get_figure()
    scale = "log scale, " if log else ""
    figure.supxlabel(f"perplexity relative to ghost ({scale}lower is better)", fontsize=12)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    return list(axes)


def ratio_by_start(
    ratios: Mapping[int, Sequence[float]],
    repair: str,
    *,
    beside: Mapping[int, float] | None = None,
    beside_label: str | None = None,
    band: tuple[int, int] | None = None,
    band_label: str | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Ratio of the perplexities of two repairs of a block, against its first removed layer.

    A circle with its 95 % interval at each start: full where the interval excludes 1, open where
    it is undecided which of the two is better. ``legend()`` of the axes names them.

    Args:
        ratios: ``{first removed layer: (estimate, low, high, ...)}``; below 1 the repair is better
            than the other.
        repair: operator whose look the circles have.
        beside: the same ratio by another measurement, without interval: crosses.
        beside_label: of the crosses, in the legend.
        band: first and last start on a grey ground.
        band_label: of the ground, in the legend.
    """
    ax = ax or plt.gca()
    if band:
        ax.axvspan(band[0] - 0.5, band[1] + 0.5, color="#eeeeee", zorder=0, label=band_label)
    ax.axhline(1, color="#404040", linewidth=1)
    decided = {start: low > 1 or high < 1 for start, (_, low, high, *_) in ratios.items()}
    labels = {True: "decided, 95 % interval", False: "undecided"}  # one each in the legend
    for start, (estimate, low, high, *_) in ratios.items():
        ends = [[estimate - low], [high - estimate]]
        fill = color(repair) if decided[start] else "white"
        bars = ax.errorbar(start, estimate, ends, fmt="o", color=color(repair), mfc=fill, capsize=3)
        bars.set_label(labels.pop(decided[start], "_"))
    if beside:
        x, y = [start + 0.3 for start in beside], list(beside.values())  # clear of the circles
        ax.plot(x, y, "x", color="#404040", markersize=5, zorder=3, label=beside_label)
    ax.set(yscale="log", xlabel="first removed layer", title=title)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))
    ax.minorticks_off()
    plain_numbers(ax.yaxis)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    texts = [
        f"{start}: {short(estimate)}" + " undecided" * (not decided[start])
        for start, (estimate, *_) in ratios.items()
    ]
    return describe(ax, f"Ratio of perplexities by first removed layer: {', '.join(texts)}.")


# ---------------------------------------------------------------- the residual stream


def through_depth(
    curves: Mapping[str, ArrayLike],
    *,
    ylabel: str,
    xlabel: str = "position in the stream (input of layer)",
    title: str = "",
    first: int = 0,
    log: bool = False,
    mark: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One line per curve against the position in the residual stream, or another layer index.

    Args:
        curves: ``{name: values}``; operators have their look. Value ``i`` stands at stream index
            ``first + i`` (the input of that layer; the layer count is the final norm).
        mark: ``"max"`` or ``"min"``: the point of each curve to mark with its value.
    """
    ax = ax or plt.gca()
    texts = []
    for name, values in curves.items():
        y = np.asarray(values, dtype=float)
        x = first + np.arange(len(y))
        line_style = style(name) if name in {*LOOKS, *FAMILIES} else {"marker": "o"}
        (line,) = ax.plot(x, y, **line_style, markersize=5, label=name)
        low, high = int(np.nanargmin(y)), int(np.nanargmax(y))
        texts.append(f"{name} from {y[low]:.3g} at {x[low]} to {y[high]:.3g} at {x[high]}")
        if mark:
            best = high if mark == "max" else low
            ax.plot(x[best], y[best], "o", ms=13, mfc="none", mec=line.get_color(), mew=2)
            offset = (0, 12 if mark == "max" else -20)
            note = f"{x[best]}: {y[best]:.3g}"
            ax.annotate(note, (x[best], y[best]), offset, textcoords="offset points", ha="center")
            ax.margins(y=0.15)
    if log:
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(curves) > 1:
        ax.legend()
    return describe(ax, f"{ylabel} by {xlabel}: {'; '.join(texts)}.")


def token_depth_heatmap(
    norms: ArrayLike, tokens: Sequence[str], *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Norm of the stream for every token (column) at every depth (row), colours on a log scale.

    Args:
        norms: (depth, tokens).
        tokens: column labels.
    """
    ax = ax or plt.gca()
    values = np.asarray(norms, dtype=float)
    sns.heatmap(
        values[::-1],
        norm=LogNorm(),
        cmap="mako_r",
        xticklabels=list(tokens),
        cbar_kws={"label": "norm of the stream (log scale)"},
        ax=ax,
    )
    _plain_colour_bar(ax)
    rows = range(0, len(values), 5)
    ax.set_yticks([len(values) - row - 0.5 for row in rows], [str(row) for row in rows], rotation=0)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=60, ha="right", fontsize=9)
    ax.set(xlabel="token", ylabel="position in the stream", title=title)
    depth, token = divmod(int(values.argmax()), values.shape[1])
    peak = f"{values.max():,.0f}, of token {tokens[token]!r} at depth {depth}"
    typical = f"median {np.median(values):,.0f}"
    return describe(ax, f"Norm of the stream by token and depth: largest {peak}; {typical}.")


# ---------------------------------------------------------------- operator families


def lattice(
    places: Mapping[str, tuple[float, float]],
    inclusions: Sequence[tuple[str, str]],
    notes: Mapping[str, str] | None = None,
    *,
    members: Sequence[tuple[str, str]] = (),
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Sets of operators as a Hasse diagram: a line leads up from a set to one that contains it.

    Args:
        places: ``{operator: (x, y)}``, centres of the boxes.
        inclusions: (smaller, larger) pairs.
        notes: a second line for some of the boxes.
        members: (operator, set) pairs, dashed lines from a single element to its set.
    """
    ax = ax or plt.gca()
    for pairs, dash in ((inclusions, "-"), (members, "--")):
        for pair in pairs:
            (x0, y0), (x1, y1) = (places[name] for name in pair)
            ax.plot([x0, x1], [y0, y1], dash, color="#b0b0b0", linewidth=1.5, zorder=1)
    for name, (x, y) in places.items():
        text = "\n".join(filter(None, [name, (notes or {}).get(name, "")]))
        box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": color(name), "linewidth": 2.5}
        ax.text(x, y, text, ha="center", va="center", fontsize=11, bbox=box, zorder=2)
    xs, ys = zip(*places.values(), strict=True)
    ax.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.5, max(ys) + 0.5), title=title)
    ax.set_axis_off()
    steps = [f"{smaller} within {larger}" for smaller, larger in inclusions]
    steps += [f"{name} one member of {holder}" for name, holder in members]
    return describe(ax, f"Sets of operators: {', '.join(steps)}.")


def operator_lattice(width: int, rank: int, *, title: str = "", ax: Axes | None = None) -> Axes:
    """The sets of plain operators as a Hasse diagram, with their numbers of free parameters.

    Args:
        width: of the stream.
        rank: bound on the rank of ``low-rank``.
    """
    places: dict[str, tuple[float, float]] = {
        "identity": (1.5, 0),
        "scalar": (1, 1),
        "diagonal": (0, 2),
        "hadamard-diagonal": (1, 2),
        "orthogonal": (2.5, 2),
        "symmetric": (0.5, 3),
        "scaled-orthogonal": (2.5, 3),
        "low-rank": (3.9, 3),
        "ghost": (1.5, 4),
        "affine": (1.5, 5),
    }
    notes = {}
    for name in places:
        bound = rank if name == "low-rank" else 0
        free = FAMILIES[name].dof(Shape(width, width, bound, name == "affine"))
        notes[name] = f"rank {rank}: {free:,}" if bound else f"{free:,}"
    members = (("linearpatch-d", "diagonal"), ("linearpatch-r", "hadamard-diagonal"))
    notes |= {name: "one member" for name, _ in members}
    places |= {"linearpatch-d": (-0.8, 1), "linearpatch-r": (0.1, 1)}
    return lattice(places, INCLUSIONS, notes, members=members, title=title, ax=ax)


def train_and_held_out(
    errors: Mapping[str, tuple[float, float]], *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Two horizontal bars per operator: errors on training (hatched) and on held-out tokens.

    Args:
        errors: ``{operator: (training, held out)}``, drawn from top to bottom.
    """
    ax = ax or plt.gca()
    kinds: dict[str, dict[str, Any]] = {
        "training tokens": {"alpha": 0.45, "hatch": "///"},
        "held-out tokens": {},
    }
    texts = []
    for row, (name, pair) in enumerate(errors.items()):
        for y, value, kind in zip((row - 0.2, row + 0.2), pair, kinds.values(), strict=True):
            ax.barh(y, value, 0.38, color=color(name), edgecolor="white", **kind)
            ax.text(value, y, f" {value:.2f}", fontsize=10, va="center")
        texts.append(f"{name} {pair[0]:.2f} and {pair[1]:.2f}")
    for label, kind in kinds.items():
        ax.barh(np.nan, np.nan, color="#606060", edgecolor="white", **kind, label=label)
    ax.set_xlim(0, 1.12 * max(max(pair) for pair in errors.values()))
    ax.set_yticks(range(len(errors)), list(errors))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=ERROR, title=title)
    ax.legend(**_OUTSIDE)
    return describe(ax, f"{ERROR}, training and held-out tokens: {'; '.join(texts)}.")


def against_tokens(
    curves: Mapping[str, Mapping[int, ArrayLike]],
    *,
    width: int | None = None,
    ylabel: str = ERROR,
    ylim: tuple[float, float] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Curves against the number of calibration tokens, both axes logarithmic.

    Args:
        curves: ``{label: {tokens: values}}``, one value or one per independent draw: the line is
            their median, the small dots are the draws. A label is the name of an operator, or
            ``"name, note"``; with a note markers are hollow, and the line is dashed for the note
            ``"training"`` and dotted for any other.
        width: of the model, marked by a vertical line.
        ylim: ends of the axis; triangles mark values beyond, the legend gives the farthest.
    """
    ax = ax or plt.gca()
    texts = []
    for label, curve in curves.items():
        name, _, note = label.partition(", ")
        line_style = style(name)
        if note:
            dash = "--" if note == "training" else ":"
            line_style |= {"linestyle": dash, "markerfacecolor": "white"}
        tokens = sorted(curve)
        draws = [np.atleast_1d(np.asarray(curve[n], dtype=float)) for n in tokens]
        medians = [float(np.median(values)) for values in draws]
        ax.plot(tokens, medians, **line_style, markersize=6, label=label)
        for n, values in zip(tokens, draws, strict=True):
            if len(values) > 1:
                ax.plot([n] * len(values), values, ".", color=color(name), alpha=0.5, markersize=5)
        places = dict.fromkeys((0, int(np.argmax(medians)), len(tokens) - 1))
        points = [f"{medians[i]:.3g} at {tokens[i]:,}" for i in places]
        texts.append(f"{label} {', '.join(points)}")
    if width is not None:
        ax.axvline(width, color="#404040", linewidth=1, linestyle="-.", label=f"width {width}")
    ax.set(xscale="log", yscale="log", xlabel="calibration tokens", ylabel=ylabel, title=title)
    for axis in (ax.xaxis, ax.yaxis):
        plain_numbers(axis)
    if ylim is not None:
        clip(ax, *ylim)
    ax.legend(**_OUTSIDE)
    ends = "first, highest, last"
    return describe(ax, f"{ylabel} against calibration tokens ({ends}): {'; '.join(texts)}.")


# ---------------------------------------------------------------- choices of layers


def start_by_length(
    values: Mapping[tuple[int, int], float],
    *,
    label: str,
    title: str = "",
    best: str = "min",
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Heat map of every block: first removed layer (column), number of layers (row, upwards).

    Args:
        values: ``{(start, stop): value}``, such as by `Boundary`.
        label: the quantity.
        best: ``"min"`` or ``"max"``: the block in each row that a dot marks, with a frame around
            its layers.
        log: colours by the logarithm of the value.
    """
    ax = ax or plt.gca()
    cells = {(stop - start, start): value for (start, stop), value in values.items()}
    table = pd.Series(cells).unstack()[::-1]
    better = "lower" if best == "min" else "higher"
    sns.heatmap(
        table,
        norm=LogNorm() if log else None,
        cmap="viridis_r" if best == "min" else "viridis",
        cbar_kws={"label": f"{label}\n(light: {better}; dot: {best}imum of a row)"},
        ax=ax,
    )
    _plain_colour_bar(ax)
    texts = []
    for place, length in enumerate(table.index):
        row = table.loc[length]
        start = row.idxmin() if best == "min" else row.idxmax()
        x = table.columns.get_loc(start) + 0.5
        ax.plot(x, place + 0.5, "o", color=color("pruned"), mec="white", markersize=6)
        frame: dict[str, Any] = {"fill": False, "edgecolor": color("pruned"), "linewidth": 1.8}
        ax.add_patch(Rectangle((x - 0.5, place + 0.2), length, 0.6, **frame))
        layers = "layer" if length == 1 else "layers"
        texts.append(f"{length} {layers}: {row[start]:.3g} from layer {start}")
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
    xlabel = "first removed layer (frame: the layers of the best block)"
    ax.set(xlabel=xlabel, ylabel="layers removed", title=title)
    return describe(ax, f"{label} of every block. Best: {'; '.join(texts)}.")


def removed_layers(
    choices: Mapping[str, Iterable[int]], total: int, *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Layers that each criterion removes: one row per criterion, one cell per layer of ``total``.

    Args:
        choices: ``{name: layers}``, drawn from top to bottom.
    """
    ax = ax or plt.gca()
    texts = []
    for row, (name, layers) in enumerate(choices.items()):
        removed = set(layers)
        for layer in range(total):
            shade = color("pruned") if layer in removed else "#e8e8e8"
            ax.add_patch(Rectangle((layer - 0.45, row - 0.4), 0.9, 0.8, color=shade))
        texts.append(f"{name} {', '.join(map(str, sorted(removed)))}")
    ax.set(xlim=(-0.7, total - 0.3), xlabel="decoder layer (dark: removed)", title=title)
    ax.set_ylim(len(choices) - 0.5, -0.5)
    ax.set_yticks(range(len(choices)), list(choices))
    ax.set_xticks(range(0, total, 2))
    ax.grid(visible=False)
    return describe(ax, f"Removed of {total} layers: {'; '.join(texts)}.")


def against_score(
    score: Mapping[int, float],
    perplexity: Mapping[int, float],
    *,
    xlabel: str,
    best: str = "min",
    interval: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Perplexity of the model repaired by ghost against a criterion's score, one dot per block.

    A corner has Spearman's rank correlation with ``interval``, or with an interval for independent
    blocks (too narrow, if anything: blocks overlap).

    Args:
        score: ``{first removed layer: value}``; the dots are labelled by the layer.
        perplexity: the same.
        xlabel: the criterion and the unit of its score.
        best: ``"min"`` or ``"max"``: the score that the criterion removes first, on the left.
        interval: low and high end for the rank correlation, such as a bootstrap's.
    """
    ax = ax or plt.gca()
    starts = list(score)
    x, y = [score[start] for start in starts], [perplexity[start] for start in starts]
    ax.plot(x, y, look("ghost").marker, color=color("ghost"), markersize=7)
    ax.set(yscale="log", ylabel="perplexity with ghost\n(log scale, lower is better)")
    ax.set(xlabel=f"{xlabel}\n← removed first")
    if best == "max":
        ax.invert_xaxis()
    ax.margins(0.08)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))
    plain_numbers(ax.yaxis)
    sign = 1 if best == "min" else -1
    rho, low, high = _rank_correlation(np.multiply(sign, x), y)
    low, high = interval or (low, high)
    text = f"Spearman {rho:.2f} [{low:.2f}, {high:.2f}]"
    ax.text(0.98, 0.02, text, transform=ax.transAxes, ha="right", va="bottom", fontsize=10)
    label_points(ax, [(a, b, str(start)) for a, b, start in zip(x, y, starts, strict=True)])
    most, least = (pick(starts, key=perplexity.__getitem__) for pick in (max, min))
    first = starts[int(np.argmin(np.multiply(sign, x)))]
    text += f"; lowest perplexity {short(perplexity[least])} at start {least}"
    text += f", highest {short(perplexity[most])} at start {most}"
    text += f"; removed first: start {first}, perplexity {short(perplexity[first])}"
    return describe(ax, f"Perplexity with ghost against {xlabel}: {text}.")


def _rank_correlation(x: ArrayLike, y: ArrayLike) -> tuple[float, float, float]:
    """Spearman's correlation and its 95 % interval (Bonett and Wright, 2000); NaN for 3 points."""
    rho, count = float(stats.spearmanr(x, y).statistic), np.size(x)
    if count < 4:
        return rho, np.nan, np.nan
    half = 1.96 * np.sqrt((1 + rho**2 / 2) / (count - 3))
    centre = np.arctanh(np.clip(rho, -0.9999, 0.9999))
    return rho, float(np.tanh(centre - half)), float(np.tanh(centre + half))


def grid(
    table: pd.DataFrame,
    *,
    label: str = "perplexity",
    limits: tuple[float, float] | None = None,
    shares: bool = False,
    numbers: bool = True,
    colour_bar: bool = True,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Perplexities as a heat map with their numbers, on a logarithmic colour scale; light is good.

    Args:
        table: one row per choice of layers, one column per repair; missing cells stay white. Rows
            of equal values, such as two criteria that choose the same layers, are merged.
        label: the quantity.
        limits: ends of the colour scale, to give several maps the same one.
        shares: shares between 0 and 1, where more is better, on a linear scale.
        numbers: whether to write them; the alternative text always has them.
        colour_bar: whether to draw it.
    """
    ax = ax or plt.gca()
    rows: dict[bytes, list[Any]] = {}
    for name, row in table.iterrows():
        rows.setdefault(row.to_numpy(dtype=float).tobytes(), []).append(name)
    merged = table.loc[[names[0] for names in rows.values()]]
    labels = [" = ".join(map(str, names)) for names in rows.values()]
    merged.index = pd.Index([textwrap.fill(label, 28, break_on_hyphens=False) for label in labels])
    values = merged.to_numpy(dtype=float)
    if shares:
        values = values.round(1) + 0.0  # no "-0.0"
    written = np.vectorize(lambda v: "" if np.isnan(v) else f"{v:.1f}" if shares else short(v))
    texts = written(values)
    low, high = limits or ((0.0, 1.0) if shares else (np.nanmin(values), np.nanmax(values)))
    colours = f"{label}\n({'' if shares else 'log colours; '}light: better)"
    beyond = int(np.nanmin(values) < low) + 2 * int(np.nanmax(values) > high)
    bar = {"label": colours, "extend": ("neither", "min", "max", "both")[beyond]}
    sns.heatmap(
        merged,
        annot=texts if numbers else None,
        fmt="",
        norm=Normalize(low, high) if shares else LogNorm(low, high),
        cmap="viridis" if shares else "viridis_r",
        cbar=colour_bar,
        cbar_kws=bar if colour_bar else None,
        annot_kws={"fontsize": 9},
        ax=ax,
    )
    if colour_bar:
        _plain_colour_bar(ax)
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=30, ha="right")
    ax.set(xlabel="", ylabel="", title=title)
    lines = []
    for name, row in zip(labels, texts, strict=True):
        cells = [f"{c} {t}" for c, t in zip(merged.columns, row, strict=True) if t]
        lines.append(f"{name}: {', '.join(cells)}")
    better = "higher" if shares else "lower"
    return describe(ax, f"{label}, {better} is better. {'; '.join(lines)}.")


def _plain_colour_bar(ax: Axes) -> None:
    """Label a logarithmic colour bar without powers of ten, sparsely over a wide range."""
    bar: Any = ax.collections[0].colorbar
    if not isinstance(bar.mappable.norm, LogNorm):
        return
    low, high = bar.mappable.get_clim()

    def label(value: float, _: object) -> str:
        return "" if high > 20 * low and f"{value:e}"[0] not in "125" else f"{value:,g}"

    bar.ax.yaxis.set_major_formatter(FuncFormatter(label))
    bar.ax.yaxis.set_minor_formatter(FuncFormatter(label))
