"""Figures of results: the data on their axes and their alternative texts."""

from collections.abc import Iterable
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from scipy import stats

from ghostlib import plotting
from ghostlib.models.boundaries import contiguous
from ghostlib.plotting import alt_text, color, look

pytestmark = pytest.mark.usefixtures("fresh_figure")

TABLE = {
    "dense": {"wiki": 12.0, "pydoc": 11.0},
    "pruned": {"wiki": 33.0, "pydoc": 35.0},
    "linearpatch-d": {"wiki": 30.0, "pydoc": 34.0},
    "ghost": {"wiki": 18.0, "pydoc": 20.0},
}


def title(ax: Axes) -> str:
    return ax.get_title(loc="left")


def labels(texts: Iterable[Text]) -> list[str]:
    return [text.get_text() for text in texts]


def apart(*axes: Axes) -> bool:
    """Whether no two texts on these axes overlap, tick labels and titles included."""
    plt.gcf().draw_without_rendering()
    boxes = []
    for ax in axes:
        words = [*ax.texts, ax.xaxis.label, ax.yaxis.label, ax.set_title(title(ax), loc="left")]
        for axis, limits in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)  # none if shared
            words += [label for at, label in ticks if limits[0] <= at <= limits[1]]
        legend = ax.get_legend()
        words += legend.get_texts() if legend else []
        for text in words:
            if text.get_text().strip() and text.get_visible() and not text.get_rotation() % 90:
                boxes.append(Text.get_window_extent(text))
    return not any(a.overlaps(b) for a, b in combinations(boxes, 2))


# ---------------------------------------------------------------- perplexities and accuracies


def test_perplexity_bars_rise_from_the_dense_model():
    ax = plotting.perplexity_bars(TABLE)
    bars = {
        (round(b.get_y(), 3), round(b.get_y() + b.get_height(), 3), b.get_facecolor())
        for b in ax.patches
    }
    assert bars == {
        (TABLE["dense"][corpus], TABLE[name][corpus], to_rgba(color(name)))
        for name in ("pruned", "linearpatch-d", "ghost")
        for corpus in ("wiki", "pydoc")
    }
    assert ax.get_yscale() == "log" and "lower is better" in ax.get_ylabel()
    assert labels(ax.get_xticklabels()) == ["wiki", "pydoc"]
    assert labels(ax.get_legend().get_texts()) == ["pruned", "linearpatch-d", "ghost"]
    assert {"33.0", "18.0", "dense 12.0", "dense 11.0"} <= set(labels(ax.texts))
    markers = [line.get_marker() for line in ax.get_lines()]
    assert markers == [look(n).marker for n in ("pruned", "linearpatch-d", "ghost")] * 2
    assert "wiki: dense 12.0, pruned 33.0, linearpatch-d 30.0, ghost 18.0; pydoc" in alt_text(ax)
    assert apart(ax)


def test_perplexity_bars_of_the_dense_model_alone_are_its_lines():
    ax = plotting.perplexity_bars({"dense": {"wiki": 20.0}})
    assert "dense 20.0" in alt_text(ax) and not ax.patches


def test_perplexity_bars_with_intervals_names_and_a_note():
    intervals = {"ghost": {"wiki": (16.0, 21.0)}, "pruned": {"wiki": (28.0, 60.0)}}
    ax = plotting.perplexity_bars(
        TABLE,
        intervals=intervals,
        names={"wiki": "Wikipedia", "linearpatch-d": "LinearPatch"},
        note="SmolLM2-135M, 2,048 tokens",
    )
    whiskers = [c.get_segments()[0][:, 1].tolist() for c in ax.collections]
    assert [16.0, 21.0] in whiskers
    assert ax.get_ylim()[1] > 60 * 1.2, "room for the number above the highest whisker"
    assert next(t for t in ax.texts if t.get_text() == "18.0").xy[1] == 21.0, "above the whisker"
    assert labels(ax.get_xticklabels()) == ["Wikipedia", "pydoc"]
    assert labels(ax.get_legend().get_texts()) == ["pruned", "LinearPatch", "ghost"]
    assert ax.get_xlabel() == "SmolLM2-135M, 2,048 tokens"
    assert "LinearPatch 30.0" in alt_text(ax) and "2,048 tokens" in alt_text(ax)
    assert apart(ax)


