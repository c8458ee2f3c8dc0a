"""Inspection of models and configurations."""

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
    result = gl.inspect(model.config)
    assert (result.type, result.width, result.vocabulary) == ("gemma3_text", WIDTH, VOCABULARY)
    assert result.kinds == ("sliding_attention", "full_attention") * (LAYERS // 2)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    assert list(result.parameters) == counts
    assert result.other + sum(counts) == gl.count_parameters(model)
    assert result.cache == (2 * 2 * 4,) * LAYERS  # keys and values of two heads of width 4
    assert result.fixed == {} and gl.inspect(model) == result


@pytest.mark.thorough
def test_repairs_that_do_not_fit_say_why() -> None:
    families = gl.inspect(tiny_model("gemma2").config).families
    assert families["ghost"] == families["magnitude"] == ""
    assert "normalises" in families["refit"]
    post_norm = gl.inspect(tiny_model("olmo2").config).families
    assert "without a norm" in post_norm["two-branch"]
    assert "without a norm" in post_norm["magnitude"]


@pytest.mark.thorough
@pytest.mark.parametrize("operator", ["ghost", "three-branch-relative", "refit"])
def test_a_recovered_model_says_that_it_is_one(operator: str, tmp_path) -> None:
    recovered = gl.recover(
        tiny_model("llama"), tiny_windows(6, 40), [2, 3], operator, relative_ridge=1e-3
    )
    recovered.save_pretrained(tmp_path / "model")
    result = gl.inspect(tmp_path / "model")
    assert result == gl.inspect(recovered) and result.removed == (2, 3)
    assert (result.type, len(result.kinds), result.cache) == ("llama", 4, (16,) * 4)
    assert list(result.fixed) == [0, 1, 2, 3]
    assert all("start from the dense model" in why for why in result.families.values())
    assert str(result).splitlines()[-1].startswith("layers 2–3 of the dense model are removed: ")


@pytest.mark.thorough
def test_the_cache_of_every_kind_of_layer_is_counted() -> None:
    assert gl.inspect(build("mixtral").config).cache == (2 * 2 * 8,) * LAYERS
    hybrid = gl.inspect(build("bamba").config)  # attention in layers 1 and 4, states elsewhere
    assert hybrid.cache is not None and [n > 0 for n in hybrid.cache] == [False, True, False] * 2


def test_options_without_effect_are_named(tmp_path) -> None:
    config = CONFIG_MAPPING["llama"](num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    assert len(gl.inspect(tmp_path, revision="main", num_hidden_layers=3).kinds) == 3
    for model, unused in ((config, "revision, typo"), (tmp_path, "typo")):
        with pytest.raises(ValueError, match=f"^{unused}: no effect"):
            gl.inspect(model, revision="main", typo=3)


def test_layers_that_cannot_go_say_why() -> None:
    fixed = gl.inspect(build("diffllama")).fixed
    assert list(fixed) == list(range(LAYERS - 1))
    assert "lambda_init" in fixed[0]


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
    without, model = tiny_model("llama"), tiny_model("llama")
    for each in (without, model):
        each.model.before = torch.nn.ModuleList([torch.nn.Linear(500, 500)])
    assert structure(without).layers == "model.before"  # heavier, and as near to the top
    monkeypatch.setitem(EXCEPTIONS, "llama", Structure("model.layers", "model.norm"))
    assert structure(model)[:2] == ("model.layers", "model.norm")
    assert len(decoder_layers(gl.prune(model, [1, 2]))) == LAYERS - 2
