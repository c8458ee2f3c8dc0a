"""The look of every figure: one palette, alternative text, saving, and labels that do not overlap.

An operator has one colour, one marker and one dash in every notebook, see `style`. Operators whose
colours are hard to tell apart, in grey or for the colour-blind, have different markers; the dense
model is always the same line without markers.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython.core.getipython import get_ipython
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.container import BarContainer
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox, ScaledTranslation

from ghostlib.common import Registry, atomic_file
from ghostlib.operators.families import FAMILIES


class Look(NamedTuple):
    """Colour, marker and dash of a model or operator.

    Attributes:
        color: of lines, bars and markers.
        marker: of points; empty for no marker.
        dash: of lines.
        hollow: whether markers on lines are open.
    """

    color: str
    marker: str
    dash: Any = "-"
    hollow: bool = False


LOOKS: Registry[Look] = Registry("operator or model with a look")
"""Looks of everything but families; a family's look is on its record."""
LOOKS |= {
    "dense": Look("#242424", ""),
    "pruned": Look("#c11608", "X"),
    "replaceme-cosine": Look("#876e4f", "D", "-."),
    "refit-relative": Look("#955262", "v", "--"),
    "ghost sequential": Look("#50b4a3", "o", ":"),
    "ghost skip-leading": Look("#ced583", "8", ":"),
    "auto": Look("#e81b7f", "<", (0, (6, 1, 1, 1, 1, 1))),
    "auto matrix": Look("#ff65e6", "H", (0, (6, 1, 1, 1)), hollow=True),
    "auto none": Look("#720c31", "D", (0, (2, 1, 1, 1))),
}
NEUTRAL = Look("#808080", "o")  # for names without a look


def look(name: str) -> Look:
    """Look of a model or operator.

    A family's is on its record; with the suffix ``" sequential"`` its line is dotted.

    Raises:
        ValueError: a name without a look; the message lists the names that have one.
    """
    looks: Registry[Look] = Registry(LOOKS.kind)
    looks |= {f.name: Look(f.color, f.marker, f.dash) for f in FAMILIES.values()} | LOOKS
    family = name.removesuffix(" sequential")
    if name not in looks and family in FAMILIES:
        return looks[family]._replace(dash=":")
    return looks[name]


def color(name: str) -> str:
    """Colour of an operator, ``"dense"`` or ``"pruned"``; raises as `look` does."""
    return look(name).color


def style(name: str) -> dict[str, Any]:
    """Keyword arguments of ``ax.plot`` for an operator's line; raises as `look` does.

    >>> style("ghost-relative")
    {'color': '#629947', 'marker': 'p', 'linestyle': '--', 'linewidth': 1.5}
    """
    shade, marker, dash, hollow = look(name)
    width = 2.5 if name == "dense" else 1.5
    options = {"color": shade, "marker": marker, "linestyle": dash, "linewidth": width}
    return options | {"markerfacecolor": "white"} if hollow else options


def use_style() -> None:
    """Set the look of all figures; in a notebook, store their alternative text with them."""
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
    shell: Any = get_ipython()
    if shell is None:
        return
    plt.switch_backend(plt.get_backend())  # installs its formatter now, not after ours
    formatter = shell.display_formatter.formatters["image/png"]
    try:
        plain = formatter.lookup_by_type(Figure)
    except KeyError:  # figures are not shown in this shell
        return

    def with_alt_text(figure: Any) -> Any:
        output = plain(figure)
        data, metadata = output if isinstance(output, tuple) else (output, {})
        return data, metadata | {"alt": alt_text(figure)}

    formatter.for_type(Figure, with_alt_text)


# ---------------------------------------------------------------- numbers


