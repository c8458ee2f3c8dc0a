"""Distances in the palette, alternative text, files, labels without overlap, marked limits."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import fresh
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from ghostlib import plotting
from ghostlib.operators.families import FAMILIES
from ghostlib.plotting import LOOKS, look

pytestmark = pytest.mark.usefixtures("fresh_figure")

EVERY = {name: look(name) for name in (*LOOKS, *FAMILIES)}


# Colour vision as matrices on linear RGB: Machado et al. (2009), severity 1; and grey.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "grey": np.tile([0.2126, 0.7152, 0.0722], (3, 1)),
}
# sRGB to XYZ, D65
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def lab(colour: str, vision: str) -> np.ndarray:
    """CIELAB of a colour as seen by ``vision``."""
    srgb = np.array(to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(VISIONS[vision] @ linear, 0, 1) / XYZ.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def ciede2000(first: np.ndarray, second: np.ndarray) -> float:
    """Difference of two colours in CIELAB (Sharma, Wu and Dalal, 2005)."""
    (L1, a1, b1), (L2, a2, b2) = first, second
    mean_chroma = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    G = 0.5 * (1 - np.sqrt(mean_chroma**7 / (mean_chroma**7 + 25.0**7)))
    a1, a2 = (1 + G) * a1, (1 + G) * a2
    C1, C2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    grey = C1 * C2 == 0
    turn = 0.0 if grey else (h2 - h1 + 180) % 360 - 180
    dL, dC, dH = L2 - L1, C2 - C1, 2 * np.sqrt(C1 * C2) * np.sin(np.radians(turn / 2))
    L, C = (L1 + L2) / 2, (C1 + C2) / 2
    hue = h1 + h2 if grey else (h1 + turn / 2) % 360
    cosine = [np.cos(np.radians(k * hue + s)) for k, s in ((1, -30), (2, 0), (3, 6), (4, -63))]
    T = 1 + np.dot([-0.17, 0.24, 0.32, -0.20], cosine)
    turned = 30 * np.exp(-(((hue - 275) / 25) ** 2))
    R = -2 * np.sqrt(C**7 / (C**7 + 25.0**7)) * np.sin(np.radians(2 * turned))
    SL = 1 + 0.015 * (L - 50) ** 2 / np.sqrt(20 + (L - 50) ** 2)
    light, chroma, hue_ = dL / SL, dC / (1 + 0.045 * C), dH / (1 + 0.015 * C * T)
    return float(np.sqrt(light**2 + chroma**2 + hue_**2 + R * chroma * hue_))


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [  # from the published test data
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
        ((50, 2.4900, -0.0010), (50, -2.4900, 0.0009), 7.1792),
        ((50, 2.4900, -0.0010), (50, -2.4900, 0.0011), 7.2195),
        ((50, 2.5000, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_measure_of_differences_is_the_published_one(first, second, difference):
    assert ciede2000(np.array(first), np.array(second)) == pytest.approx(difference, abs=1e-4)


def test_no_two_operators_look_alike():
    """At least 15 apart for every kind of vision, or with different markers; dashes besides."""
    colours = {v: {name: lab(look.color, v) for name, look in EVERY.items()} for v in VISIONS}
    for a, b in combinations(set(EVERY) - {"identity"}, 2):  # the operator of "pruned"
        closest = min(ciede2000(seen[a], seen[b]) for seen in colours.values())
        assert closest > 15 or EVERY[a].marker != EVERY[b].marker, (a, b)
        assert EVERY[a][1:] != EVERY[b][1:], (a, b)
        assert ciede2000(colours["normal"][a], colours["normal"][b]) > 10, (a, b)


def test_operators_often_drawn_together_differ_in_colour_alone():
    names = ["dense", "pruned", "linearpatch-d", "linearpatch-r", "diagonal", "symmetric"]
    names += ["replaceme", "refit", "ghost", "ghost-refit", "two-branch-relative", "auto"]
    for vision in ("normal", "protanopia", "deuteranopia"):
        colours = [lab(plotting.color(name), vision) for name in names]
        assert min(ciede2000(a, b) for a, b in combinations(colours, 2)) > 12, vision
    assert len({EVERY[name].marker for name in names}) == len(names)


def test_every_family_and_every_model_has_a_look():
    others = {"dense", "pruned", "auto", "ghost sequential", "replaceme-cosine"}
    assert set(EVERY) >= {*FAMILIES, *others, "refit", "refit-relative"}
    assert plotting.color("pruned") == plotting.color("identity")
    assert plotting.style("dense")["marker"] == "", "a line, and always the same"
    assert [name for name, look in EVERY.items() if not look.marker] == ["dense"]
    (line,) = plt.figure().gca().plot([1, 2], **plotting.style("ghost-relative"))
    assert (line.get_color(), line.get_marker(), line.get_linestyle()) == ("#629947", "p", "--")
    for find in (plotting.look, plotting.color, plotting.style):
        with pytest.raises(ValueError, match="did you mean 'ghost'"):
            find("gost")


def test_a_new_family_has_the_colour_of_its_record(monkeypatch: pytest.MonkeyPatch):
    new = replace(FAMILIES["ghost"], name="brand-new", color="#123456")
    monkeypatch.setitem(FAMILIES, "brand-new", new)
    assert plotting.look("brand-new") == plotting.Look("#123456", "o")
    assert plotting.look("brand-new sequential") == plotting.Look("#123456", "o", ":")
    assert plotting.look("symmetric sequential") == EVERY["symmetric"]._replace(dash=":")
    ax = plotting.through_depth({"brand-new": [1.0, 2.0]}, ylabel="norm")
    assert ax.get_lines()[0].get_color() == "#123456"


# ---------------------------------------------------------------- alternative text and files


def test_text_of_a_figure_names_its_titles_and_leaves_colour_bars_out():
    figure, axes = plt.subplots(1, 3)
    plotting.describe(axes[0], "Bars of a and b.").set_title("It grows.")
    axes[1].plot([0, 1, 2], [3.0, np.nan, 4.5], label="ghost")
    axes[1].plot([0, 1], [1, 1], label="_hidden")
    axes[1].set(xlabel="layer", ylabel="norm")
    figure.colorbar(axes[2].imshow([[0, 1]]))
    plotting.describe(axes[2], "A map.")
    assert plotting.alt_text(axes[0]) == "It grows. Bars of a and b."
    assert plotting.alt_text(figure) == (
        "It grows. Bars of a and b. Norm against layer: ghost from 3 to 4.5. A map."
    )
    assert plotting.alt_text(plt.figure().gca()) == ""


def saved_line(path: Path) -> tuple[Path, Path]:
    ax = plt.figure().gca()
    ax.plot([1, 2])
    return plotting.save(plotting.describe(ax, "A line that rises from 1 to 2."), path)


@pytest.mark.thorough
def test_a_figure_is_saved_twice_with_its_text_inside(tmp_path: Path):
    svg, png = saved_line(tmp_path / "line.v1")
    assert (svg.name, png.name) == ("line.v1.svg", "line.v1.png")
    assert "A line that rises from 1 to 2." in svg.read_text()
    with Image.open(png) as picture:
        assert picture.info["Description"] == "A line that rises from 1 to 2."
    before = svg.read_bytes(), png.read_bytes()
    saved_line(tmp_path / "line.v1")
    assert (svg.read_bytes(), png.read_bytes()) == before, "the same figure, the same files"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere; make it"):
        saved_line(tmp_path / "nowhere" / "line")


def test_a_figure_that_cannot_be_saved_leaves_nothing(tmp_path: Path, monkeypatch: Any):
    def full(self: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"a part")
        raise OSError("no space left")

    monkeypatch.setattr(plt.Figure, "savefig", full)
    with pytest.raises(OSError, match="no space left"):
        saved_line(tmp_path / "line")
    assert not list(tmp_path.iterdir())


CELL = """
from ghostlib import plotting
plotting.use_style(); plotting.use_style()
ax = plotting.by_start({"ghost": {0: 20.0, 1: 30.0}})
ax.set_title("Later given");
"""


@pytest.mark.thorough
def test_a_notebook_stores_the_text_with_the_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import nbformat
    from nbconvert import HTMLExporter

    monkeypatch.delenv("MPLBACKEND", raising=False)
    pictures = []

    def collect(message: dict[str, Any]) -> None:
        if "image/png" in message["content"].get("data", {}):
            pictures.append(nbformat.v4.output_from_msg(message))

    with fresh.kernel(tmp_path) as client:
        reply = client.execute_interactive(CELL, timeout=300, output_hook=collect)
    assert reply["content"]["status"] == "ok", reply
    (output,) = pictures
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL, outputs=pictures)])
    text = output.metadata["image/png"]["alt"]
    assert text.startswith("Later given. Perplexity") and "20.0 at start 0" in text
    page, _ = HTMLExporter(template_name="classic").from_notebook_node(notebook)
    assert f'alt="{text}"' in page


# ---------------------------------------------------------------- labels and limits


@pytest.mark.thorough
@pytest.mark.parametrize("crowd", [2, 24])
def test_labels_cover_neither_points_nor_each_other(crowd: int):
    rng = np.random.default_rng(crowd)
    ax = plt.figure(figsize=(5.5, 4)).gca()
    x, y = rng.normal(size=(2, crowd)) * [[1.0], [0.3]]
    x[0], y[0] = x[1], y[1] + 1e-3  # two that nearly coincide
    ax.plot(x, y, "o", markersize=7)
    plotting.label_points(ax, [(a, b, str(n)) for n, (a, b) in enumerate(zip(x, y, strict=True))])
    plt.gcf().draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert [text.get_text() for text in ax.texts] == [str(n) for n in range(crowd)]
    for first, second in combinations(boxes, 2):
        assert not first.overlaps(second)
    for box in boxes:
        assert ax.bbox.count_contains(box.corners()) == 4
        assert not box.count_contains(ax.transData.transform(np.column_stack([x, y])))
    spots = ax.transData.transform(np.column_stack([x, y]))
    for n, (text, box) in enumerate(zip(ax.texts, boxes, strict=True)):
        away = np.hypot(*(spots - (box.p0 + box.p1) / 2).T)
        clear = away[n] < 0.75 * np.delete(away, n).min()
        assert clear or text.arrow_patch.get_visible(), f"whose label {n} is cannot be seen"
    led = [text.arrow_patch.get_visible() for text in ax.texts]
    assert crowd == 2 or (led[0] and led[1] and not all(led))


def test_values_beyond_the_limits_are_marked_and_labelled():
    ax = plt.figure().gca()
    ax.plot([0, 1, 2, 3], [5.0, 2000.0, 7e6, 0.5], label="ghost", color="#008077")
    ax.plot([0, 1], [50.0, 60.0], label="pruned")
    ax.axhline(1e9, label="far away")
    plotting.clip(ax, 1, 100)
    assert ax.get_ylim() == (1, 100)
    up, down = [line for line in ax.get_lines() if line.get_label() == "_beyond"]
    assert (list(up.get_xdata()), up.get_marker()) == ([1, 2], "^")
    assert (list(down.get_xdata()), down.get_marker()) == ([3], "v")
    assert up.get_color() == down.get_color() == "#008077"
    labels = [t.get_text() for t in ax.legend().get_texts()]
    assert labels == ["ghost (up to 7.0e+06) (down to 0.500)", "pruned", "far away"]
    fine = plt.figure().gca()
    fine.plot([1, 2], label="ghost")
    plotting.clip(fine, high=3)
    assert [line.get_label() for line in fine.get_lines()] == ["ghost"]


def test_triangles_of_several_lines_at_one_place_stand_side_by_side():
    ax = plt.figure().gca()
    for name, values in {"pruned": [200.0, 300.0], "auto none": [400.0, 5.0]}.items():
        ax.plot([0, 1], values, label=name, color=plotting.color(name))
    plotting.clip(ax, 1, 100)
    plt.gcf().draw_without_rendering()
    beyond = [line for line in ax.get_lines() if line.get_label() == "_beyond"]
    spots = {}
    for line in beyond:
        for x, y in zip(*line.get_data(), strict=True):
            at = line.get_transform().transform((x, y))[0] - ax.transData.transform((x, y))[0]
            spots[line.get_color(), float(x)] = at / (plt.gcf().dpi / 72)  # points
    pruned, none = plotting.color("pruned"), plotting.color("auto none")
    assert spots == pytest.approx({(pruned, 0.0): -4.5, (none, 0.0): 4.5, (pruned, 1.0): 0.0})


def test_numbers_are_short():
    numbers = (0.00432, 0.5, 18.04, 200, 999.6, 2248, 1e6)
    assert [plotting.short(n) for n in numbers] == [
        "0.00432", "0.500", "18.0", "200", "1,000", "2,248", "1.0e+06",
    ]  # fmt: skip


def test_points_and_histograms_drawn_by_hand_are_described():
    figure, (left, right) = plt.subplots(1, 2)
    left.plot(3, 44.3, "o", label="pruned")
    left.set(xlabel="cost", ylabel="perplexity")
    right.hist([1, 1, 2], bins=2, label="push")
    right.set(xlabel="push", ylabel="tokens")
    assert plotting.alt_text(figure) == (
        "Perplexity against cost: pruned 44.3. "
        "Tokens against push: push 2 bars from 1 at 1.75 to 2 at 1.25."
    )


def test_lines_drawn_by_hand_are_described_by_ends_and_extremes():
    _, (ax, other) = plt.subplots(1, 2, sharey=True)
    ax.plot([64, 576, 16384], [0.87, 310, 0.38], label="ghost")
    ax.plot([64, 576, 16384], [0.9, 0.91, 9.9], label="rising")
    ax.plot([1, 2, 3], [0.2, -3.5, 9.25], "o", label="sets")
    ax.axhline(1, label="no repair")
    ax.axvline(576, label="width")
    ax.set(xlabel="tokens", ylabel="error\n(lower is better)")
    other.plot([1, 2], [1234, 2.5e9], label="far")
    assert plotting.alt_text(ax) == (
        "Error (lower is better) against tokens: ghost from 0.87 to 0.38, highest 310 at 576; "
        "rising from 0.9 to 9.9; sets 3 points from -3.5 to 9.25; no repair 1 throughout; "
        "width at 576."
    )
    text = "Error (lower is better) against position: far from 1,234 to 2.5e+09."
    assert plotting.alt_text(other) == text


def test_bars_drawn_by_hand_are_described():
    ax = plt.figure().subplots()
    ax.bar([0, 1], [0.25, 0.5], label="MLP")
    ax.bar([0, 1, 2], [0.5, 2.0, 1.0], hatch=["", "//", ""])
    ax.set(xlabel="layer", ylabel="norm")
    assert plotting.alt_text(ax) == (
        "Norm against layer: MLP 2 bars from 0.25 at 0 to 0.5 at 1; "
        "3 bars from 0.5 at 0 to 2 at 1, hatched 2 at 1."
    )


def test_bars_on_named_places_are_told_one_by_one_and_stacked_ones_as_their_sum():
    _, (ax, other) = plt.subplots(1, 2, sharey=True)
    for name, width, foot in (
        ("dense", 3, 0),
        ("ghost", 2, 0),
        ("dense", 350, 3),
        ("ghost", 270, 2),
    ):
        other.barh(name, width, left=foot)
    other.set(title="Prefill", xlabel="million\noperations")
    assert plotting.alt_text(other) == "Prefill. Million operations: dense 353, ghost 272."
    ax = plt.figure().subplots()
    for x, height in enumerate((1.0, 0.75)):
        ax.bar(x, height, yerr=0.1)
    ax.set(ylabel="time", xlabel="model")
    assert plotting.alt_text(ax) == "Time against model: 2 bars from 0.75 at 1 to 1 at 0."
    ax.set_xticks(range(2), ["dense", "7 layers less"])
    assert plotting.alt_text(ax) == "Time against model: dense 1, 7 layers less 0.75."