def test_published_and_measured_keep_places_colours_and_scale():
    published = {"pruned": 42.6, "linearpatch-d": 50.5, "ghost": 60.0}
    left, right = plotting.published_and_measured(
        published,
        {"ghost": 50.0, "dense": 55.0},
        errors={"ghost": 4.0},
        labels=("Llama-3.1-8B", "SmolLM2-135M"),
        ylabel="accuracy, % (higher is better)",
        chance=25.0,
    )
    bars = [
        (b.get_x() + b.get_width() / 2, b.get_height(), b.get_facecolor()) for b in left.patches
    ]
    assert bars == [(1, 42.6, to_rgba(color("pruned"))), (2, 50.5, to_rgba(color("linearpatch-d"))),
                    (3, 60.0, to_rgba(color("ghost")))]  # fmt: skip
    assert [b.get_x() + b.get_width() / 2 for b in right.patches] == [3, 0]
    order = ["dense", "pruned", "linearpatch-d", "ghost"]
    assert labels(left.get_xticklabels()) == labels(right.get_xticklabels()) == order
    assert left.get_ylim() == right.get_ylim()
    (low, high) = right.collections[0].get_segments()[0][:, 1]
    assert (low, high) == (46.0, 54.0) and not left.collections
    above = next(text for text in right.texts if text.get_text() == "50.0")
    assert above.xy[1] == 54.0, "the number stands above the whisker"
    assert "95 % interval" in right.get_ylabel() and "95 %" not in left.get_ylabel()
    assert right.get_lines()[-1].get_ydata()[0] == 25.0 and "chance\n25.0" in labels(right.texts)
    assert (title(left), title(right)) == ("Llama-3.1-8B", "SmolLM2-135M")
    assert "dense 55.0, ghost 50.0" in alt_text(right)
    axes = plt.figure().subplots(1, 2)
    drawn = plotting.published_and_measured(published, {}, ylabel="y", log=True, axes=axes)
    assert drawn == tuple(axes) and axes[0].get_yscale() == "log"
    assert not axes[0].patches, "points: a bar has no foot on a logarithmic axis"
    assert [line.get_ydata()[0] for line in axes[0].lines] == [42.6, 50.5, 60.0]
    assert labels(axes[1].texts) == [] and "95 %" not in axes[1].get_ylabel()


def test_a_line_for_each_repair_along_the_starts():
    curves = {
        "dense": {0: 12.0, 1: 12.0},
        "pruned": {1: 90.0, 0: 300.0},
        "ghost": {0: 20.0, 1: 30.0},
    }
    ax = plotting.by_start(curves, most=100, title="T")
    dense, pruned, ghost, beyond = ax.lines
    assert (list(pruned.get_xdata()), list(pruned.get_ydata())) == ([0, 1], [300.0, 90.0])
    for name, line in (("dense", dense), ("ghost", ghost)):
        style = plotting.style(name)
        assert to_hex(line.get_color()) == style["color"]
        assert line.get_marker() in (style["marker"], "None") and line.get_linestyle() == "-"
    assert list(beyond.get_xdata()) == [0] and to_hex(beyond.get_color()) == color("pruned")
    assert ax.get_yscale() == "log" and ax.get_ylim() == (pytest.approx(0.8 * 12), 100)
    assert labels(ax.get_legend().get_texts()) == ["dense", "pruned (up to 300)", "ghost"]
    assert "pruned from 90.0 at start 1 to 300 at start 0" in alt_text(ax)
    free = plotting.by_start({"ghost": {0: 20.0, 1: 30.0}}, ax=plt.figure().gca())
    assert free.get_ylim()[1] > 30 and len(free.lines) == 1
    assert apart(free)


