"""Figures, through the data on the axes they return."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba

from ghostlib import plotting
from ghostlib.operators.families import FAMILIES as OPERATORS

TABLE = {
    "dense": {"wiki": 12.0, "pydoc": 11.0},
    "pruned": {"wiki": 33.0, "pydoc": 35.0},
    "ghost": {"wiki": 18.0, "pydoc": 20.0},
}


@pytest.fixture(autouse=True)
def closed_figures():
    plotting.use_style()
    yield
    plt.close("all")


def test_every_operator_has_a_colour_of_its_own():
    colours = [plotting.color(name) for name in OPERATORS]
    assert len(set(colours)) == len(colours)
    assert plotting.color("pruned") == plotting.color("identity")
    with pytest.raises(ValueError, match="did you mean 'ghost'"):
        plotting.color("gost")


def test_perplexity_bars_rise_from_the_reference():
    ax = plotting.perplexity_bars(TABLE)
    bars = {
        (round(b.get_y(), 3), round(b.get_y() + b.get_height(), 3), b.get_facecolor())
        for b in ax.patches
    }
    assert bars == {
        (TABLE["dense"][corpus], TABLE[name][corpus], to_rgba(plotting.color(name)))
        for name in ("pruned", "ghost")
        for corpus in ("wiki", "pydoc")
    }
    assert ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["wiki", "pydoc"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["pruned", "ghost"]
    shown = {t.get_text() for t in ax.texts}
    assert {"33.0", "18.0", "dense 12.0", "dense 11.0"} <= shown


def test_through_depth_places_values_and_shades_the_removed_layers():
    ax = plotting.through_depth(
        {"ghost": [1.0, 2.0, 4.0], "something else": [3.0, 3.0, 3.0]},
        ylabel="norm",
        title="It grows",
        removed=range(12, 19),
        first=12,
        log=True,
    )
    line = ax.get_lines()[0]
    assert line.get_xdata().tolist() == [12, 13, 14]
    assert line.get_ydata().tolist() == [1.0, 2.0, 4.0]
    assert line.get_color() == plotting.color("ghost")
    band = ax.patches[0]
    assert (band.get_x(), band.get_x() + band.get_width()) == (12, 19)
    assert (ax.get_ylabel(), ax.get_yscale()) == ("norm", "log")
    assert ax.get_title(loc="left") == "It grows"
    assert plotting.through_depth({"one": [1.0]}, ylabel="y", ax=plt.figure().gca()).legend_ is None


def test_token_depth_heatmap_shows_depth_upwards():
    norms = np.arange(1.0, 13.0).reshape(4, 3)
    ax = plotting.token_depth_heatmap(norms, ["The", "cat", "sat"], title="Giants")
    drawn = np.asarray(ax.collections[0].get_array()).reshape(4, 3)
    assert np.array_equal(drawn, norms[::-1])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["The", "cat", "sat"]
    assert ax.get_yticklabels()[0].get_text() == "0" and ax.get_yticks()[0] == 3.5
    assert ax.get_title(loc="left") == "Giants"


def test_published_and_measured_keep_places_and_colours():
    published = {"pruned": 42.6, "ghost": 60.0}
    left, right = plotting.published_and_measured(
        published,
        {"dense": 55.0, "ghost": 50.0},
        errors={"ghost": 4.0},
        labels=("Llama-3.1-8B", "SmolLM2-135M"),
        ylabel="accuracy (%)",
    )
    bars = [
        (b.get_x() + b.get_width() / 2, b.get_height(), b.get_facecolor()) for b in left.patches
    ]
    assert bars == [
        (0, 42.6, to_rgba(plotting.color("pruned"))),
        (1, 60.0, to_rgba(plotting.color("ghost"))),
    ]
    assert [b.get_x() + b.get_width() / 2 for b in right.patches] == [2, 1]
    assert [t.get_text() for t in right.get_xticklabels()] == ["pruned", "ghost", "dense"]
    (low, high) = right.collections[0].get_segments()[0][:, 1]
    assert (low, high) == (46.0, 54.0) and not left.collections
    assert left.get_title(loc="left") == "Llama-3.1-8B" and right.get_ylabel() == "accuracy (%)"
    axes = plt.figure().subplots(1, 2)
    drawn = plotting.published_and_measured(published, {}, ylabel="y", log=True, axes=axes)
    assert drawn == tuple(axes) and axes[0].get_yscale() == "log"
