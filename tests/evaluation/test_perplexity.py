"""Perplexity against the model's own loss, and the helpers around it."""

import math

import pytest
import torch
from conftest import VOCABULARY, tiny_model, tiny_windows

import ghostlib as gl
from ghostlib.evaluation.perplexity import ScoredText


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
    chunks = []
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    model.lm_head.register_forward_pre_hook(lambda _, args: chunks.append(len(args[0])))
    assert float(gl.window_losses(model, ids)) == pytest.approx(expected, rel=1e-5)
    assert chunks[-3:] == [256, 256, 87]


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert gl.perplexity(model, tiny_windows()) == pytest.approx(VOCABULARY, rel=1e-6)


def test_a_perplexity_beyond_float64_is_infinite():
    model, ids = tiny_model("llama"), tiny_windows()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    losses = gl.window_losses(model, ids)
    assert losses.mean() > 710 and gl.perplexity(model, ids) == math.inf
    text = ScoredText("text", "test", ids, None, None, [])
    assert text.perplexity(losses).perplexity == math.inf


def test_gap_closed():
    assert gl.gap_closed(10, 40, 10) == pytest.approx(1)
    assert gl.gap_closed(10, 40, 40) == pytest.approx(0)
    assert gl.gap_closed(10, 40, 20) == pytest.approx(0.5)
    assert gl.gap_closed(10, 40, 80) < 0
    with pytest.raises(ValueError, match="no gap to close"):
        gl.gap_closed(10, 10, 12)


def test_a_model_in_training_mode_is_scored_without_dropout():
    model, ids = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5), tiny_windows()
    expected = gl.window_losses(model.eval(), ids)
    model.train()
    model.transformer.h[0].eval()  # a part that is frozen stays so
    assert torch.equal(gl.window_losses(model, ids), expected)
    assert gl.perplexity(model, ids) == pytest.approx(math.exp(float(expected.mean())))
    first, second = model.transformer.h[:2]
    assert model.training and not first.training and second.training
    with pytest.raises(ValueError, match="vocabulary"):
        gl.perplexity(model, ids + 1000)
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = value
    ids = tiny_windows(3, 12).clamp(min=6)
    assert gl.perplexity(model, ids) > 1
    ids[1, 3] = 5
    for score in (gl.window_losses, gl.perplexity):
        with pytest.raises(ValueError, match=r"the loss of window 1 is nan; .* in float32"):
            score(model, ids, batch_size=2)
