"""Counts against a real pass, real tensors and closed forms; times against known delays."""

import inspect
import math
import time
from collections import defaultdict
from typing import Any

import pytest
import torch
from conftest import LAYERS, WIDTH, tiny_model, tiny_windows
from contract import build
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

import ghostlib as gl
from ghostlib.evaluation.cost import Flops
from ghostlib.models.architectures import num_layers

TOKENS, BATCH = 16, 2  # longer than the tiny models' sliding window of 8
# substrings of the names of each part's parameters
PARTS = {
    "boundary": [".boundary."],
    "attention": ["self_attn.", ".attention.", ".attn."],
    "embeddings": ["embed", "wte", "wpe", "lm_head"],
}


def forward_counted(
    model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache, **options: Any
) -> int:
    """FLOPs of a forward pass that extends ``cache``, counted by PyTorch at every product."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=True, **{name: cache}, **options)
    return counter.get_total_flops()


def variants(dense: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """A dense model and one recovered at two gaps, with attention as plain products."""
    models = {"dense": dense, "ghost": gl.recover(dense, tiny_windows(), [1, 2, 4])}
    for model in models.values():
        model.set_attn_implementation("eager")  # the counter does not look into fused kernels
    return models


@pytest.mark.thorough
def test_flops_and_cache_are_what_pytorch_counts_and_keeps(any_tiny):
    for model in variants(any_tiny).values():
        ids, cache = tiny_windows(BATCH, TOKENS), DynamicCache(config=model.config)
        counted = forward_counted(model, ids, cache)
        assert gl.flops(model, TOKENS, batch_size=BATCH, logits=TOKENS).total == counted
        cached = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
        assert gl.cache_bytes(model, TOKENS, batch_size=BATCH) == cached
        counted = forward_counted(model, ids[:, :1], cache, logits_to_keep=1)
        assert gl.flops(model, 1, context=TOKENS, batch_size=BATCH).total == counted


@pytest.mark.thorough
def test_a_boundary_costs_its_matrix_and_both_operators_cost_the_same(any_tiny):
    models = variants(any_tiny) | {"pruned": gl.prune(any_tiny, [1, 2, 4])}
    models["linearpatch-r"] = gl.recover(any_tiny, tiny_windows(), [1, 2, 4], "linearpatch-r")
    counts = {name: gl.flops(model, TOKENS) for name, model in models.items()}
    assert counts["dense"].boundary == counts["pruned"].boundary == 0
    assert counts["ghost"].boundary == 2 * 2 * WIDTH**2 * TOKENS  # two gaps, a multiply-add each
    assert counts["ghost"] == counts["linearpatch-r"]
    assert counts["ghost"]._replace(boundary=0) == counts["pruned"]
    for part in ("attention", "mlp"):
        whole, kept = getattr(counts["dense"], part), getattr(counts["pruned"], part)
        assert kept * LAYERS == whole * (LAYERS - 3)


@pytest.mark.thorough
@pytest.mark.parametrize("context", [0, 20])
def test_every_part_is_what_the_sizes_of_its_matrices_say(any_tiny, context):
    """Each number of a matrix multiplies each token once, each query meets each key it sees."""
    for model in variants(any_tiny).values():
        size: dict[str, int] = defaultdict(int)
        for name, parameter in model.named_parameters():
            kind = next((k for k, v in PARTS.items() if any(w in name for w in v)), "mlp")
            size[kind] += parameter.numel() if parameter.ndim == 2 else 0
        config, pairs = model.config, 0
        for index in range(config.num_hidden_layers):
            kinds = getattr(config, "layer_types", None)
            window = getattr(config, "sliding_window", None)
            if window is None or (kinds and kinds[index] != "sliding_attention"):
                window = math.inf
            pairs += 2 * WIDTH * TOKENS * (min(context, window - 1) + TOKENS)
        head = model.get_output_embeddings().weight.numel()
        assert gl.flops(model, TOKENS, context=context, batch_size=BATCH, logits=3) == Flops(
            attention=2 * BATCH * (TOKENS * size["attention"] + pairs),
            mlp=2 * BATCH * TOKENS * size["mlp"],
            boundary=2 * BATCH * TOKENS * size["boundary"],
            head=2 * BATCH * 3 * head,
        )


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


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_experts_count_in_every_dtype(kind):
    model, ids = build(kind), tiny_windows(1, TOKENS)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    counts = [gl.flops(model.to(dtype), TOKENS) for dtype in dtypes]
    assert counts[0] == counts[1] == counts[2]
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # one plain product for each expert in use
    counted = forward_counted(model, ids, DynamicCache(config=model.config), logits_to_keep=1)
    assert counts[2].total == counted


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["mamba", "bamba", "falcon_h1", "qwen3_next", "recurrent_gemma"])
def test_states_are_cached_besides_keys_and_values(kind):
    model = build(kind)
    for tokens in (3, TOKENS):
        cache, size = DynamicCache(config=model.config), 0
        forward_counted(model, tiny_windows(BATCH, tokens), cache)
        for layer in cache.layers:
            parts = [getattr(layer, "keys", None), getattr(layer, "values", None)]
            for name in ("conv_states", "recurrent_states"):
                parts += getattr(layer, name, {}).values()
            size += sum(part.nbytes for part in parts if part is not None)
        assert gl.cache_bytes(model, tokens, batch_size=BATCH) == size > 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("jetmoe", "what it computes depends on values"),
        ("minimax", "MiniMax uses cache of its own"),
        ("xlstm", "no attribute 'rnn_state'"),
    ],
)
def test_models_that_cannot_be_counted_are_refused_in_one_line(kind, why):
    model = build(kind)
    for count in (gl.flops, gl.cache_bytes):
        with pytest.raises(ValueError, match=rf"^operations and cache of a {kind} [^\n]*{why}"):
            count(model, TOKENS)


def test_a_state_outside_the_cache_is_not_counted_as_nothing():
    with pytest.raises(ValueError, match=r"^a rwkv keeps nothing in the cache of transformers$"):
        gl.cache_bytes(build("rwkv"), TOKENS)


@pytest.mark.parametrize("kind", ["openai-gpt", "bert"])
@pytest.mark.parametrize("logits", [1, 3])
def test_a_head_of_several_parts_is_counted_where_it_is_passed(kind, logits):
    """The boundary is in the head of the first; the second's has a product before the logits."""
    model = build(kind)
    removed = [num_layers(model) - 1]
    ghost = gl.recover(model, tiny_windows(4, 24), removed, "ghost", relative_ridge=1e-3)
    pruned = gl.prune(model, removed)
    counts = [gl.flops(variant, TOKENS, logits=logits) for variant in (ghost, pruned)]
    assert counts[0].boundary > 0 and counts[0]._replace(boundary=0) == counts[1]
    for variant, count in zip((ghost, pruned), counts, strict=True):
        variant.set_attn_implementation("eager")
        cache = DynamicCache(config=variant.config)
        counted = forward_counted(variant, tiny_windows(1, TOKENS), cache, logits_to_keep=logits)
        assert count.total == counted


