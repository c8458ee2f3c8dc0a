"""Objects other than plain causal language models: one line that says what to pass instead."""

from typing import Any, ClassVar

import pytest
import torch
from conftest import LAYERS, tiny_model, tiny_windows
from contract import build
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    CLIPVisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

import ghostlib as gl
from ghostlib.models.architectures import (
    REFUSED,
    check_model,
    decoder_layers,
    receiver,
    structure,
)

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


def parallel() -> Any:
    return nn.DataParallel(tiny_model("llama"))


def compiled() -> Any:
    return torch.compile(tiny_model("llama"))


class FullyShardedDataParallel(nn.Module):
    """With the name of FSDP's wrapper, which needs a group of processes."""


class DistributedDataParallel(nn.Module):
    """With the name of DDP's wrapper, which needs a group of processes."""


class UNet2DConditionModel(nn.Module):
    """With the name of a diffusion model of diffusers."""


class FSDPModule:
    """With the name of the base class that fully_shard adds to a model."""


def fully_sharded() -> Any:
    model = tiny_model("llama")
    model.__class__ = type("FSDPLlamaForCausalLM", (FSDPModule, type(model)), {})
    return model


class PeftModel(nn.Module):
    """With the attributes by which PEFT's wrapper is recognised."""

    peft_config: ClassVar[dict[str, Any]] = {}

    def merge_and_unload(self) -> None: ...


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (encoder, "BertForMaskedLM is an encoder, .*set is_decoder=True"),
        (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
        (vision, "CLIPVisionModel has no language-model head"),
        (headless, "LlamaModel has no language-model head: load it with AutoModelForCausalLM"),
        (lambda: nn.Linear(2, 2), "a causal language model of transformers is needed, got Linear"),
        (lambda: "gpt2", "a causal language model of transformers is needed, got 'gpt2'"),
        (parallel, "wrapped in DataParallel: pass model.module"),
        (DistributedDataParallel, "wrapped in DistributedDataParallel: pass model.module"),
        (FullyShardedDataParallel, "wrapped in FullyShardedDataParallel: pass model.module"),
        (fully_sharded, "FSDPLlamaForCausalLM are spread over processes by fully_shard: load it"),
        (UNet2DConditionModel, "model of transformers is needed, got UNet2DConditionModel"),
        (compiled, "compiled: pass the one given to torch.compile"),
        (PeftModel, r"PeftModel of PEFT, .*pass model.merge_and_unload\(\)"),
    ],
)
def test_each_is_refused_with_a_suggestion(make: Any, message: str) -> None:
    model = make()
    for use in (
        lambda: structure(model),
        lambda: gl.prune(model, [1]),
        lambda: gl.calibrate(model, tiny_windows(), [(0, 1)]),
        lambda: gl.select_layers(model, tiny_windows(), 1),
    ):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


def test_decoders_of_encoder_types_are_accepted() -> None:
    check_model(build("bert"))


@pytest.mark.parametrize("kind", ["hrm_text", "xlm", "reformer"])
def test_types_without_a_single_stream_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} .*: its layers cannot be removed"):
        gl.prune(build(kind), [1])
    assert kind in REFUSED


def test_a_norm_that_is_applied_twice_keeps_the_last_layer() -> None:
    model = build("nanochat")
    with pytest.raises(ValueError, match=f"keep layer {LAYERS - 1}"):
        receiver(model, LAYERS)
    assert len(gl.prune(model, [1, 2]).model.layers) == LAYERS - 2


class NovelConfig(PretrainedConfig):
    """Of remote code, with other names than transformers."""

    model_type = "novel"

    def __init__(self, breadth: int = 16, depth: int = LAYERS, words: int = 97, **rest: Any):
        self.breadth, self.depth, self.words = breadth, depth, words
        super().__init__(**rest)


class Page(nn.Module):
    def __init__(self, breadth: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(breadth)
        self.up, self.down = nn.Linear(breadth, 24), nn.Linear(24, breadth)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(self.up(self.ln(x)).relu())


class Novel(PreTrainedModel):
    config_class = NovelConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dictionary = nn.Embedding(config.words, config.breadth)
        self.pages = nn.ModuleList(Page(config.breadth) for _ in range(config.depth))
        self.last_norm = nn.LayerNorm(config.breadth)
        self.voice = nn.Linear(config.breadth, config.words)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.dictionary

    def get_output_embeddings(self) -> nn.Module:
        return self.voice

    def forward(self, input_ids: Tensor, **rest: Any) -> CausalLMOutput:
        x = self.dictionary(input_ids)
        for page in self.pages:
            x = page(x)
        return CausalLMOutput(logits=self.voice(self.last_norm(x)))


def test_remote_code_with_names_of_its_own_is_found_by_structure() -> None:
    model, ids = Novel(NovelConfig()).eval(), tiny_windows()
    assert structure(model)[:2] == ("pages", "last_norm")
    refitted = gl.recover(model, ids, [2, 3], "refit", relative_ridge=1e-3)
    assert refitted.config.depth == LAYERS - 2 == len(refitted.pages)
    assert gl.perplexity(refitted, ids) < gl.perplexity(gl.prune(model, [2, 3]), ids) * 1.01
    with pytest.raises(ValueError, match=r"a novel is made by code .*register its classes with"):
        gl.recover(model, ids, [2, 3], "ghost", relative_ridge=1e-3)


class Int8Linear(nn.Module):
    """A linear map with 8-bit weights, as in quantisation libraries."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().char(), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).mT


def test_a_quantised_model_is_repaired_at_the_gap_and_not_in_its_weights() -> None:
    model, ids = tiny_model("llama"), tiny_windows()
    for holder in [m for layer in decoder_layers(model) for m in layer.modules()]:
        for name, child in list(holder.named_children()):
            if isinstance(child, nn.Linear):
                setattr(holder, name, Int8Linear(child))
    repaired = gl.recover(model, ids, [2, 3], "ghost", relative_ridge=1e-3)
    assert len(decoder_layers(repaired)) == LAYERS - 2
    with pytest.raises(ValueError, match=r"are quantised and .*or use an operator at the gap"):
        gl.recover(model, ids, [2, 3], "refit")


def test_a_model_that_halves_its_stream_is_refused_with_the_setting_to_load_with() -> None:
    with pytest.raises(ValueError, match="before it is loaded with rescale_every=0"):
        structure(build("rwkv", rescale_every=6))