def test_ratios_have_a_panel_a_corpus_every_seed_and_their_geometric_mean():
    table = {"x, n(x)": {"wiki": [0.5, 2.0], "c4": [4.0]}, "other": {"wiki": [1.0, 1.0]}}
    axes = plotting.ratios(table, names={"x, n(x)": "two-branch"}, title="layers 9–15")
    wiki, c4 = axes
    assert [title(ax) for ax in axes] == ["wiki", "c4"]
    assert labels(wiki.texts) == ["1.00", "1.00"] and labels(c4.texts) == ["4.00"]
    mean, seeds, *_ = wiki.lines
    assert mean.get_xdata()[0] == pytest.approx(1.0) and list(seeds.get_xdata()) == [0.5, 2.0]
    assert {to_hex(line.get_color()) for line in (mean, seeds)} == {color("two-branch")}
    assert seeds.get_marker() == look("two-branch").marker
    assert to_hex(wiki.lines[2].get_color()) == "#808080", "a label without an operator is grey"
    assert to_hex(wiki.lines[-1].get_color()) == color("ghost")
    assert list(wiki.lines[-1].get_xdata()) == [1, 1]
    assert labels(wiki.get_yticklabels()) == ["x, n(x)", "other"]
    assert wiki.get_xscale() == c4.get_xscale() == "log" and wiki.yaxis_inverted()
    assert wiki.get_xlim() == c4.get_xlim()
    assert "log scale, lower is better" in plt.gcf().get_supxlabel()
    assert plt.gcf().get_suptitle() == "layers 9–15"
    assert "x, n(x) 4.00" in alt_text(c4) and "other" not in alt_text(c4)
    assert apart(wiki, c4)
    (near,) = plotting.ratios({"ghost": {"wiki": [0.9, 1.1]}}, axes=[plt.figure().gca()])
    assert near.get_xscale() == "linear"
    plt.figure()
    (tiny,) = plotting.ratios({"ghost": {"wiki": [0.00432]}})
    assert labels(tiny.texts) == ["0.0043"]


# ---------------------------------------------------------------- the residual stream


def test_through_depth_places_values():
    ax = plotting.through_depth(
        {"ghost": [1.0, 2.0, 4.0], "something else": [3.0, 3.0, 3.0]},
        ylabel="norm",
        title="It grows",
        first=12,
        log=True,
    )
    line = ax.get_lines()[0]
    assert line.get_xdata().tolist() == [12, 13, 14]
    assert line.get_ydata().tolist() == [1.0, 2.0, 4.0]
    assert line.get_color() == color("ghost")
    assert (ax.get_ylabel(), ax.get_yscale()) == ("norm", "log")
    assert title(ax) == "It grows"
    assert "ghost from 1 at 12 to 4 at 14" in alt_text(ax)
    assert plotting.through_depth({"one": [1.0]}, ylabel="y", ax=plt.figure().gca()).legend_ is None


@pytest.mark.parametrize(("mark", "where", "note"), [("max", 7, "7: 0.9"), ("min", 5, "5: 0.1")])
def test_through_depth_marks_the_best(mark, where, note):
    scores = [0.1, 0.5, 0.9, 0.4]
    ax = plotting.through_depth(
        {"cosine": scores}, ylabel="cosine", xlabel="first removed layer", first=5, mark=mark
    )
    ring = ax.get_lines()[1]
    assert ring.get_xdata()[0] == where and ring.get_ydata()[0] == scores[where - 5]
    assert labels(ax.texts) == [note] and ax.get_xlabel() == "first removed layer"
    assert apart(ax)


def test_token_depth_heatmap_shows_depth_upwards():
    norms = np.arange(1.0, 13.0).reshape(4, 3)
    ax = plotting.token_depth_heatmap(norms, ["The", "cat", "sat"], title="One grows")
    drawn = np.asarray(ax.collections[0].get_array()).reshape(4, 3)
    assert np.array_equal(drawn, norms[::-1])
    assert labels(ax.get_xticklabels()) == ["The", "cat", "sat"]
    assert ax.get_yticklabels()[0].get_text() == "0" and ax.get_yticks()[0] == 3.5
    assert title(ax) == "One grows"
    assert "largest 12, of token 'sat' at depth 3" in alt_text(ax)


# ---------------------------------------------------------------- operator families


def test_lattice_draws_a_line_for_each_inclusion_and_a_box_for_each_set():
    places = {"identity": (0, 0), "scalar": (0, 1), "ghost": (1, 2)}
    inclusions = [("identity", "scalar"), ("scalar", "ghost")]
    ax = plotting.lattice(places, inclusions, {"ghost": "331,776"})
    assert labels(ax.texts) == ["identity", "scalar", "ghost\n331,776"]
    assert [tuple(line.get_ydata()) for line in ax.lines] == [(0, 1), (1, 2)]
    edges = [to_hex(text.get_bbox_patch().get_edgecolor()) for text in ax.texts]
    assert edges == [color(name) for name in places]
    assert "identity within scalar, scalar within ghost" in alt_text(ax)
    with pytest.raises(ValueError, match="nonsense"):
        plotting.lattice({"nonsense": (0, 0)}, [])


