"""The paper's numbers: complete, with sources, and unknown names are refused."""

import pytest

from ghostlib.plotting import color
from ghostlib.tutorial.paper import main_table, published


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


def test_unknown_columns_and_values_are_named() -> None:
    with pytest.raises(ValueError, match="no column 'layers': use one of source, section, model"):
        published(layers=7)
    with pytest.raises(ValueError, match=r"model = 'SmolLM2' here: there is LLaMA-3-8B, Llama-3"):
        published(model="SmolLM2")


def test_a_column_of_the_main_tables_names_its_model() -> None:
    accuracy, perplexity = "accuracy mean of 9 tasks %", "perplexity mean of WikiText-2 PTB C4"
    values, label = main_table(perplexity, model="smollm2", criterion="residual", removed=3)
    assert label == "Llama-3.1-8B, 7 of 32, cosine"
    assert (values["pruned"], len(values)) == (2398.41, 6)
    values, label = main_table(accuracy, model="meta-llama/Meta-Llama-3-8B", removed=11)
    assert (label, len(values)) == ("LLaMA-3-8B, 11 of 32, cosine", 4)
    values, label = main_table(perplexity, criterion="block-influence")
    assert label == "Llama-3.1-8B, 7 of 32, block-influence" and "dense" in values
    # some depths have numbers of the other criterion only
    assert main_table(perplexity, criterion="block-influence", removed=11) == (values, label)
    assert main_table(perplexity, model="DeepSeek-R1-Distill-Llama-8B")[0] == {}
