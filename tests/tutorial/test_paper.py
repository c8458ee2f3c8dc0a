"""The paper's numbers: complete, sourced, and refused by name where there is none."""

import pytest

from ghostlib.plotting import color
from ghostlib.tutorial.paper import published


def test_every_number_has_its_source_and_a_known_operator() -> None:
    rows = published()
    assert len(rows) > 40 and not rows.drop(columns="value").map(lambda x: x == "").any().any()
    assert set(rows["source"]) == {
        "official repository README",
        "reading note of arXiv v2 (second hand)",
    }
    assert rows["value"].gt(0).all() and rows["removed"].between(0, rows["of"]).all()
    for operator in set(rows["operator"]):
        assert color(operator).startswith("#")


def test_rows_are_filtered() -> None:
    rows = published(metric="prefill ms", operator=["dense", "ghost"])
    assert rows["value"].tolist() == [362.6, 291.9, 247.6]
    assert published(removed=[7, 11])["removed"].isin([7, 11]).all()
    assert published(operator="pruned", section="Table 3")["value"].tolist() == [2398.41]


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="no column 'layers': use one of source, section, model"):
        published(layers=7)
    with pytest.raises(ValueError, match=r"model = 'SmolLM2' here: there is LLaMA-3-8B, Llama-3"):
        published(model="SmolLM2")
