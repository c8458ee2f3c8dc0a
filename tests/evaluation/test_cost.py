"""Counts against an independent counter and real tensors; the stopwatch against a fake clock."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import LAYERS, WIDTH, tiny_model, tiny_windows
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

import ghostlib as gl
from ghostlib.evaluation import cost
from ghostlib.evaluation.cost import Flops, Latency, Spread

TOKENS, BATCH = 16, 2  # longer than the tiny models' sliding window of 8


def forward_counted(
    model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache, **options: Any
) -> int:
    """FLOPs of a forward pass that extends ``cache``, counted by PyTorch at every product."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=True, **{name: cache}, **options)
    return counter.get_total_flops()


def variants(dense: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """A dense model, pruned and recovered at two gaps; attention written out as plain products."""
    stats = gl.calibrate(dense, tiny_windows(), [(1, 3), (4, 5)])
    models = {"dense": dense, "pruned": gl.prune(dense, [1, 2, 4])}
    models["ghost"] = gl.recover(dense, stats, [1, 2, 4])
    models["linearpatch-r"] = gl.recover(dense, stats, [1, 2, 4], operator="linearpatch-r")
    for model in models.values():
        model.set_attn_implementation("eager")  # the counter does not look into fused kernels
    return models


def test_flops_and_cache_are_what_pytorch_counts_and_keeps(any_tiny):
    for model in variants(any_tiny).values():
        ids, cache = tiny_windows(BATCH, TOKENS), DynamicCache(config=model.config)
        counted = forward_counted(model, ids, cache)
        assert gl.flops(model, TOKENS, batch_size=BATCH, logits=TOKENS).total == counted
        held = sum(kept.nbytes for layer in cache.layers for kept in (layer.keys, layer.values))
        assert gl.cache_bytes(model, TOKENS, batch_size=BATCH) == held
        counted = forward_counted(model, ids[:, :1], cache, logits_to_keep=1)
        assert gl.flops(model, 1, context=TOKENS, batch_size=BATCH).total == counted


def test_a_boundary_costs_its_matrix_and_both_operators_cost_the_same(any_tiny):
    counts = {name: gl.flops(model, TOKENS) for name, model in variants(any_tiny).items()}
    assert counts["dense"].boundary == counts["pruned"].boundary == 0
    assert counts["ghost"].boundary == 2 * 2 * WIDTH**2 * TOKENS  # two gaps, a multiply-add each
    assert counts["ghost"] == counts["linearpatch-r"]
    assert counts["ghost"]._replace(boundary=0) == counts["pruned"]
    for part in ("attention", "mlp"):
        whole, kept = getattr(counts["dense"], part), getattr(counts["pruned"], part)
        assert kept * LAYERS == whole * (LAYERS - 3)


def test_flops_by_hand():
    model = tiny_model("llama")  # 4 heads of 4, 2 of them with keys; width 16, 24 inside, 97 words
    projections, pairs = 2 * 16 * 16 + 2 * 16 * 8, 2 * 4 * 4 * TOKENS
    assert gl.flops(model, TOKENS) == Flops(
        attention=2 * TOKENS * LAYERS * (projections + pairs),
        mlp=2 * TOKENS * LAYERS * 3 * 16 * 24,
        boundary=0,
        head=2 * 16 * 97,
    )
    assert gl.flops(model, TOKENS, logits=0).head == 0


def test_projections_outside_the_layers_are_counted():
    """OPT may embed its words in another width than its stream's."""
    model = tiny_model("opt", word_embed_proj_dim=8)
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    counted = forward_counted(model, tiny_windows(1, TOKENS), cache)
    assert gl.flops(model, TOKENS, logits=TOKENS).total == counted


def test_nothing_but_shapes_is_needed():
    with torch.device("meta"):
        model = tiny_model("llama")
    real = tiny_model("llama")
    for count in (gl.count_parameters, gl.weight_bytes):
        assert count(model) == count(real)
    assert gl.flops(model, TOKENS) == gl.flops(real, TOKENS)
    assert gl.cache_bytes(model, TOKENS) == gl.cache_bytes(real, TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_as_large_as_the_file(any_tiny, dtype, tmp_path):
    model = any_tiny.to(dtype)
    model.save_pretrained(tmp_path)
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert gl.weight_bytes(model) == (tmp_path / "model.safetensors").stat().st_size - header
    assert gl.count_parameters(model) * dtype.itemsize == gl.weight_bytes(model)
    full = gl.cache_bytes(any_tiny, TOKENS)
    assert full == gl.cache_bytes(any_tiny, TOKENS, batch_size=3) / 3 > 0


def test_a_sliding_window_bounds_the_cache():
    sliding = tiny_model("mistral")
    assert gl.cache_bytes(sliding, 7) == gl.cache_bytes(sliding, 100) > gl.cache_bytes(sliding, 6)
    assert gl.cache_bytes(sliding, 0) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: gl.flops(m, 0), "tokens must be at least 1, got 0"),
        (lambda m: gl.flops(m, 1, context=-1), "context must be at least 0, got -1"),
        (lambda m: gl.flops(m, 1, logits=-1), "logits must be at least 0, got -1"),
        (lambda m: gl.flops(m, 1, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda m: gl.cache_bytes(m, -1), "tokens must be at least 0, got -1"),
        (lambda m: gl.cache_bytes(m, 1, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda m: gl.latency({}), "no model to time"),
        (lambda m: gl.latency({"a": m}, 0), "prompt_tokens must be at least 1, got 0"),
        (lambda m: gl.latency({"a": m}, 4, 0), "new_tokens must be at least 1, got 0"),
        (lambda m: gl.latency({"a": m}, 4, repeats=0), "repeats must be at least 1, got 0"),
        (lambda m: gl.latency({"a": m}, 4, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda m: gl.latency({"a": m}, 4, warmup=-1), "warmup must be at least 0, got -1"),
        (lambda m: gl.latency({"a": m}, 120, 9), "120 . 9 tokens exceed the 128 positions of 'a'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model("llama"))


def test_latency_of_every_architecture(any_tiny):
    models = variants(any_tiny)
    before = {name: value.clone() for name, value in any_tiny.state_dict().items()}
    found = gl.latency(models, 12, 3, warmup=0, repeats=2)
    assert list(found) == list(models)
    for taken in found.values():
        assert taken.peak_bytes is None
        for spread in (taken.prefill, taken.decode):
            assert 0 < spread.least <= spread.median <= spread.most
    assert all(torch.equal(before[name], value) for name, value in any_tiny.state_dict().items())


def test_models_take_turns_and_warm_up_rounds_are_left_out(monkeypatch):
    rounds = iter(range(100))
    calls: list[object] = []

    def measure(model: object, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float, int]:
        calls.append(model)
        assert prompt.shape == (2, 7) and new_tokens == 3
        number = next(rounds)
        return float(number), number / 10, number

    monkeypatch.setattr(cost, "_measure", measure)
    a, b = tiny_model("llama"), tiny_model("gpt2")
    found = gl.latency({"a": a, "b": b}, 7, 3, batch_size=2, warmup=2, repeats=3)
    assert calls == [a, b] * 5
    assert found["a"] == Latency(Spread(6.0, 4.0, 8.0), Spread(0.6, 0.4, 0.8), 8)
    assert found["b"].prefill == Spread(7.0, 5.0, 9.0)


def test_the_clock_is_read_when_the_device_has_finished(monkeypatch):
    """On a device that works behind the program's back, with a clock that counts its own ticks."""
    log: list[str] = []
    times = iter((10.0, 12.0, 18.0))
    device = torch.device("cuda", 0)

    class Model:
        config, device = SimpleNamespace(), torch.device("cpu")

        def parameters(self):
            return [SimpleNamespace(device=d) for d in (torch.device("cpu"), device, device)]

        def forward(self, ids, past_key_values, use_cache, logits_to_keep):
            assert use_cache and logits_to_keep == 1 and past_key_values == "kept"
            log.append(f"{ids.shape[1]} tokens")
            return SimpleNamespace(logits=torch.zeros(1, 1, 5))

        __call__ = forward

    def clock() -> float:
        log.append("clock")
        return next(times)

    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(cost, "DynamicCache", lambda config: "kept")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda d: log.append(f"wait {d}"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 1700)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: log.append("reset"))
    taken = cost._measure(Model(), torch.zeros(1, 9, dtype=torch.long), 3)  # type: ignore[arg-type]
    assert taken == (2.0, 2.0, 700)
    wait = "wait cuda:0"
    one = ["1 tokens"] * 3
    assert log == [wait, "reset", "clock", "9 tokens", wait, "clock", *one, wait, "clock"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_a_gpu():
    model = tiny_model("llama").to("cuda")
    peak = gl.latency({"a": model}, 64, 4, warmup=1, repeats=1)["a"].peak_bytes
    assert peak is not None and peak >= gl.cache_bytes(model, 64)
