"""Hooks see their own thread only, the training mode is restored, invalid windows are refused."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import LAYERS, VOCABULARY, tiny_model, tiny_windows
from contract import build
from torch import Tensor

import ghostlib as gl
from ghostlib.models.architectures import decoder_layers, to_state, to_stream
from ghostlib.models.layers import embeddings
from ghostlib.models.streams import (
    check_windows,
    evaluating,
    known_positions,
    record,
    refusal,
    share,
    tap,
)

GAP = gl.Boundary(1, 4)


@pytest.mark.thorough
def test_threads_that_share_a_model_see_their_own_windows() -> None:
    model = tiny_model("llama")
    windows = [tiny_windows(8, 24, seed=seed) for seed in range(4)]
    alone = [gl.calibrate(model, ids, [GAP])[GAP].G for ids in windows]
    barrier = threading.Barrier(4)

    def calibrated(ids: Tensor) -> Tensor:
        barrier.wait()
        return gl.calibrate(model, ids, [GAP])[GAP].G

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for together, expected in zip(pool.map(calibrated, windows), alone, strict=True):
                assert torch.equal(together, expected)
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(model))


@pytest.mark.thorough
def test_threads_that_share_a_model_are_scored_as_alone() -> None:
    """Gemma 2 caps its logits, so its head is called within a pass of the model."""
    model = tiny_model("gemma2", final_logit_softcapping=5.0)
    windows = [tiny_windows(8, 24, seed=seed) for seed in range(2)]
    alone = [gl.window_losses(model, ids) for ids in windows]
    barrier = threading.Barrier(2)

    def scored(ids: Tensor) -> Tensor:
        barrier.wait()
        return gl.window_losses(model, ids)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(8):
            for together, expected in zip(pool.map(scored, windows), alone, strict=True):
                torch.testing.assert_close(together, expected)


@pytest.mark.thorough
def test_measurements_in_one_thread_do_not_affect_another() -> None:
    model, ids = tiny_model("gpt2"), tiny_windows(4, 24)
    expected = record(model, ids, [1])[1]
    with ThreadPoolExecutor(1) as pool:
        measurements = pool.submit(lambda: [embeddings(model) for _ in range(20)])
        while not measurements.done():
            assert torch.equal(record(model, ids, [1])[1], expected)
        measurements.result()


def test_a_model_in_training_mode_runs_without_dropout_and_is_restored() -> None:
    model, ids = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5), tiny_windows()
    expected = gl.calibrate(model, ids, [GAP])[GAP].G
    loss = gl.perplexity(model, ids)
    model.train()
    decoder_layers(model)[2].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(gl.calibrate(model, ids, [GAP])[GAP].G, expected)
    assert gl.perplexity(model, ids) == loss
    assert [module.training for module in model.modules()] == modes


def test_the_last_pass_to_end_restores_the_training_mode() -> None:
    model = tiny_model("llama").train()
    with evaluating(model):
        with evaluating(model):
            assert not model.training
        assert not model.training
    assert all(module.training for module in model.modules())


def test_an_error_in_a_pass_removes_hooks_and_restores_modes() -> None:
    model = tiny_model("llama").train()
    with pytest.raises(ZeroDivisionError), tap(model, [1], lambda i, x: 1 / 0) as run:  # type: ignore[arg-type, return-value]
        run(input_ids=tiny_windows(1, 4))
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_windows_longer_than_the_positions_of_a_model_are_refused(kind: str) -> None:
    model = tiny_model(kind)
    check_windows(model, tiny_windows(1, 128))
    with pytest.raises(ValueError, match="windows of 129 tokens exceed the 128 positions"):
        gl.calibrate(model, tiny_windows(1, 129), [GAP])


def test_positions_follow_the_configuration() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert known_positions(tiny_model("llama", rope_parameters=rope)) is None
    assert known_positions(build("bloom")) is None
    assert known_positions(tiny_model("llama")) == 128
    roberta = build("roberta")
    longest = known_positions(roberta)
    assert longest == roberta.config.max_position_embeddings - 2
    record(roberta, torch.ones(1, longest, dtype=torch.long) * 5, [1])
    with pytest.raises(ValueError, match=f"exceed the {longest} positions"):
        record(roberta, torch.ones(1, longest + 1, dtype=torch.long) * 5, [1])


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([[1, 2]], r"got \[\[1, 2\]\]"),
        (torch.zeros(3, dtype=torch.long), r"got a Tensor of torch.int64, \(3,\)"),
        (torch.zeros(1, 0, dtype=torch.long), "hold no token"),
        (torch.full((1, 3), VOCABULARY), f"do not fit a vocabulary of {VOCABULARY}"),
        (torch.full((1, 3), -1), "do not fit"),
    ],
)
def test_invalid_windows_are_refused(windows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_windows(tiny_model("llama"), windows)


@pytest.mark.parametrize("layout", ["btc", "btnc", "nbtc"])
def test_parallel_streams_are_concatenated(layout: str) -> None:
    sizes = {"b": 2, "t": 5, "n": 3, "c": 4}
    state = torch.randn([sizes[axis] for axis in layout])
    stream = to_stream(state, layout)
    assert stream[1, 1, 4 * ("n" in layout) + 1] == state[(1,) * len(layout)]
    assert torch.equal(to_state(stream, state, layout), state)


def test_every_kept_layer_keeps_its_part_of_a_table() -> None:
    model = build("gemma4_text")
    table = model.model.embed_tokens_per_layer
    parts = table.weight.detach().chunk(LAYERS, 1)
    kept = gl.prune(model, [2, 3]).model.embed_tokens_per_layer.weight
    assert torch.equal(kept, torch.cat([parts[i] for i in (0, 1, 4, 5)], 1))
    table.to("meta")._hf_hook = None
    with pytest.raises(ValueError, match=r"table embed_tokens_per_layer, .* is offloaded"):
        gl.prune(model, [2, 3])


def test_parallel_streams_of_another_type_are_refused() -> None:
    model = tiny_model("llama")
    decoder_layers(model)[0].register_forward_hook(lambda m, args, output: output.unsqueeze(2))
    with pytest.raises(ValueError, match=r"layer 1 of a llama receives \(1, 4, 1, 16\), no stream"):
        record(model, tiny_windows(1, 4), [1])


def test_a_layer_that_text_skips_has_the_stream_of_the_next_one() -> None:
    streams = record(build("mllama"), tiny_windows(1, 8), range(LAYERS))
    assert torch.equal(streams[3], streams[4]) and not torch.equal(streams[2], streams[3])


def test_refusals_name_the_difference() -> None:
    assert refusal(tiny_model("llama"), [0, 3]) == ""
    differential = build("diffllama")
    assert "self_attn.lambda_init" in refusal(differential, [2])
    assert refusal(differential, [LAYERS - 1]) == ""
    assert gl.select_layers(differential, tiny_windows(1, 12), 1, "cosine") == (LAYERS - 1,)
    with pytest.raises(ValueError, match="lambda_init"):
        gl.prune(differential, [2])


def test_a_copy_of_some_layers_shares_weights_and_no_module(any_tiny):
    config, layers = any_tiny.config.to_json_string(), decoder_layers(any_tiny)
    part = share(any_tiny, [1, 3])
    assert not {*part.modules()} & {*any_tiny.modules()}
    for copied, layer in zip(decoder_layers(part), (layers[1], layers[3]), strict=True):
        assert [*map(id, copied.parameters())] == [*map(id, layer.parameters())]
    assert len(layers) == LAYERS
    assert any_tiny.config.to_json_string() == config
