"""Figures of repairs side by side, tested through the data on the returned axes."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex

from ghostlib import plotting
from ghostlib.plotting import color


@pytest.fixture(autouse=True)
def fresh_figure():
    plt.figure()
    yield
    plt.close("all")


def test_a_line_for_each_repair_along_the_starts():
    ax = plotting.by_start({"pruned": {1: 90.0, 0: 300.0}, "ghost": {0: 20.0}}, most=100, title="T")
    pruned, ghost = ax.lines
    assert (list(pruned.get_xdata()), list(pruned.get_ydata())) == ([0, 1], [300.0, 90.0])
    assert to_hex(ghost.get_color()) == color("ghost")
    assert ax.get_yscale() == "log" and ax.get_ylim()[1] == 100
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["pruned", "ghost"]
    free = plotting.by_start({"ghost": {0: 20.0, 1: 30.0}}, ax=plt.figure().gca())
    assert free.get_ylim()[1] > 30


def test_ratios_show_every_seed_and_their_geometric_mean():
    table = {"x, n(x)": {"wiki": [0.5, 2.0], "c4": [4.0]}, "other": {"wiki": [1.0], "c4": [1.0]}}
    ax = plotting.ratios(table, names={"x, n(x)": "two-branch"})
    assert [t.get_text() for t in ax.texts] == ["wiki 1.00", "c4 4.00", "wiki 1.00", "c4 1.00"]
    assert ax.collections[0].get_offsets()[:, 0].tolist() == [0.5, 2.0]
    means = [line for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert means[0].get_xdata()[0] == pytest.approx(1.0)
    assert to_hex(means[0].get_color()) == color("two-branch")
    assert to_hex(means[2].get_color()) == "#808080", "a label without an operator is grey"
    assert to_hex(ax.lines[-1].get_color()) == color("ghost") and ax.lines[-1].get_xdata()[0] == 1
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x, n(x)", "other"]
    assert ax.get_xscale() == "log" and ax.yaxis_inverted()
    near = plotting.ratios({"ghost": {"wiki": [0.9, 1.1]}}, ax=plt.figure().gca())
    assert near.get_xscale() == "linear"
    tiny = plotting.ratios({"ghost": {"wiki": [0.00432]}}, ax=plt.figure().gca())
    assert tiny.texts[0].get_text() == "wiki 0.00432"