def test_only_shapes_are_needed():
    with torch.device("meta"):
        model = tiny_model("llama")
    real = tiny_model("llama")
    for count in (gl.count_parameters, gl.weight_bytes):
        assert count(model) == count(real)
    assert gl.flops(model, TOKENS) == gl.flops(real, TOKENS)
    assert gl.cache_bytes(model, TOKENS) == gl.cache_bytes(real, TOKENS)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_as_large_as_the_file(any_tiny, dtype, tmp_path):
    model = any_tiny.to(dtype)
    model.save_pretrained(tmp_path)
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert gl.weight_bytes(model) == (tmp_path / "model.safetensors").stat().st_size - header
    assert gl.count_parameters(model) * dtype.itemsize == gl.weight_bytes(model)
    full = gl.cache_bytes(any_tiny, TOKENS)
    assert full == gl.cache_bytes(any_tiny, TOKENS, batch_size=3) / 3 > 0


def test_the_last_token_that_a_boundary_reads_is_in_the_cache():
    dense, name = tiny_model("llama"), "three-branch-relative"
    pruned = gl.prune(dense, [1, 2, 4])
    recovered = gl.recover(dense, tiny_windows(), [1, 2, 4], name, relative_ridge=1e-3)
    for tokens in (1, TOKENS):
        sizes = [gl.cache_bytes(model, tokens, batch_size=3) for model in (recovered, pruned)]
        assert sizes[0] - sizes[1] == 2 * 3 * WIDTH * 4  # two gaps, three sequences, four bytes
    assert gl.cache_bytes(recovered, 0) == 0


