"""The explorer's repairs, against the package's own on the same tokens."""

import matplotlib.pyplot as plt
import pytest
from conftest import LAYERS, tiny_model, tiny_tokenizer, tiny_windows

import ghostlib as gl
from ghostlib.tutorial.explorer import Explorer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=len(TOKENIZER))


@pytest.fixture(scope="module")
def explorer(model):
    return Explorer(model, TOKENIZER, tiny_windows(4), tiny_windows(2, seed=1))


@pytest.mark.parametrize("family", ["diagonal", "symmetric", "ghost"])
def test_repairs_are_those_of_the_package(model, explorer, family):
    moments = gl.calibrate(model, tiny_windows(4), [(2, 4)])[gl.Boundary(2, 4)]
    options = {} if family == "diagonal" else {"relative_ridge": 1e-2}
    expected = gl.solve(moments, family, **options)
    op, _ = explorer.solve(2, 2, family, explorer.tokens, 1e-2)
    assert moments.error(op) == pytest.approx(moments.error(expected), rel=1e-5)


def test_the_figure_shows_the_held_out_error(model, explorer):
    figure = explorer.figure(2, 2, "ghost", explorer.tokens, 1e-2)
    op, _ = explorer.solve(2, 2, "ghost", explorer.tokens, 1e-2)
    held_out = gl.calibrate(model, tiny_windows(2, seed=1), [(2, 4)])[gl.Boundary(2, 4)]
    bars = [bar.get_height() for bar in figure.axes[0].patches]
    assert bars == pytest.approx([1.0, held_out.error(op) / held_out.pruned_error], rel=1e-3)
    tokens = figure.axes[2]
    assert tokens.get_xlim() == tokens.get_ylim() and tokens.get_aspect() == 1
    low, high = tokens.get_xlim()
    dots = tokens.lines[0].get_xydata()
    assert low < dots.min() < dots.max() < high
    assert figure.get_suptitle().startswith("Layers 2–3 removed, ghost, ridge 0.01, ")
    plt.close(figure)
    assert explorer.html(2, 2, "pruned", 8, 0.0).startswith('<img alt="')
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("family", "ridge", "title"),
    [
        ("ghost", 0.0, "ghost, no ridge, 8"),
        ("diagonal", 0.1, "diagonal, 8"),
        ("pruned", 0.1, "pruned, 8"),
    ],
)
def test_the_title_names_a_ridge_where_the_family_takes_one(explorer, family, ridge, title):
    figure = explorer.figure(2, 2, family, 8, ridge)
    assert f"removed, {title} tokens" in figure.get_suptitle()
    plt.close(figure)


def test_the_sentence_is_that_of_the_repaired_model(model, explorer):
    op, _ = explorer.solve(1, 3, "diagonal", explorer.tokens, 0.0)
    repaired = gl.install(model, {gl.Boundary(1, 4): op})
    expected = gl.generate(repaired, TOKENIZER, "the theory", max_new_tokens=24)[0]
    assert explorer.sentence(1, 3, "diagonal", explorer.tokens, 0.0, "the theory") == expected


def test_a_warning_is_shown_and_a_block_outside_refused(explorer):
    _, warning = explorer.solve(2, 2, "ghost", 4, 0.0)
    assert warning
    with pytest.raises(ValueError, match="are not within 0 … 5"):
        explorer.solve(LAYERS - 1, 2, "ghost", 4, 0.0)