def short(value: float) -> str:
    """Three significant digits, trailing zeros kept; an exponent from a million on.

    >>> [short(value) for value in (0.5, 12, 33.04, 999.6, 2248, 2.34e9)]
    ['0.500', '12.0', '33.0', '1,000', '2,248', '2.3e+09']
    """
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def plain_numbers(axis: Axis) -> None:
    """Label only the major ticks of an axis, without powers of ten."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------- alternative text

_DESCRIPTIONS: WeakKeyDictionary[Axes, str] = WeakKeyDictionary()


def describe(ax: Axes, text: str) -> Axes:
    """Attach an alternative text to ``ax``, one line made of its data; returns ``ax``."""
    _DESCRIPTIONS[ax] = text.replace("\n", " ")
    return ax


def alt_text(drawn: Axes | FigureBase) -> str:
    """Alternative text of a figure or of one of its axes: titles, and the numbers in words.

    Axes drawn by hand are described by their labels, the ends and the extremes of their lines, the
    range of their points, and their bars.
    """
    if isinstance(drawn, FigureBase):
        figure: Any = drawn
        panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
        return " ".join(filter(None, map(alt_text, panels)))
    title = drawn.get_title(loc="left") or drawn.get_title(loc="center")
    text = _DESCRIPTIONS.get(drawn) or _description(drawn)
    return f"{title.rstrip('.')}. {text}" if title else text


def _description(ax: Axes) -> str:
    """Alternative text of axes drawn by hand."""
    if not ax.has_data():
        return ""
    labelled = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    parts = [f"{line.get_label()} {values}" for line in labelled if (values := _values(ax, line))]
    along, bars = _bars(ax)
    parts += bars
    columns = [ax, *ax.get_shared_x_axes().get_siblings(ax)]
    rows = [ax, *ax.get_shared_y_axes().get_siblings(ax)]
    xlabel = next((label for panel in columns if (label := panel.get_xlabel())), "position")
    ylabel = next((label for panel in rows if (label := panel.get_ylabel())), "values")
    # horizontal bars are named by their rows
    axes = xlabel if along == "y" else f"{ylabel} against {xlabel}"
    axes = axes.replace("\n", " ")
    return f"{axes[0].upper()}{axes[1:]}{': ' if parts else ''}{'; '.join(parts)}."


def _bars(ax: Axes) -> tuple[str, list[str]]:
    """The axis along which the bars stand, and a description of each group of bars.

    Of bars at named ticks every value is given, of others the lowest and the highest; bars without
    a legend are one group, stacked bars are summed.
    """
    along = "x"
    groups: dict[str, dict[float, float]] = {}
    hatched: dict[str, set[float]] = {}
    for bars in ax.containers:
        if not isinstance(bars, BarContainer):
            continue
        along = "y" if bars.orientation == "horizontal" else "x"
        names = (str(part.get_label()) for part in (bars, *bars[:1]))  # a histogram labels a bar
        name = next((label for label in names if not label.startswith("_")), "")
        group = groups.setdefault(name, {})
        for bar in bars:
            box = bar.get_bbox()
            (foot, end), sides = (box.intervalx, box.intervaly)[:: 1 if along == "y" else -1]
            at, value = round(float(np.mean(sides)), 6), float(end - foot if name else end)
            if np.isfinite(value):
                group[at] = max(value, group.get(at, value), key=abs)
                if bar.get_hatch():
                    hatched.setdefault(name, set()).add(at)
    axis = ax.xaxis if along == "x" else ax.yaxis
    ticks = [float(at) for at in axis.get_majorticklocs()]
    labels = zip(ticks, axis.get_major_formatter().format_ticks(ticks), strict=True)
    # a name has a letter outside of formulas
    named = {round(at, 6): s for at, s in labels if re.search(r"[^\W\d_]", s.partition("$")[0])}

    def values_at(group: dict[float, float], places: Iterable[float]) -> list[str]:
        return [f"{_number(group[at])} at {_number(at)}" for at in places]

    texts = []
    for name, group in groups.items():
        if not group:
            continue
        if set(group) <= set(named):
            text = ", ".join(f"{named[at]} {_number(value)}" for at, value in group.items())
        elif len(group) == 1:
            text = values_at(group, group)[0]
        else:
            ends = sorted(group, key=group.__getitem__)
            text = f"{len(group)} bars from {' to '.join(values_at(group, (ends[0], ends[-1])))}"
            if 0 < len(marks := hatched.get(name, set())) < len(group):
                text = f"{text}, hatched {', '.join(values_at(group, sorted(marks)))}"
        texts.append(f"{name} {text}".strip())
    return along, texts


def _values(ax: Axes, line: Line2D) -> str:
    """Ends of a line, and its extremes if they lie between; the range of unconnected points."""
    x, y = (np.asarray(line.get_data(orig=False)[i], dtype=float) for i in (0, 1))
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(y):
        return ""
    if line.get_transform() != ax.transData and np.ptp(x) == 0:  # as by axvline
        return f"at {_number(x[0])}"
    low, high = int(y.argmin()), int(y.argmax())
    if len(y) == 1 or low == high:
        return _number(y[0]) + " throughout" * (len(y) > 1)
    if line.get_linestyle() == "None":
        return f"{len(y)} points from {_number(y[low])} to {_number(y[high])}"
    between = []
    for word, place in (("lowest", low), ("highest", high)):
        if min(abs(y[place] - y[[0, -1]])) > 0.05 * np.ptp(y):
            between.append(f", {word} {_number(y[place])} at {_number(x[place])}")
    return f"from {_number(y[0])} to {_number(y[-1])}{''.join(between)}"


def _number(value: float) -> str:
    """Three significant digits, without an exponent below a million.

    >>> [_number(value) for value in (-0.0312, 9.5, 1984, 2.5e9)]
    ['-0.0312', '9.5', '1,984', '2.5e+09']
    """
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def save(drawn: Axes | FigureBase, name: str | Path) -> tuple[Path, Path]:
    """Write a figure as ``name.svg`` and ``name.png``, each with its alternative text inside.

    Args:
        drawn: the figure, or any of its axes.
        name: path without a suffix; its folder must exist.

    Returns:
        The two paths.

    Raises:
        FileNotFoundError: no such folder.
    """
    figure: Any = drawn if isinstance(drawn, FigureBase) else drawn.get_figure(root=True)
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}; make it, or name another")
    svg, png = (path.with_name(f"{path.name}.{suffix}") for suffix in ("svg", "png"))
    for file, volatile in ((svg, "Date"), (png, "Software")):
        metadata = {"Description": alt_text(figure), volatile: None}
        # the salt: the same file for the same figure
        with atomic_file(file) as partial, plt.rc_context({"svg.hashsalt": path.name}):
            figure.savefig(partial, format=file.suffix[1:], dpi=200, metadata=metadata)
    return svg, png


# ---------------------------------------------------------------- labels and limits

_MARKER = 7  # its size, in points
_TRIANGLE = 9


def label_points(
    ax: Axes, points: Iterable[tuple[float, float, str]], *, beside: Iterable[Sequence[float]] = ()
) -> None:
    """Write a label next to each point, at the nearest place where it covers nothing.

    A label is clearly nearer to its own point than to any other, or a line leads to it.

    Args:
        points: ``(x, y, label)`` in the units of the axes, whose limits must be set.
        beside: ``(x, y)`` of unlabelled points to keep uncovered, such as along a curve.
    """
    points = list(points)
    figure: Any = ax.get_figure(root=True)
    figure.draw_without_rendering()  # the layout decides how far apart points are
    renderer, pixel = figure.canvas.get_renderer(), figure.dpi / 72
    spots = ax.transData.transform([(x, y) for x, y, _ in points])
    boxes = [text.get_window_extent(renderer) for text in ax.texts]
    half = _MARKER * pixel / 2
    curve = ax.transData.transform(np.reshape(list(beside), (-1, 2)))
    boxes += [Bbox.from_extents(*(at - half), *(at + half)) for at in (*spots, *curve)]
    angles = np.radians(np.arange(45, 405, 15))
    for number, (x, y, text) in enumerate(points):
        spot, others = spots[number], np.delete(spots, number, axis=0)
        line = {"arrowstyle": "-", "color": "#606060", "linewidth": 0.8, "shrinkB": _MARKER / 2}
        centred: dict[str, Any] = {"ha": "center", "va": "center", "textcoords": "offset points"}
        label: Any = ax.annotate(text, (x, y), (0, 0), **centred, fontsize=10, arrowprops=line)
        for radius, angle in product((11, 14, 18, 24, 32, 42, 56, 75), angles):
            offset = radius * np.array([np.cos(angle), np.sin(angle)])
            has_line = radius > 18
            path = spot + np.outer(np.linspace(0.4 if has_line else 1, 1, 9), offset * pixel)
            nearest = np.linalg.norm(path[:, None] - others, axis=2).min(initial=np.inf)
            if nearest < (1.5 * half if has_line else 1.5 * radius * pixel):
                continue
            label.set_position(tuple(offset))
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without the line
            inside = ax.bbox.count_contains(box.corners()) == 4
            crossed = any(other.count_contains(path) for other in boxes)
            if inside and not crossed and not box.count_overlaps(boxes):
                break
        boxes.append(box)
        if has_line:
            boxes += [Bbox.from_extents(*(at - 1), *(at + 1)) for at in path]
        else:
            label.arrow_patch.set_visible(False)


def clip(ax: Axes, low: float | None = None, high: float | None = None) -> None:
    """Limit the vertical axis, and mark every value of a labelled line beyond the limits.

    A triangle stands at the edge, next to the triangles of other lines at the same place, and the
    line's label gives the farthest value.
    """
    ax.set_ylim(bottom=low, top=high)
    marks = []  # (colour, marker, x) of a line at one edge
    for line in list(ax.get_lines()):
        if str(line.get_label()).startswith("_") or line.get_transform() != ax.transData:
            continue
        x, y = (np.asarray(values, dtype=float) for values in line.get_data())
        above = y > (np.inf if high is None else high)
        below = y < (-np.inf if low is None else low)
        for beyond, marker, words, pick in (
            (above, "^", "up to", np.max),
            (below, "v", "down to", np.min),
        ):
            if beyond.any():
                line.set_label(f"{line.get_label()} ({words} {short(pick(y[beyond]))})")
                marks.append((line.get_color(), marker, x[beyond]))
    figure: Any = ax.get_figure(root=True)
    edge = ax.get_xaxis_transform()  # x of the data, a fraction of the height
    totals = Counter((marker, at) for _, marker, places in marks for at in places)
    counts: Counter[tuple[str, float]] = Counter()
    for shade, marker, places in marks:
        shifts: dict[float, list[float]] = {}  # points: x
        for at in places:
            position = counts[marker, at] - (totals[marker, at] - 1) / 2
            shifts.setdefault(_TRIANGLE * position, []).append(at)
        counts.update((marker, at) for at in places)
        for points, xs in shifts.items():
            options: dict[str, Any] = {"color": shade, "markersize": _TRIANGLE, "label": "_beyond"}
            shifted = edge + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)
            heights = np.full(len(xs), 0.975 if marker == "^" else 0.025)
            ax.plot(xs, heights, marker, transform=shifted, **options)
