"""Structure, streams and removal of layers on the tiny architectures; loading."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from conftest import LAYERS, VOCABULARY, WIDTH, tiny_model, tiny_tokenizer, tiny_windows

import ghostlib as gl
from ghostlib.models import architectures as models
from ghostlib.models import streams
from ghostlib.recovery.plan import plan


def test_adapter_contract(any_tiny):
    """Layers, width, receivers, head and final hidden states."""
    model, ids = any_tiny, tiny_windows(2, 12)
    assert models.num_layers(model) == LAYERS == model.config.num_hidden_layers
    assert models.hidden_size(model) == WIDTH
    calls = []
    with torch.no_grad(), ExitStack() as stack:
        for index in range(LAYERS + 1):
            hook = partial(lambda i, module, args: calls.append((i, args[0].shape)), index)
            stack.enter_context(models.receiver(model, index).register_forward_pre_hook(hook))
        logits = model(ids, use_cache=False).logits
    # Every receiver is called once, in order, with the stream as its first argument.
    assert calls == [(index, (2, 12, WIDTH)) for index in range(LAYERS + 1)]
    with torch.no_grad():
        torch.testing.assert_close(streams.head(model, streams.final_hidden(model, ids)), logits)
    assert logits.shape[-1] == VOCABULARY


def test_receivers_compute_the_residual_update(any_tiny):
    """Overwriting a receiver's input changes the output: it is the stream, not a copy."""
    ids = tiny_windows(1, 8)
    with torch.no_grad():
        before = any_tiny(ids).logits
        for index in (0, 3, LAYERS):
            with models.receiver(any_tiny, index).register_forward_pre_hook(
                lambda module, args: (torch.zeros_like(args[0]), *args[1:])
            ):
                assert not torch.allclose(any_tiny(ids).logits, before)


def test_keep_layers_makes_everything_agree(any_tiny):
    kept = [0, 2, 5]
    layer_types = getattr(any_tiny.config, "layer_types", None)
    originals = [models.decoder_layers(any_tiny)[index] for index in kept]
    models.keep_layers(any_tiny, kept, any_tiny)
    assert list(models.decoder_layers(any_tiny)) == originals
    assert any_tiny.config.num_hidden_layers == 3
    if layer_types is not None:
        assert any_tiny.config.layer_types == [layer_types[index] for index in kept]
    for position, layer in enumerate(models.decoder_layers(any_tiny)):
        indices = {m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")}
        assert indices == {position}


def test_layers_that_compute_with_their_number_cannot_be_renumbered():
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=r"h\.2\.attn\.scaling: 0\.1, not 0\.16"):
        gl.prune(model, [2, 3])
    assert len(models.decoder_layers(gl.prune(model, [LAYERS - 1]))) == LAYERS - 1


def test_the_head_of_a_model_without_a_final_norm_receives_its_last_stream():
    model = tiny_model("opt", do_layer_norm_before=False)
    assert models.receiver(model, LAYERS) is model.get_output_embeddings()


def test_fingerprints_are_equal_for_copies_only():
    fingerprint, same, other = (
        models.fingerprint(tiny_model("llama", seed=seed)) for seed in (0, 0, 1)
    )
    assert fingerprint == same != other
    assert fingerprint.startswith(f"llama-{LAYERS}x{WIDTH}-")


def test_final_hidden_removes_its_hook_after_an_error():
    model = tiny_model("llama")
    with pytest.raises((IndexError, RuntimeError)):
        streams.final_hidden(model, torch.full((1, 4), VOCABULARY + 5))
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_that_bypasses_its_head_is_reported(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(model, "forward", lambda **inputs: None)
    with pytest.raises(RuntimeError, match="never called its output embeddings"):
        streams.final_hidden(model, tiny_windows(1, 4))


def test_load_model_reads_a_folder_in_the_requested_dtype(tmp_path, embedded):
    _, tokenizer = embedded
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = gl.load_model(tmp_path)
    assert model.dtype == torch.float32 and not model.training
    assert loaded("A test.")["input_ids"] == tokenizer("A test.")["input_ids"]
    half, _ = gl.load_model(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16


@pytest.mark.thorough
def test_a_model_is_found_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    gl.save(tiny_model("llama", vocab_size=300), "~/model", tiny_tokenizer())
    assert type(gl.load_model("~/model")[0]).__name__ == "LlamaForCausalLM"
    assert gl.inspect("~/model").vocabulary == 300
    assert plan("~/model", n=2, length=8).download == 0
    with pytest.raises(FileNotFoundError, match="no such model folder: ~/other"):
        gl.load_model("~/other")


def test_load_model_names_a_missing_folder():
    with pytest.raises(OSError, match="no-such-folder"):
        gl.load_model("./no-such-folder")


def test_embedded_model_is_a_plain_float32_llama(embedded):
    model, tokenizer = embedded
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32 and not model.training
    assert (models.num_layers(model), models.hidden_size(model)) == (30, 576)
    assert not hasattr(model.config, "quantization_config")
    text = "The capital of France is Paris."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
