"""The look of every figure: one palette, alternative text, saving, and labels that stay apart.

An operator has one colour, one marker and one dash in every notebook: take them from `style`. Two
whose colours are hard to tell apart, in grey or for the colour-blind, have different markers; the
dense model is always the same line without markers.
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

from ghostlib.common import Registry, replacing
from ghostlib.operators.families import FAMILIES


class Look(NamedTuple):
    """How a model or operator is drawn.

    Attributes:
        color: of lines, bars and markers.
        marker: of points; empty for none.
        dash: of lines.
        hollow: whether markers on lines are open.
    """

    color: str
    marker: str
    dash: Any = "-"
    hollow: bool = False


LOOKS: Registry[Look] = Registry("operator or model with a look")
"""Of what is no family; a family's look is on its record."""
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
NEUTRAL = Look("#808080", "o")  # what has no look of its own


def look(name: str) -> Look:
    """How a model or operator is drawn.

    A family's is on its record; with the suffix ``" sequential"`` its line is dotted.

    Raises:
        ValueError: a name without a look; the message lists those that have one.
    """
    known: Registry[Look] = Registry(LOOKS.kind)
    known |= {f.name: Look(f.color, f.marker, f.dash) for f in FAMILIES.values()} | LOOKS
    family = name.removesuffix(" sequential")
    if name not in known and family in FAMILIES:
        return known[family]._replace(dash=":")
    return known[name]


def color(name: str) -> str:
    """The colour of an operator, or of ``"dense"`` and ``"pruned"``; errors as of `look`."""
    return look(name).color


def style(name: str) -> dict[str, Any]:
    """Colour, marker and dash of an operator's line, for ``ax.plot``; errors as of `look`.

    >>> style("ghost-relative")
    {'color': '#629947', 'marker': 'p', 'linestyle': '--', 'linewidth': 1.5}
    """
    shade, marker, dash, hollow = look(name)
    width = 2.5 if name == "dense" else 1.5
    drawn = {"color": shade, "marker": marker, "linestyle": dash, "linewidth": width}
    return drawn | {"markerfacecolor": "white"} if hollow else drawn


def use_style() -> None:
    """Set the look of all figures, and store their alternative text with them in a notebook."""
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
    plt.switch_backend(plt.get_backend())  # it installs its formatter now, not after ours
    formatter = shell.display_formatter.formatters["image/png"]
    try:
        plain = formatter.lookup_by_type(Figure)
    except KeyError:  # figures are not shown in this shell
        return

    def described(figure: Any) -> Any:
        made = plain(figure)
        data, metadata = made if isinstance(made, tuple) else (made, {})
        return data, metadata | {"alt": alt_text(figure)}

    formatter.for_type(Figure, described)


# ---------------------------------------------------------------- numbers