def test_a_sliding_window_bounds_the_cache():
    sliding = tiny_model("mistral")
    assert gl.cache_bytes(sliding, 7) == gl.cache_bytes(sliding, 100) > gl.cache_bytes(sliding, 6)
    assert gl.cache_bytes(sliding, 0) == 0


@pytest.mark.thorough
def test_latency_of_every_architecture(any_tiny):
    models = variants(any_tiny)
    before = {name: value.clone() for name, value in any_tiny.state_dict().items()}
    latencies = gl.latency(models, 12, 3, warmup=0, repeats=2)
    assert list(latencies) == list(models)
    for latency in latencies.values():
        assert latency.peak_bytes is None
        for spread in (latency.prefill, latency.decode):
            assert 0 < spread.least <= spread.median <= spread.most
    assert all(torch.equal(before[name], value) for name, value in any_tiny.state_dict().items())


@pytest.fixture
def delayed():
    """A tiny model and a list: its n-th forward pass takes as long as the list's n-th entry."""
    model, delays, passes = tiny_model("llama"), [], []

    def wait(module, args, kwargs):
        time.sleep(delays.pop(0) if delays else 0.0)
        passes.append(kwargs.get("input_ids", args[0] if args else None).shape)

    model.register_forward_pre_hook(wait, with_kwargs=True)
    return model, delays, passes


def test_prefill_and_decoding_take_what_their_passes_take(delayed):
    model, delays, passes = delayed
    delays += [0.6, 0.2, 0.2]
    latency = gl.latency({"a": model}, 7, 2, batch_size=3, warmup=0, repeats=1)["a"]
    assert 0.6 < latency.prefill.median < 1.0
    assert 0.2 < latency.decode.median < 0.39
    assert passes == [(3, 7), (3, 1), (3, 1)]


def test_warmup_rounds_are_left_out(delayed):
    model, delays, _ = delayed
    delays += [0.3, 0.3]
    assert gl.latency({"a": model}, 4, 1, warmup=1, repeats=2)["a"].prefill.most < 0.2
    delays += [0.3, 0.3]
    first = gl.latency({"a": model}, 4, 1, warmup=0, repeats=3)["a"]
    assert first.prefill.least < first.prefill.median < 0.2 < first.prefill.most


@pytest.mark.thorough
def test_a_machine_that_slows_down_slows_all_models_alike(delayed):
    model, delays, _ = delayed
    delays += [0.01 * (step + 1) for step in range(20)]
    latencies = gl.latency({"a": model, "b": model}, 4, 1, warmup=0, repeats=5)
    ratio = latencies["b"].prefill.median / latencies["a"].prefill.median
    assert ratio < 2  # one model after the other: 3


def test_models_in_training_mode_are_timed_without_dropout_and_stay_in_it():
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = []
    model.transformer.h[1].register_forward_pre_hook(lambda m, args: modes.append(m.training))
    gl.latency({"a": model}, 4, 1, warmup=0, repeats=1)
    assert modes and not any(modes)
    assert model.training and not model.transformer.h[0].training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_clocks_wait_and_memory_is_counted():
    """A pass that is only enqueued when `forward` returns is timed as long as it runs."""
    model = tiny_model("llama").to("cuda")
    gl.latency({"a": model}, 64, 4, warmup=1, repeats=1)
    idle = gl.latency({"a": model}, 64, 4, warmup=1, repeats=1)["a"]
    assert idle.peak_bytes is not None and idle.peak_bytes >= gl.cache_bytes(model, 64)
    model.register_forward_hook(lambda *_: torch.cuda._sleep(200_000_000))
    busy = gl.latency({"a": model}, 64, 4, warmup=1, repeats=1)["a"]
    assert busy.prefill.median > 0.05 and busy.decode.median > 0.05
