"""Boundaries and runs: examples, properties and errors."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ghostlib.models.boundaries import (
    Boundary,
    check_boundary,
    contiguous,
    gaps_without,
    read_layers,
    runs,
    spell,
)


def test_a_boundary_names_the_removed_layers() -> None:
    boundary = Boundary(12, 19)
    assert list(boundary.removed) == [12, 13, 14, 15, 16, 17, 18]
    assert str(boundary) == "(12, 19)"
    assert boundary == (12, 19) and {boundary: 1}[Boundary(12, 19)] == 1


@pytest.mark.parametrize("boundary", [(0, 1), (0, 30), (29, 30), Boundary(12, 19)])
def test_boundaries_that_fit(boundary: tuple[int, int]) -> None:
    checked = check_boundary(boundary, 30)
    assert isinstance(checked, Boundary) and checked == boundary


@pytest.mark.parametrize("boundary", [(-1, 3), (3, 3), (4, 3), (0, 31), (30, 31)])
def test_boundaries_that_do_not_fit(boundary: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"does not fit a model of 30 layers"):
        check_boundary(boundary, 30)


def test_adjacent_layers_share_a_boundary() -> None:
    assert runs([25, 12, 13, 14], 30) == [(12, 15), (25, 26)]
    assert runs([0, 29], 30) == [(0, 1), (29, 30)]


@given(st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_runs_are_maximal_and_cover_the_layers(case: tuple[int, set[int]]) -> None:
    num_layers, layers = case
    assume(1 <= len(layers) < num_layers)
    boundaries = runs(layers, num_layers)
    assert [layer for boundary in boundaries for layer in boundary.removed] == sorted(layers)
    assert all(a.stop < b.start for a, b in pairwise(boundaries))
    assert all(check_boundary(boundary, num_layers) == boundary for boundary in boundaries)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no layer to remove"),
        ([3, 4, 3], r"\[3\] are named more than once"),
        ([-1], r"\[-1\] are out of range"),
        ([2, 6], r"\[6\] are out of range: .* layers 0 … 5"),
        (range(6), "leaves no layer: remove at most 5"),
    ],
)
def test_runs_refuses(layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs(layers, 6)


def test_without_a_removed_layer_there_is_no_gap() -> None:
    assert gaps_without((), 6) == []
    assert gaps_without((4, 2, 3), 6) == runs([4, 2, 3], 6)
    with pytest.raises(ValueError, match="leaves no layer"):
        gaps_without(range(6), 6)


def test_contiguous_lists_every_block_first_and_last_included() -> None:
    assert contiguous(4, 6) == [(0, 4), (1, 5), (2, 6)]
    assert len(contiguous(1, 6)) == 6 and len(contiguous(5, 6)) == 2


@pytest.mark.parametrize("n", [0, -1, 6, 7])
def test_contiguous_refuses(n: int) -> None:
    with pytest.raises(ValueError, match="choose n between 1 and 5"):
        contiguous(n, 6)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_layers_are_read_as_they_are_spelt(layers: set[int]) -> None:
    assert read_layers(spell(sorted(layers))) == tuple(sorted(layers))
    assert read_layers(spell(layers).replace("–", "-")) == tuple(sorted(layers))


@pytest.mark.parametrize(
    "text", ["", "1-2-3", "1–2–3", "3-2", "3-", "-3", "1,,2", "1;2", "a", "2.5"]
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="are not of the form 12-15,17,25-26"):
        read_layers(text)


def test_a_boundary_is_a_pair() -> None:
    for invalid in (5, "24", (2,), (1, 2, 3), (2.5, 4), (None, 3), (True, 3)):
        with pytest.raises(ValueError, match="boundary must be a pair of whole numbers"):
            check_boundary(invalid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"boundary \(4, 2\) is none: it needs 0 <= start < stop"):
        check_boundary((4, 2))
    assert check_boundary([2, 4]) == Boundary(2, 4)  # type: ignore[arg-type]