def test_lattice_dashes_the_line_from_a_single_member_to_its_set():
    places = {"scalar": (0, 0), "diagonal": (0, 1), "linearpatch-d": (1, 0)}
    ax = plotting.lattice(places, [("scalar", "diagonal")], members=[("linearpatch-d", "diagonal")])
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]
    assert "scalar within diagonal, linearpatch-d one member of diagonal" in alt_text(ax)


def test_the_lattice_of_operators_counts_parameters_and_leads_upwards():
    ax = plotting.operator_lattice(576, 64)
    boxes = {name: note for name, _, note in (text.partition("\n") for text in labels(ax.texts))}
    assert boxes["ghost"] == "331,776" and boxes["affine"] == "332,352"
    assert boxes["low-rank"] == "rank 64: 69,632" and boxes["linearpatch-r"] == "one member"
    assert all(np.diff(line.get_ydata()).item() > 0 for line in ax.lines)
    assert [line.get_linestyle() for line in ax.lines].count("--") == 2
    assert {name for pair in plotting.INCLUSIONS for name in pair} < set(boxes)


def test_train_and_held_out_bars_carry_both_errors():
    ax = plotting.train_and_held_out({"scalar": (0.99, 1.0), "ghost": (0.35, 0.38)})
    drawn = [bar.get_width() for bar in ax.patches if np.isfinite(bar.get_width())]
    assert drawn == [0.99, 1.0, 0.35, 0.38]
    assert labels(ax.get_yticklabels()) == ["scalar", "ghost"]
    assert [text.strip() for text in labels(ax.texts)] == ["0.99", "1.00", "0.35", "0.38"]
    assert labels(ax.get_legend().get_texts()) == ["training tokens", "held-out tokens"]
    assert "lower is better" in ax.get_xlabel() and "ghost 0.35 and 0.38" in alt_text(ax)
    assert apart(ax)


def test_against_tokens_draws_medians_draws_and_limits():
    curves = {
        "ghost": {128: [4.0, 9.0, 5.0], 64: 2.0, 576: [700.0, 900.0]},
        "ghost, training": {64: 1.0, 128: 0.5},
        "low-rank, rank 32": {64: 3.0, 128: 3.0},
    }
    ax = plotting.against_tokens(curves, width=576, ylim=(0.7, 100))
    lines = {line.get_label().partition(" (")[0]: line for line in ax.lines}
    held_out, train, rank = (lines[label] for label in curves)
    assert list(held_out.get_xdata()) == [64, 128, 576]
    assert list(held_out.get_ydata()) == [2.0, 5.0, 800.0]
    dashes = [line.get_linestyle() for line in (held_out, train, rank)]
    assert dashes == ["-", "--", ":"]
    assert {line.get_color() for line in (held_out, train)} == {color("ghost")}
    hollow = [line.get_markerfacecolor() == "white" for line in (held_out, train, rank)]
    assert hollow == [False, True, True]
    dots = [line for line in ax.lines if line.get_marker() == "."]
    assert [list(d.get_ydata()) for d in dots] == [[4.0, 9.0, 5.0], [700.0, 900.0]]
    assert set(lines["width 576"].get_xdata()) == {576}
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylim()) == ("log", "log", (0.7, 100))
    shown = labels(ax.get_legend().get_texts())
    assert shown == [
        "ghost (up to 800)", "ghost, training (down to 0.500)", "low-rank, rank 32", "width 576",
    ]  # fmt: skip
    assert "ghost 2 at 64, 800 at 576" in alt_text(ax)
    free = plotting.against_tokens({"ghost": {64: 2.0, 128: 1.0}}, ax=plt.figure().gca())
    assert len(free.lines) == 1 and "lower is better" in free.get_ylabel()


# ---------------------------------------------------------------- choices of layers


