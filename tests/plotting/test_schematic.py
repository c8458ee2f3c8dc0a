"""The schematic, through the boxes and words on its axes."""

from itertools import combinations

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from ghostlib import plotting

pytestmark = pytest.mark.usefixtures("fresh_figure")


@pytest.mark.parametrize(
    ("layers", "removed", "above", "below"),
    [
        (30, range(12, 19), "embed 0 11 12 18 19 29 norm", "embed 0 11 19 29 norm"),
        (6, [2], "embed 0 1 2 3 4 5 norm", "embed 0 1 3 4 5 norm"),
        (4, [0, 1], "embed 0 1 2 3 norm", "embed 2 3 norm"),
        (4, [3], "embed 0 1 2 3 norm", "embed 0 1 2 norm"),
    ],
)
def test_layers_stand_in_two_rows_and_w_takes_the_blocks_place(layers, removed, above, below):
    ax = plotting.schematic(layers, removed)
    ax.figure.draw_without_rendering()
    rows: dict[float, dict[str, Rectangle]] = {2.0: {}, 0.0: {}}  # dense, repaired
    for box in ax.patches:
        if isinstance(box, Rectangle):
            centre = (box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2)
            text = next(t for t in ax.texts if t.get_position() == pytest.approx(centre))
            rows[round(centre[1], 1)][text.get_text()] = box
    dense, repaired = rows[2.0], rows[0.0]
    w = repaired.pop("W")
    assert (" ".join(dense), " ".join(repaired)) == (above, below)
    gone = [box for name, box in dense.items() if name not in repaired]
    assert {to_hex(box.get_edgecolor()) for box in gone} == {plotting.color("pruned")}
    assert to_hex(w.get_facecolor()) == plotting.color("ghost")
    assert w.get_x() == pytest.approx((gone[0].get_x() + gone[-1].get_x()) / 2)
    words = {t.get_text() for t in ax.texts}
    assert {"X_pre", "X_post", "X_pre W ≈ X_post", "dense", "repaired"} <= words
    extents = [t.get_window_extent() for t in ax.texts if t.get_text()]
    assert not any(a.overlaps(b) for a, b in combinations(extents, 2))


def test_it_says_what_it_shows():
    text = plotting.alt_text(plotting.schematic(30, range(23, 30)))
    assert "layers 23 to 29, the block" in text and "leaves it for the final norm" in text
    assert "leaves it for layer 19" in plotting.alt_text(plotting.schematic(30, range(12, 19)))


@pytest.mark.parametrize("removed", [[], [1, 3], [-1, 0], [5, 6], [2, 2]])
def test_anything_but_one_block_is_refused(removed):
    with pytest.raises(ValueError, match=r"one block of adjacent layers of 0 … 5, such as"):
        plotting.schematic(6, removed)


def test_a_model_keeps_a_layer():
    with pytest.raises(ValueError, match="removing all 6 layers leaves no model"):
        plotting.schematic(6, range(6))
