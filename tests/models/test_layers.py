"""Measured properties of layers: projections, writers, norms; and layers that are refused."""

import pytest
import torch
from conftest import LAYERS, WIDTH, tiny_model, tiny_windows
from contract import build
from torch import nn

from ghostlib.models import layers
from ghostlib.models.architectures import decoder_layers, receiver
from ghostlib.models.streams import record

PROJECTIONS = {
    "llama": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "phi3": "mlp.down_proj",
}


@pytest.mark.parametrize(("kind", "path"), PROJECTIONS.items())
def test_the_down_projection_writes_last(kind: str, path: str) -> None:
    """A change of its output is a change of the stream."""
    model, ids = tiny_model(kind), tiny_windows(1, 8)
    module = layers.down_projection(model, 2)
    assert module is decoder_layers(model)[2].get_submodule(path)
    assert layers.intermediate_size(model, 2) == 24
    before, nudge = record(model, ids, [3])[3], torch.randn(WIDTH)
    with module.register_forward_hook(lambda m, args, output: output + nudge):
        after = record(model, ids, [3])[3]
    torch.testing.assert_close(after - before, nudge.expand_as(before), rtol=1e-4, atol=1e-5)


def test_a_bias_is_reported() -> None:
    assert layers.has_bias(tiny_model("gpt2"), 0) and not layers.has_bias(tiny_model("llama"), 0)


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
@pytest.mark.parametrize(
    "function", [layers.down_projection, layers.has_bias, layers.intermediate_size]
)
def test_normalised_outputs_cannot_be_folded_into(kind, function) -> None:
    with pytest.raises(ValueError, match=f"layer 2 of this {kind} normalises.*such as ghost"):
        function(tiny_model(kind), 2)


def test_scaled_or_routed_outputs_cannot_be_folded_into() -> None:
    for model in (build("granite", residual_multiplier=0.22), build("mixtral")):
        with pytest.raises(ValueError, match="normalises, scales or routes"):
            layers.down_projection(model, 2)


def test_a_shared_expert_that_every_token_passes_is_a_projection() -> None:
    model = build("deepseek_v3")
    assert layers.facts(model, 3).last == "mlp.shared_experts.down_proj"


def test_writers_are_the_modules_added_to_the_stream() -> None:
    for kind, names in {
        "llama": ["self_attn.o_proj", "mlp.down_proj"],
        "gemma2": ["post_attention_layernorm", "post_feedforward_layernorm"],
        "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    }.items():
        model = tiny_model(kind)
        layer = decoder_layers(model)[1]
        assert layers.writers(model, 1) == [layer.get_submodule(name) for name in names]


def test_a_stream_read_without_a_norm_cannot_be_scaled() -> None:
    model = tiny_model("olmo2")
    with pytest.raises(ValueError, match="reads its stream without a norm"):
        layers.writers(model, 0)
    with pytest.raises(ValueError, match="olmo2 read their stream without a norm"):
        layers.stream_norm(model)


def test_norms_are_classified_by_their_invariance() -> None:
    kinds = {"llama": "rms", "gemma2": "rms", "gpt2": "layer", "opt": "layer"}
    assert {kind: layers.stream_norm(tiny_model(kind)) for kind in kinds} == kinds


def test_embeddings_are_all_tables_that_are_looked_up() -> None:
    model = tiny_model("gpt2")
    assert layers.embeddings(model) == [model.transformer.wte, model.transformer.wpe]
    with pytest.raises(ValueError, match="more than a sum of embeddings"):
        layers.embeddings(build("bloom"))
    with pytest.raises(ValueError, match="no norm with weights after its last layer"):
        layers.embeddings(tiny_model("opt", do_layer_norm_before=False))


@pytest.mark.parametrize(("kind", "offset"), [("llama", 0.0), ("gemma2", 1.0), ("gpt2", 0.0)])
def test_the_offset_of_a_norm_is_that_of_its_architecture(kind: str, offset: float) -> None:
    assert layers.norm_offset(receiver(tiny_model(kind), LAYERS)) == offset


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_scaled_outputs_are_scaled(kind: str) -> None:
    model = tiny_model(kind)
    x = torch.randn(2, 3, WIDTH)
    for module in (receiver(model, LAYERS), model.get_output_embeddings()):
        before = module(x).detach()
        layers.scale_output(module, 3.0)
        torch.testing.assert_close(module(x), 3 * before, rtol=1e-5, atol=1e-5)


def test_offloaded_weights_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match="weights of a Linear are offloaded"):
        layers.scale_output(nn.Linear(2, 2, device="meta"), 2.0)
