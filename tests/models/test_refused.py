"""What is no plain causal language model: one line that says what it is and what to pass."""

from typing import Any, ClassVar

import pytest
import torch
from conftest import LAYERS, tiny_model, tiny_windows
from contract import build
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    CLIPVisionConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import ghostlib as gl
from ghostlib.models.architectures import REFUSED, check_model, receiver, structure

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def encoder() -> Any:
    return AutoModelForMaskedLM.from_config(BertConfig(vocab_size=97, **SMALL))


def encoder_decoder() -> Any:
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration(config)


def vision() -> Any:
    return AutoModel.from_config(CLIPVisionConfig(image_size=8, patch_size=4, **SMALL))


def headless() -> Any:
    return AutoModel.from_config(tiny_model("llama").config)


class PeftModel(nn.Module):
    """With what PEFT's wrapper is known by."""

    peft_config: ClassVar[dict[str, Any]] = {}

    def merge_and_unload(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (encoder, "BertForMaskedLM is an encoder, .*set is_decoder=True"),
        (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
        (vision, "CLIPVisionModel has no language-model head"),
        (headless, "LlamaModel has no language-model head: load it with AutoModelForCausalLM"),
        (lambda: nn.Linear(2, 2), "a causal language model of transformers is needed, got Linear"),
        (lambda: "gpt2", "a causal language model of transformers is needed, got 'gpt2'"),
        (
            lambda: nn.DataParallel(tiny_model("llama")),
            "wrapped in DataParallel: pass model.module",
        ),
        (
            lambda: torch.compile(tiny_model("llama")),
            "compiled: pass the one given to torch.compile",
        ),
        (PeftModel, r"PeftModel of PEFT, .*pass model.merge_and_unload\(\)"),
    ],
)
def test_each_is_named_with_what_to_pass_instead(make: Any, message: str) -> None:
    model = make()
    for use in (
        lambda: structure(model),
        lambda: gl.prune(model, [1]),
        lambda: gl.calibrate(model, tiny_windows(), [(0, 1)]),
        lambda: gl.select_layers(model, tiny_windows(), 1),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            use()
        assert "\n" not in str(refused.value)


def test_decoders_of_encoder_types_are_accepted() -> None:
    check_model(build("bert"))


@pytest.mark.parametrize("kind", ["hrm_text", "xlm", "reformer"])
def test_types_whose_layers_pass_on_no_single_stream_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} .*: its layers cannot be removed"):
        gl.prune(build(kind), [1])
    assert kind in REFUSED


def test_a_norm_that_stands_elsewhere_too_keeps_the_last_layer() -> None:
    model = build("nanochat")
    with pytest.raises(ValueError, match=f"keep layer {LAYERS - 1}"):
        receiver(model, LAYERS)
    assert len(gl.prune(model, [1, 2]).model.layers) == LAYERS - 2


class Renamed(nn.Module):
    """A decoder as remote code may write one: its names are its own."""

    def __init__(self, stack: nn.ModuleList, final: nn.Module) -> None:
        super().__init__()
        self.stack, self.final = stack, final


def test_a_model_with_names_of_its_own_is_found_by_structure() -> None:
    model: PreTrainedModel = tiny_model("llama")
    model.model.inner = Renamed(model.model.layers, model.model.norm)
    del model.model.layers, model.model.norm
    found = structure(model)
    assert (found.layers, found.receiver) == ("model.inner.stack", "model.inner.final")
