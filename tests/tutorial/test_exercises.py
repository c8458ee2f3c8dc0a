"""What the check cells of exercises ask first."""

import pytest

from ghostlib.tutorial.exercises import answered


def test_all_there(capsys):
    assert answered(share=0.0, layers=(), name="")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("nothing", [None, ...])
def test_what_is_missing_is_named(nothing, capsys):
    assert not answered(share=nothing, layers=(3, 4), name=nothing)
    assert capsys.readouterr().out == "Still missing: share, name\n"
