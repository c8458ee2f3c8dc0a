"""Every test draws on a figure of its own, in the suite's style, and leaves none behind."""

from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import pytest

from ghostlib import plotting

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def fresh_figure() -> Iterator[None]:
    plotting.use_style()
    plt.figure()
    yield
    plt.close("all")