def test_every_block_has_its_cell_and_each_row_its_best():
    values = {b: b.start + 10.0 * len(b.removed) for n in (1, 2) for b in contiguous(n, 5)}
    ax = plotting.start_by_length(values, label="cosine", best="max", title="T")
    mesh = ax.collections[0].get_array().reshape(2, 5)
    assert mesh[0].compressed().tolist() == [20, 21, 22, 23]  # two layers: four starts
    assert mesh[1].tolist() == [10, 11, 12, 13, 14]
    assert [line.get_xdata()[0] for line in ax.lines] == [3.5, 4.5]
    assert title(ax) == "T" and ax.get_xlabel().startswith("first removed layer (frame")
    assert "light: higher" in ax.collections[0].colorbar.ax.get_ylabel()
    frames = [(p.get_x(), p.get_width()) for p in ax.patches if isinstance(p, Rectangle)]
    assert frames == [(3, 2), (4, 1)]  # the layers that the best blocks take
    assert "2 layers: 23 from layer 3; 1 layer: 14 from layer 4" in alt_text(ax)
    low = plotting.start_by_length(values, label="residual", log=True, ax=plt.figure().gca())
    assert [line.get_xdata()[0] for line in low.lines] == [0.5, 0.5]
    assert "light: lower" in low.collections[0].colorbar.ax.get_ylabel()


def test_removed_layers_are_dark():
    ax = plotting.removed_layers({"cosine": range(2, 4), "taylor": [0]}, 5)
    dark = [to_hex(p.get_facecolor()) == color("pruned") for p in ax.patches]
    assert dark == [False, False, True, True, False] + [True] + [False] * 4
    assert labels(ax.get_yticklabels()) == ["cosine", "taylor"]
    assert "cosine 2, 3; taylor 0" in alt_text(ax)


def test_dots_carry_the_start_and_the_best_end_is_on_the_left():
    score, perplexity = {3: 0.5, 7: 0.9, 8: 0.4, 9: 0.7}, {3: 20.0, 7: 15.0, 8: 30.0, 9: 16.0}
    ax = plotting.against_score(score, perplexity, xlabel="mean cosine", best="max")
    dots = ax.lines[0]
    assert dict(zip(dots.get_xdata(), dots.get_ydata(), strict=True)) == {
        0.5: 20, 0.9: 15, 0.4: 30, 0.7: 16,
    }  # fmt: skip
    assert ax.xaxis_inverted() and ax.get_xlabel() == "mean cosine\n← removed first"
    assert labels(ax.texts)[1:] == ["3", "7", "8", "9"]
    assert [text.xy for text in ax.texts[1:]] == [(0.5, 20), (0.9, 15), (0.4, 30), (0.7, 16)]
    assert labels(ax.texts)[0].startswith("Spearman 1.00 [")
    assert "lowest perplexity 15.0 at start 7, highest 30.0 at start 8" in alt_text(ax)
    assert "removed first: start 7, perplexity 15.0." in alt_text(ax)
    other = plotting.against_score(score, perplexity, xlabel="residual", ax=plt.figure().gca())
    assert not other.xaxis_inverted() and labels(other.texts)[0].startswith("Spearman -1.00 [")
    assert "removed first: start 8, perplexity 30.0." in alt_text(other)
    other = plotting.against_score(
        score, perplexity, xlabel="residual", interval=(-1.0, 0.25), ax=plt.figure().gca()
    )
    assert labels(other.texts)[0] == "Spearman -1.00 [-1.00, 0.25]"


def test_paired_differences_have_a_mean_and_its_interval():
    ax = plotting.differences({"wiki": [0.1, 0.2, 0.3], "pydoc": [-1.0, 1.0]}, ylabel="a − b\nnats")
    assert ax.lines[0].get_ydata().tolist() == [0.1, 0.2, 0.3]
    assert ax.lines[0].get_xdata() == pytest.approx([-0.3, -0.15, 0])
    assert labels(ax.get_xticklabels()) == ["wiki", "pydoc"]
    low, high = stats.t.interval(0.95, 2, 0.2, 0.1 / 3**0.5)
    assert labels(ax.texts)[0] == f"+0.200 [{low:+.3f}, {high:+.3f}]"
    assert alt_text(ax).startswith("a − b nats; with 95 % intervals: wiki mean +0.200 [-0.048,")
    assert "; pydoc mean +0.000 [-12.706, +12.706], 2 differences from -1.000 to +1.000." in (
        alt_text(ax)
    )


