"""The guard of the check cells of exercises."""

import pytest

from ghostlib.tutorial.exercises import answered


def test_all_answers_given(capsys):
    assert answered(share=0.0, layers=(), name="")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", [None, ...])
def test_missing_answers_are_named(missing, capsys):
    assert not answered(share=missing, layers=(3, 4), name=missing)
    assert capsys.readouterr().out == "Still missing: share, name\n"
