"""What is found in a model is shown from its configuration alone."""

import pytest
import torch
from conftest import LAYERS, VOCABULARY, WIDTH, tiny_model, tiny_windows
from contract import build
from transformers import CONFIG_MAPPING, BertConfig

import ghostlib as gl
from ghostlib.models.architectures import EXCEPTIONS, Structure, decoder_layers, structure


@pytest.mark.thorough
def test_a_configuration_tells_the_same_as_the_model() -> None:
    model = tiny_model("gemma3_text")
    found = gl.inspect(model.config)
    assert (found.type, found.width, found.vocabulary) == ("gemma3_text", WIDTH, VOCABULARY)
    assert found.kinds == ("sliding_attention", "full_attention") * (LAYERS // 2)
    counted = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    assert list(found.parameters) == counted
    assert found.other + sum(counted) == gl.count_parameters(model)
    assert found.cache == (2 * 2 * 4,) * LAYERS  # keys and values of two heads of four
    assert found.fixed == {} and gl.inspect(model) == found


@pytest.mark.thorough
def test_repairs_that_do_not_fit_say_why() -> None:
    found = gl.inspect(tiny_model("gemma2").config).families
    assert found["ghost"] == found["magnitude"] == ""
    assert "normalises" in found["refit"]
    post_norm = gl.inspect(tiny_model("olmo2").config).families
    assert (
        "without a norm" in post_norm["two-branch"] and "without a norm" in post_norm["magnitude"]
    )


@pytest.mark.thorough
@pytest.mark.parametrize("operator", ["ghost", "three-branch-relative", "refit"])
def test_a_recovered_model_says_that_it_is_one(operator: str, tmp_path) -> None:
    recovered = gl.recover(
        tiny_model("llama"), tiny_windows(6, 40), [2, 3], operator, relative_ridge=1e-3
    )
    recovered.save_pretrained(tmp_path / "model")
    found = gl.inspect(tmp_path / "model")
    assert found == gl.inspect(recovered) and found.removed == (2, 3)
    assert (found.type, len(found.kinds), found.cache) == ("llama", 4, (16,) * 4)
    assert list(found.fixed) == [0, 1, 2, 3]
    assert all("start from the dense model" in why for why in found.families.values())
    assert str(found).splitlines()[-1].startswith("layers 2–3 of the dense model are removed: ")


@pytest.mark.thorough
def test_what_the_layers_of_every_kind_keep_of_a_token_is_known() -> None:
    assert gl.inspect(build("mixtral").config).cache == (2 * 2 * 8,) * LAYERS
    hybrid = gl.inspect(build("bamba").config)  # attention in layers 1 and 4, states elsewhere
    assert hybrid.cache is not None and [n > 0 for n in hybrid.cache] == [False, True, False] * 2


def test_options_without_effect_are_named(tmp_path) -> None:
    config = CONFIG_MAPPING["llama"](num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    assert len(gl.inspect(tmp_path, revision="main", num_hidden_layers=3).kinds) == 3
    for given, unused in ((config, "revision, typo"), (tmp_path, "typo")):
        with pytest.raises(ValueError, match=f"^{unused}: no effect"):
            gl.inspect(given, revision="main", typo=3)


def test_layers_that_cannot_go_say_why() -> None:
    found = gl.inspect(build("diffllama"))
    assert list(found.fixed) == list(range(LAYERS - 1))
    assert "lambda_init" in found.fixed[0]


@pytest.mark.thorough
def test_a_table_is_printed() -> None:
    lines = str(gl.inspect(build("jamba").config)).splitlines()
    assert lines[0].startswith("jamba: 6 layers, stream of 32, vocabulary of 97")
    assert any("full_attention" in line for line in lines)
    assert any(line.startswith("repairs that fit: identity, scalar") for line in lines)
    assert any(line.startswith("not on their own: layers") for line in lines)


def test_a_folder_is_read_without_its_weights(tmp_path) -> None:
    config = CONFIG_MAPPING["llama"](num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    assert len(gl.inspect(tmp_path).kinds) == 2
    with pytest.raises(OSError):
        gl.inspect(tmp_path / "none")


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="is an encoder"):
        gl.inspect(BertConfig(num_hidden_layers=2))


def test_a_type_that_needs_help_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING, followed literally."""
    model = tiny_model("llama")
    model.model.before = torch.nn.ModuleList([torch.nn.Linear(500, 500)])
    assert structure(model).layers == "model.before"  # heavier, and as near to the top
    again = tiny_model("llama")
    again.model.before = torch.nn.ModuleList([torch.nn.Linear(500, 500)])
    monkeypatch.setitem(EXCEPTIONS, "llama", Structure("model.layers", "model.norm"))
    assert structure(again)[:2] == ("model.layers", "model.norm")
    assert len(decoder_layers(gl.prune(again, [1, 2]))) == LAYERS - 2