@pytest.mark.thorough
def test_a_crowd_of_blocks_stays_readable_and_its_correlation_has_an_interval():
    rng = np.random.default_rng(0)
    starts = range(24)
    score = {s: float(v) for s, v in zip(starts, rng.normal(size=24), strict=True)}
    perplexity = {s: float(np.exp(score[s] + rng.normal())) * 20 for s in starts}
    _, (ax, _) = plt.subplots(1, 2, figsize=(11, 4.2))
    plotting.against_score(score, perplexity, xlabel="residual", ax=ax)
    rho = stats.spearmanr([*score.values()], [*perplexity.values()]).statistic
    low, high = (float(v) for v in labels(ax.texts)[0].split("[")[1].rstrip("]").split(", "))
    assert low < rho < high and 0.3 < high - low < 0.8
    assert apart(ax)


def test_the_grid_writes_numbers_leaves_gaps_white_and_merges_equal_rows():
    table = pd.DataFrame(
        {"pruned": [200.0, 30.0, 200.0], "ghost": [18.04, np.nan, 18.04]},
        index=["cosine", "taylor", "angular"],
    )
    ax = plotting.grid(table, limits=(10, 1000))
    assert labels(t for t in ax.texts if t.get_text()) == ["200", "18.0", "30.0"]
    assert labels(ax.get_xticklabels()) == ["pruned", "ghost"]
    assert labels(ax.get_yticklabels()) == ["cosine = angular", "taylor"]
    assert ax.collections[0].get_clim() == (10, 1000)
    assert "light: better" in ax.collections[0].colorbar.ax.get_ylabel()
    assert "cosine = angular: pruned 200, ghost 18.0; taylor: pruned 30.0." in alt_text(ax)
    assert alt_text(ax).startswith("perplexity, lower is better")
    bare = plotting.grid(table, colour_bar=False, ax=plt.figure().gca())
    assert bare.collections[0].colorbar is None and bare.collections[0].get_clim() == (18.04, 200)


def test_a_grid_of_shares_has_even_colours_from_none_to_all_and_light_is_more():
    table = pd.DataFrame({"copying": [-0.1, 1.0], "facts": [0.5, np.nan], "sums": [-0.02, np.nan]})
    ax = plotting.grid(table, label="share kept", shares=True)
    assert labels(t for t in ax.texts if t.get_text()) == ["-0.1", "0.5", "0.0", "1.0"]
    mesh = ax.collections[0]
    assert mesh.get_clim() == (0, 1) and mesh.norm(0.5) == 0.5
    dark, light = (sum(mesh.cmap(value)[:3]) for value in (0.0, 1.0))
    assert light > dark and "log" not in mesh.colorbar.ax.get_ylabel()
    assert alt_text(ax).startswith("share kept, higher is better. 0: copying -0.1, facts 0.5,")
    bare = plotting.grid(table, shares=True, numbers=False, ax=plt.figure().gca())
    assert not bare.texts and "facts 0.5" in alt_text(bare)


# ---------------------------------------------------------------- abilities


def profile(*kept: float) -> pd.DataFrame:
    """A table of copying (nats, chance 10) and names (shares), with the shares ``kept``."""
    names = ["copying", "names", "sums"]
    dense, chance = np.array([2.0, 0.9, 0.55]), np.array([10.0, 0.5, 0.5])
    score = chance + np.array([*kept, 1.0]) * (dense - chance)
    columns = {"score": score, "low": score - 0.1, "high": score + 0.1, "chance": chance}
    columns |= {"dense": dense, "kept": [*kept, np.nan]}
    columns |= {"verdict": ["lost", "kept", "decides nothing"]}
    return pd.DataFrame(columns, index=names)


def test_abilities_are_shares_of_what_the_dense_model_has():
    tables = {"pruned": profile(-0.1, 0.5), "ghost": profile(0.25, 1.0)}
    ax = plotting.abilities(tables, title="What is kept")
    drawn = {line.get_label(): line for line in ax.get_lines()}
    assert drawn["ghost"].get_xdata().tolist() == [0.25, 1.0]
    assert drawn["pruned"].get_color() == color("pruned")
    assert labels(ax.get_yticklabels()) == ["copying", "names"], "the rest decides nothing"
    bars = ax.collections[1].get_segments()
    assert [bar[0, 0] for bar in bars] == pytest.approx([0.25 - 0.1 / 8, 0.75])
    assert "ghost: copying 0.25, names 1.00" in alt_text(ax)
    assert "higher is better" in ax.get_xlabel() and apart(ax)


