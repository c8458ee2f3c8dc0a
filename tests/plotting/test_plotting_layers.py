"""Figures of layer selection, tested through the data on the returned axes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from ghostlib import plotting
from ghostlib.models.boundaries import contiguous
from ghostlib.plotting import color


@pytest.fixture(autouse=True)
def fresh_figure():
    plt.figure()
    yield
    plt.close("all")


def test_every_block_has_its_cell_and_each_row_its_best():
    values = {b: b.start + 10.0 * len(b.removed) for n in (1, 2) for b in contiguous(n, 5)}
    ax = plotting.start_by_length(values, label="cosine", best="max", title="T")
    mesh = ax.collections[0].get_array().reshape(2, 5)
    assert mesh[0].compressed().tolist() == [20, 21, 22, 23]  # two layers: four starts
    assert mesh[1].tolist() == [10, 11, 12, 13, 14]
    assert [line.get_xdata()[0] for line in ax.lines] == [3.5, 4.5]
    title = ax.get_title(loc=plt.rcParams["axes.titlelocation"])
    assert (title, ax.get_xlabel()) == ("T", "first removed layer")
    low = plotting.start_by_length(values, label="residual", log=True, ax=plt.figure().gca())
    assert [line.get_xdata()[0] for line in low.lines] == [0.5, 0.5]


def test_removed_layers_are_red():
    ax = plotting.removed_layers({"cosine": range(2, 4), "taylor": [0]}, 5)
    red = [to_hex(p.get_facecolor()) == color("pruned") for p in ax.patches]
    assert red == [False, False, True, True, False] + [True] + [False] * 4
    assert [t.get_text() for t in ax.get_yticklabels()] == ["cosine", "taylor"]


def test_dots_carry_the_start():
    ax = plotting.against_score({3: 0.5, 7: 0.9}, {3: 20.0, 7: 30.0}, xlabel="cosine")
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines] == [
        (0.5, 20),
        (0.9, 30),
    ]
    assert [t.get_text() for t in ax.texts] == ["3", "7"]


def test_the_grid_writes_numbers_and_leaves_gaps_white():
    table = pd.DataFrame({"none": [200.0, 30.0], "ghost": [18.04, np.nan]}, index=["a", "b"])
    ax = plotting.grid(table)
    assert [t.get_text() for t in ax.texts if t.get_text()] == ["200", "18.0", "30.0"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["none", "ghost"]
