"""Perplexity against the model's own loss, and the helpers around it."""

import copy
import math

import pytest
import torch
from conftest import VOCABULARY, tiny_model, tiny_windows

import ghostlib as gl


def test_losses_equal_the_models_own(any_tiny):
    """Chunked head, soft-capping included, against transformers' own causal-LM loss."""
    ids = tiny_windows(3, 15)
    with torch.no_grad():
        expected = [float(any_tiny(w[None], labels=w[None]).loss) for w in ids]
    losses = gl.window_losses(any_tiny, ids, batch_size=2)
    torch.testing.assert_close(
        losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    assert gl.perplexity(any_tiny, ids) == pytest.approx(math.exp(sum(expected) / 3), rel=1e-4)


def test_long_windows_go_through_the_head_in_chunks():
    model = tiny_model("llama", max_position_embeddings=1024)
    ids = tiny_windows(1, 600)
    widest = 0

    def hook(module, args):
        nonlocal widest
        widest = max(widest, args[0].shape[0])

    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    handle = model.lm_head.register_forward_pre_hook(hook)
    losses = gl.window_losses(model, ids)
    handle.remove()
    assert float(losses[0]) == pytest.approx(expected, rel=1e-5)
    assert widest <= 599


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert gl.perplexity(model, tiny_windows()) == pytest.approx(VOCABULARY, rel=1e-6)


def test_bad_windows_are_named():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="length of at least 2"):
        gl.perplexity(model, tiny_windows(2, 1))
    with pytest.raises(ValueError, match="vocabulary of 97"):
        gl.perplexity(model, torch.full((1, 5), 200))


def test_gap_closed():
    assert gl.gap_closed(10, 40, 10) == pytest.approx(1)
    assert gl.gap_closed(10, 40, 40) == pytest.approx(0)
    assert gl.gap_closed(10, 40, 20) == pytest.approx(0.5)
    assert gl.gap_closed(10, 40, 80) < 0
    with pytest.raises(ValueError, match="no gap to close"):
        gl.gap_closed(10, 10, 12)


def test_generation_of_prompts_with_different_lengths(embedded):
    model, tokenizer = embedded
    prompts = ["Water boils at", "The capital of France is the city of"]
    together = gl.generate(model, tokenizer, prompts, max_new_tokens=6)
    alone = [gl.generate(model, tokenizer, p, max_new_tokens=6)[0] for p in prompts]
    assert together == alone
    assert "Paris" in together[1]


def test_a_tokenizer_without_padding_gets_its_end_token(embedded):
    model, tokenizer = embedded
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert len(gl.generate(model, bare, ["One", "Two and three"], max_new_tokens=2)) == 2
    assert bare.pad_token is None  # the caller's tokenizer is left as it was