def test_a_front_has_the_points_that_none_beats_in_both():
    points = {"a": (3.0, 12.0), "b": (3.1, 5.0), "c": (3.2, 6.0), "d": (3.4, 4.0)}
    ax = plotting.front(
        points, labels={"a": "cosine", "b": "ours"}, xlabel="text, nats", ylabel="copying, nats"
    )
    (line,) = [line for line in ax.get_lines() if line.get_label() == "none is better in both"]
    assert line.get_xdata().tolist() == [3.0, 3.1, 3.1, 3.4, 3.4]
    assert line.get_ydata().tolist() == [12.0, 12.0, 5.0, 5.0, 4.0]
    assert set(labels(ax.texts)) == {"cosine", "ours"} and apart(ax)
    path = line.get_transform().transform_path(line.get_path())
    assert not any(path.intersects_bbox(Text.get_window_extent(t), filled=False) for t in ax.texts)
    assert "Front: 3, 12; 3.1, 5; 3.4, 4." in alt_text(ax)


def test_seeds_by_start_are_a_shade_behind_the_line():
    curves = {"pruned": {0: 9.0, 1: 8.0}, "ghost": {0: 5.0, 1: 4.0}}
    ax = plotting.by_start(curves, ranges={"ghost": {1: (3.0, 4.5), 0: (4.5, 5.25)}}, ylabel="nats")
    (shade,) = ax.collections
    points = {tuple(point) for point in shade.get_paths()[0].vertices.tolist()}
    assert points == {(0, 4.5), (0, 5.25), (1, 3.0), (1, 4.5)}
    assert to_hex(shade.get_facecolor()[0]) == color("ghost")
    assert "start 0, seeds up to 1.5" in alt_text(ax).partition("ghost")[2]


def test_rings_by_start_are_open_large_and_behind():
    curves = {"auto": {0: 9.0, 1: 8.0}, "auto matrix": {0: 9.0, 1: 8.5}}
    ax = plotting.by_start(curves, rings=["auto matrix"])
    points, rings = ax.lines
    assert rings.get_markerfacecolor() == "none" and points.get_markerfacecolor() != "none"
    assert rings.get_markersize() > 1.5 * points.get_markersize()
    assert rings.get_zorder() < points.get_zorder() and len(ax.collections) == 0
    assert ax.get_legend().get_lines()[1].get_markersize() == rings.get_markersize()


def test_other_scores_by_start_are_linear():
    curves = {"dense": {0: 2.6, 1: 2.6}, "ghost": {0: 11.9, 1: 5.1}}
    ax = plotting.by_start(curves, ylabel="copying, nats (lower is better)")
    assert ax.get_yscale() == "linear" and ax.get_ylabel().startswith("copying")
    assert alt_text(ax).startswith("copying, nats (lower is better) by first removed layer. dense")


def test_a_ratio_by_start_is_open_where_its_interval_decides_nothing():
    ratios = {0: (0.5, 0.4, 0.6, 3, 192), 1: (0.9, 0.7, 1.1), 2: (2.0, 1.5, 3.0)}
    ax = plotting.ratio_by_start(
        ratios,
        "refit",
        beside={0: 0.6, 2: 1.9},
        beside_label="other windows",
        band=(1, 2),
        band_label="early",
        title="refit ÷ ghost",
    )
    circles = [line for line in ax.get_lines() if line.get_marker() == "o"]
    fills = [line.get_markerfacecolor() for line in circles]
    assert fills == [plotting.color("refit"), "white", plotting.color("refit")]
    (crosses,) = (line for line in ax.get_lines() if line.get_marker() == "x")
    assert list(crosses.get_ydata()) == [0.6, 1.9]
    said = {text.get_text() for text in ax.legend().get_texts()}
    assert said == {"decided, 95 % interval", "undecided", "other windows", "early"}
    assert ax.get_yscale() == "log"
    for words in ("refit ÷ ghost", "0: 0.500,", "1: 0.900 undecided", "2: 2.00."):
        assert words in plotting.alt_text(ax)