def short(value: float) -> str:
    """Three significant digits, trailing zeros kept; from a million on with an exponent.

    >>> [short(value) for value in (0.5, 12, 33.04, 999.6, 2248, 2.34e9)]
    ['0.500', '12.0', '33.0', '1,000', '2,248', '2.3e+09']
    """
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def plain_numbers(axis: Axis) -> None:
    """Label an axis without powers of ten, at its major ticks only."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------- alternative text

_DESCRIPTIONS: WeakKeyDictionary[Axes, str] = WeakKeyDictionary()


def describe(ax: Axes, text: str) -> Axes:
    """Attach to ``ax`` what it shows, in one line made of its data; returns ``ax``."""
    _DESCRIPTIONS[ax] = text.replace("\n", " ")
    return ax


def alt_text(drawn: Axes | FigureBase) -> str:
    """What a figure, or one of its axes, shows: titles, and the numbers in words.

    Axes drawn by hand are described by their labels, the ends and the extremes of their lines, the
    range of their points, and their bars.
    """
    if isinstance(drawn, FigureBase):
        figure: Any = drawn
        shown = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
        return " ".join(filter(None, map(alt_text, shown)))
    title = drawn.get_title(loc="left") or drawn.get_title(loc="center")
    text = _DESCRIPTIONS.get(drawn) or _by_hand(drawn)
    return f"{title.rstrip('.')}. {text}" if title else text


def _by_hand(ax: Axes) -> str:
    if not ax.has_data():
        return ""
    labelled = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    lines = [f"{line.get_label()} {reach}" for line in labelled if (reach := _reach(ax, line))]
    along, bars = _bars(ax)
    across = [ax, *ax.get_shared_x_axes().get_siblings(ax)]
    upward = [ax, *ax.get_shared_y_axes().get_siblings(ax)]
    labels = {
        "x": next((label for one in across if (label := one.get_xlabel())), "position"),
        "y": next((label for one in upward if (label := one.get_ylabel())), "values"),
    }
    measured, place = labels["x" if along == "y" else "y"], labels[along]
    against = f" against {place}" if along == "x" else ""  # bars that lie are named by their rows
    axes = f"{measured}{against}".replace("\n", " ")
    lines += bars
    return f"{axes[0].upper()}{axes[1:]}{': ' if lines else ''}{'; '.join(lines)}."


def _bars(ax: Axes) -> tuple[str, list[str]]:
    """The axis that bars stand side by side on, and what they are, in words.

    Bars on named places are told one by one, of others the shortest and the longest; those without
    a legend together, stacked ones as their sum.
    """
    along = "x"
    groups: dict[str, dict[float, float]] = {}
    hatched: dict[str, set[float]] = {}
    for bars in ax.containers:
        if not isinstance(bars, BarContainer):
            continue
        along = "y" if bars.orientation == "horizontal" else "x"
        names = (str(part.get_label()) for part in (bars, *bars[:1]))  # a histogram's is a bar's
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
    places = [float(at) for at in axis.get_majorticklocs()]
    ticks = zip(places, axis.get_major_formatter().format_ticks(places), strict=True)
    named = {round(at, 6): label for at, label in ticks if _is_name(label)}
    texts = []
    for name, group in groups.items():
        if not group:
            continue
        if set(group) <= set(named):
            told = ", ".join(f"{named[at]} {_number(value)}" for at, value in group.items())
        else:
            ends = sorted(group, key=group.__getitem__)
            ends = ends[:1] if len(ends) == 1 else [ends[0], ends[-1]]
            told = " to ".join(f"{_number(group[at])} at {_number(at)}" for at in ends)
            told = f"{len(group)} bars from {told}" if len(group) > 1 else told
            if 0 < len(marks := hatched.get(name, set())) < len(group):
                marked = (f"{_number(group[at])} at {_number(at)}" for at in sorted(marks))
                told = f"{told}, hatched {', '.join(marked)}"
        texts.append(f"{name} {told}".strip())
    return along, texts


def _is_name(label: str) -> bool:
    """Whether a tick label is no number."""
    return re.search(r"[^\W\d_]", label.partition("$")[0]) is not None


def _reach(ax: Axes, line: Line2D) -> str:
    """Where a line goes: its ends, and its extremes if they lie between; how far points spread."""
    x, y = (np.asarray(line.get_data(orig=False)[i], dtype=float) for i in (0, 1))
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(y):
        return ""
    if line.get_transform() != ax.transData and np.ptp(x) == 0:  # as of axvline
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
    """Three digits, without an exponent up to a million.

    >>> [_number(value) for value in (-0.0312, 9.5, 1984, 2.5e9)]
    ['-0.0312', '9.5', '1,984', '2.5e+09']
    """
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def save(drawn: Axes | FigureBase, name: str | Path) -> tuple[Path, Path]:
    """Write a figure as ``name.svg`` and ``name.png``, each with its alternative text inside.

    Args:
        drawn: the figure, or any of its axes.
        name: path without an ending; its folder must exist.

    Returns:
        The two paths.

    Raises:
        FileNotFoundError: no such folder.
    """
    figure: Any = drawn if isinstance(drawn, FigureBase) else drawn.get_figure(root=True)
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}; make it, or name another")
    written = []
    for ending, dated in (("svg", "Date"), ("png", "Software")):
        target = path.with_name(f"{path.name}.{ending}")
        metadata = {"Description": alt_text(figure), dated: None}
        # the salt: the same file for the same figure
        with replacing(target) as partial, plt.rc_context({"svg.hashsalt": path.name}):
            figure.savefig(partial, format=ending, dpi=200, metadata=metadata)
        written.append(target)
    return written[0], written[1]


# ---------------------------------------------------------------- labels and limits

_MARKER = 7  # its size, in points
_TRIANGLE = 9


def label_points(
    ax: Axes, points: Iterable[tuple[float, float, str]], *, beside: Iterable[Sequence[float]] = ()
) -> None:
    """Write a label beside each point, at the nearest place where it covers nothing.

    A label is clearly nearer to its own point than to any other, or a line leads to it.

    Args:
        points: ``(x, y, label)`` in the units of the axes, whose limits must be set.
        beside: ``(x, y)`` of what has no label and is not to be covered, such as along a curve.
    """
    points = list(points)
    figure: Any = ax.get_figure(root=True)
    figure.draw_without_rendering()  # the layout decides how far apart points are
    renderer, pixel = figure.canvas.get_renderer(), figure.dpi / 72
    spots = ax.transData.transform([(x, y) for x, y, _ in points])
    taken = [text.get_window_extent(renderer) for text in ax.texts]
    half = _MARKER * pixel / 2
    curve = ax.transData.transform(np.reshape(list(beside), (-1, 2)))
    taken += [Bbox.from_extents(*(at - half), *(at + half)) for at in (*spots, *curve)]
    angles = np.radians(np.arange(45, 405, 15))
    for number, (x, y, text) in enumerate(points):
        spot, others = spots[number], np.delete(spots, number, axis=0)
        line = {"arrowstyle": "-", "color": "#606060", "linewidth": 0.8, "shrinkB": _MARKER / 2}
        centred: dict[str, Any] = {"ha": "center", "va": "center", "textcoords": "offset points"}
        label: Any = ax.annotate(text, (x, y), (0, 0), **centred, fontsize=10, arrowprops=line)
        for radius, angle in product((11, 14, 18, 24, 32, 42, 56, 75), angles):
            offset = radius * np.array([np.cos(angle), np.sin(angle)])
            led = radius > 18
            way = spot + np.outer(np.linspace(0.4 if led else 1, 1, 9), offset * pixel)
            nearest = np.linalg.norm(way[:, None] - others, axis=2).min(initial=np.inf)
            if nearest < (1.5 * half if led else 1.5 * radius * pixel):
                continue
            label.set_position(tuple(offset))
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without the line
            inside = ax.bbox.count_contains(box.corners()) == 4
            crossed = any(other.count_contains(way) for other in taken)
            if inside and not crossed and not box.count_overlaps(taken):
                break
        taken.append(box)
        if led:
            taken += [Bbox.from_extents(*(at - 1), *(at + 1)) for at in way]
        else:
            label.arrow_patch.set_visible(False)


def clip(ax: Axes, low: float | None = None, high: float | None = None) -> None:
    """Limit the vertical axis, and mark every value of a labelled line that lies beyond.

    A triangle stands at the edge, beside those of other lines that leave there, and the line's
    label says how far it goes.
    """
    ax.set_ylim(bottom=low, top=high)
    marks = []  # of a line at one edge
    for line in list(ax.get_lines()):
        if str(line.get_label()).startswith("_") or line.get_transform() != ax.transData:
            continue
        x, y = (np.asarray(values, dtype=float) for values in line.get_data())
        above = y > (np.inf if high is None else high)
        below = y < (-np.inf if low is None else low)
        for out, marker in ((above, "^"), (below, "v")):
            if out.any():
                farthest = y[out].max() if marker == "^" else y[out].min()
                way = "up to" if marker == "^" else "down to"
                line.set_label(f"{line.get_label()} ({way} {short(farthest)})")
                marks.append((line.get_color(), marker, x[out]))
    figure: Any = ax.get_figure(root=True)
    at_edge = ax.get_xaxis_transform()  # x of the data, a fraction of the height
    beside = Counter((marker, at) for _, marker, out in marks for at in out)
    drawn: Counter[tuple[str, float]] = Counter()
    for shade, marker, out in marks:
        shifts: dict[float, list[float]] = {}  # points: x
        for at in out:
            place = drawn[marker, at] - (beside[marker, at] - 1) / 2
            shifts.setdefault(_TRIANGLE * place, []).append(at)
        drawn.update((marker, at) for at in out)
        for points, where in shifts.items():
            options: dict[str, Any] = {"color": shade, "markersize": _TRIANGLE, "label": "_beyond"}
            aside = at_edge + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)
            heights = np.full(len(where), 0.975 if marker == "^" else 0.025)
            ax.plot(where, heights, marker, transform=aside, **options)
