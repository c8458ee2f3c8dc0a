"""The same weights as several types that compute the same function: only the code differs."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import ghostlib as gl

# Settings with which each type computes the same as a Llama. Qwen3 normalises queries and keys, and
# GPT-NeoX subtracts means: no weights make either of them compute the same.
AS_LLAMA: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "granite": {"attention_multiplier": 64**-0.5},
    "smollm3": {"no_rope_layers": [1] * 30, "pad_token_id": None},
    "qwen2": {},  # with biases of zero
}
LAYERS = range(12, 19)
EVERY = pytest.mark.every_type


def rewritten(model: PreTrainedModel, model_type: str) -> PreTrainedModel:
    """``model``, a Llama, as another type."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    names += ("rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    settings = {name: getattr(model.config, name) for name in names}
    config = CONFIG_MAPPING[model_type](**settings | AS_LLAMA[model_type])
    other = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("bias") for name in missing)
    return other


@pytest.mark.embedded
@pytest.mark.parametrize(
    "model_type",
    ["qwen2", *(pytest.param(t, marks=EVERY) for t in AS_LLAMA if t != "qwen2")],
)
def test_another_type_gives_the_same_perplexities(model_type, embedded, wiki) -> None:
    model, _ = embedded
    other = rewritten(model, model_type)
    calibration, held_out = wiki[:2, :256], wiki[2:3, :256]
    for operator in ("ghost", "refit") if model_type == "qwen2" else ("ghost",):
        expected, perplexity = (
            gl.perplexity(
                gl.recover(m, calibration, LAYERS, operator, relative_ridge=1e-3), held_out
            )
            for m in (model, other)
        )
        assert perplexity == pytest.approx(expected, rel=1e-3)
    assert gl.perplexity(other, held_out) == pytest.approx(gl.perplexity(model, held_out), rel=1e-5)
