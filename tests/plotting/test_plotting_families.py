"""Figures about operator families, through the data on the `Axes` they return."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ghostlib import plotting


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_lattice_draws_a_line_for_each_inclusion_and_a_box_for_each_set(ax):
    places = {"identity": (0, 0), "scalar": (0, 1), "ghost": (1, 2)}
    inclusions = [("identity", "scalar"), ("scalar", "ghost")]
    plotting.lattice(places, inclusions, {"ghost": "331,776"}, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["identity", "scalar", "ghost\n331,776"]
    assert [tuple(line.get_ydata()) for line in ax.lines] == [(0, 1), (1, 2)]
    edges = [to_hex(text.get_bbox_patch().get_edgecolor()) for text in ax.texts]
    assert edges == [plotting.color(name) for name in places]


def test_lattice_refuses_an_operator_without_a_colour(ax):
    with pytest.raises(ValueError, match="nonsense"):
        plotting.lattice({"nonsense": (0, 0)}, [], ax=ax)


def test_train_and_held_out_bars_carry_both_errors(ax):
    plotting.train_and_held_out({"scalar": (0.99, 1.0), "ghost": (0.35, 0.38)}, ax=ax)
    drawn = [bar.get_width() for bar in ax.patches if np.isfinite(bar.get_width())]
    assert drawn == [0.99, 1.0, 0.35, 0.38]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["scalar", "ghost"]
    assert [t.get_text().strip() for t in ax.texts] == ["0.99", "1.00", "0.35", "0.38"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "training tokens",
        "held-out tokens",
    ]


def test_against_tokens_draws_medians_and_the_range_of_the_draws(ax):
    curves = {"ghost": {128: [4.0, 9.0, 5.0], 64: 2.0}, "ghost, training": {64: 1.0, 128: 0.5}}
    plotting.against_tokens(curves, width=576, ax=ax)
    held_out, train, mark = ax.lines
    assert list(held_out.get_xdata()) == [64, 128]
    assert list(held_out.get_ydata()) == [2.0, 5.0]
    assert (held_out.get_linestyle(), train.get_linestyle()) == ("-", "--")
    assert {line.get_color() for line in (held_out, train)} == {plotting.color("ghost")}
    assert set(mark.get_xdata()) == {576}
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 2.0
    assert band[:, 1].max() == 9.0
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
