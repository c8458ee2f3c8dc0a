"""Recovered models are ordinary models: cached, saved, loaded, moved, and sharing their weights."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fresh
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import LAYERS, saved_and_loaded, tiny_model, tiny_windows
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

import ghostlib as gl
from ghostlib import Boundary
from ghostlib.models.architectures import decoder_layers, num_layers, receiver
from ghostlib.models.streams import record, share
from ghostlib.surgery.testing import check_repaired_model

pytestmark = pytest.mark.thorough

LAYERS_TO_REMOVE = {"middle": [2, 3], "several": [0, 2, 3, LAYERS - 1]}
EMBEDDED_LAYERS = {"block": range(12, 19), "several": [0, 9, 10, 20, 29]}


@torch.no_grad()
def logits(model, ids, **inputs) -> torch.Tensor:
    return model(ids, **inputs).logits


def check_recovered(dense, recovered, ids, folder) -> None:
    """Everything that must hold for a recovered model, tiny or embedded."""
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache = recovered.generate(ids[:1, :8], use_cache=True, **options)
    assert torch.equal(with_cache, recovered.generate(ids[:1, :8], use_cache=False, **options))
    assert isinstance(recovered, type(dense))
    assert recovered.config.num_hidden_layers == len(decoder_layers(recovered))
    for position, layer in enumerate(decoder_layers(recovered)):
        assert {m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} <= {position}
    # All parameters but the operators are the dense model's own tensors.
    shared = {id(p) for p in dense.parameters()}
    assert all(id(p) in shared or ".boundary." in name for name, p in recovered.named_parameters())
    loaded = saved_and_loaded(recovered, ids, folder)
    assert type(loaded) is type(recovered) and loaded.dtype == recovered.dtype


@pytest.mark.parametrize("layers", LAYERS_TO_REMOVE.values(), ids=LAYERS_TO_REMOVE)
def test_recovered_tiny_models_of_every_architecture(any_tiny, layers, tmp_path):
    ids = tiny_windows(4, 40)
    before = logits(any_tiny, ids)
    config = any_tiny.config.to_dict()
    recovered = gl.recover(any_tiny, ids, layers, relative_ridge=1e-3)
    check_recovered(any_tiny, recovered, ids, tmp_path)
    assert torch.equal(logits(any_tiny, ids), before)
    assert any_tiny.config.to_dict() == config
    assert len(decoder_layers(any_tiny)) == LAYERS
    assert [e["removed"] for e in recovered.config.ghost] == [
        list(b.removed) for b in gl.runs(layers, LAYERS)
    ]


@pytest.mark.parametrize("layers", EMBEDDED_LAYERS.values(), ids=EMBEDDED_LAYERS)
def test_recovered_embedded_model(embedded, wiki, layers, tmp_path):
    model, _ = embedded
    ids = wiki[:1, :128]
    before = logits(model, ids)
    recovered = gl.recover(model, wiki, layers)
    check_recovered(model, recovered, ids, tmp_path)
    assert torch.equal(logits(model, ids), before)
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters())
    operators = len(gl.runs(layers, 30)) * 576**2
    removed = len(list(layers)) * layer
    assert gl.count_parameters(recovered) == gl.count_parameters(model) - removed + operators


def test_the_operator_is_applied_where_the_dense_model_has_x_post(any_tiny):
    """The next surviving layer, or the final norm, receives exactly X_pre W."""
    ids = tiny_windows(4, 20)
    for start, stop in [(0, 2), (2, 4), (4, LAYERS)]:
        boundary = Boundary(start, stop)
        op = gl.solve(
            gl.calibrate(any_tiny, ids, [boundary])[boundary], "ghost", relative_ridge=1e-3
        )
        recovered = gl.install(any_tiny, {boundary: op})
        dense_stream = record(any_tiny, ids, [start])[start]
        outputs: list[torch.Tensor] = []
        boundary = receiver(recovered, start).boundary
        boundary.register_forward_hook(lambda m, a, out, outputs=outputs: outputs.append(out))
        logits(recovered, ids)
        expected = dense_stream.double() @ op.W
        torch.testing.assert_close(outputs[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_new_process_gives_the_same_logits(tmp_path, embedded, wiki):
    model, _ = embedded
    recovered = gl.recover(model, wiki, range(12, 19))
    folder = tmp_path / "model"
    recovered.save_pretrained(folder)
    save_file({"ids": wiki[:1], "logits": logits(recovered, wiki[:1])}, tmp_path / "expected")
    script = (
        "import sys, torch, ghostlib; from safetensors.torch import load_file;"
        "from transformers import AutoModelForCausalLM;"
        "torch.set_num_threads(int(sys.argv[3]));"
        "expected = load_file(sys.argv[2]);"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval();"
        "torch.set_grad_enabled(False);"
        "assert torch.equal(model(expected['ids']).logits, expected['logits'])"
    )
    arguments = [str(folder), str(tmp_path / "expected"), str(torch.get_num_threads())]
    done = fresh.run(script, *arguments)
    assert done.returncode == 0, done.stderr


def test_pruning_gives_the_stock_class_and_the_dense_layers(any_tiny, tmp_path):
    ids = tiny_windows()
    pruned = gl.prune(any_tiny, [1, 2])
    assert type(pruned) is type(any_tiny)
    identity = gl.recover(any_tiny, ids, [1, 2], "identity")
    assert type(identity) is type(any_tiny)
    assert torch.equal(logits(pruned, ids), logits(identity, ids))
    # By hand: the same model with two layers made transparent.
    by_hand = copy.deepcopy(any_tiny)
    for layer in decoder_layers(by_hand)[1:3]:
        layer.forward = lambda hidden, *args, **kwargs: hidden
    torch.testing.assert_close(logits(pruned, ids), logits(by_hand, ids, use_cache=False))
    assert type(saved_and_loaded(pruned, ids, tmp_path)) is type(any_tiny)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    recovered = gl.recover(model, tiny_windows(), [2, 3], relative_ridge=1e-3)
    assert {p.dtype for p in recovered.parameters()} == {dtype}
    loaded = saved_and_loaded(recovered, tiny_windows(), tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_affine_operators_keep_their_bias(tmp_path):
    model, ids = tiny_model("llama"), tiny_windows()
    recovered = gl.recover(model, ids, [2, 3], "affine", relative_ridge=1e-3)
    assert recovered.config.ghost[0]["bias"] is True
    assert receiver(recovered, 2).boundary.b.abs().max() > 0
    check_recovered(model, recovered, ids, tmp_path)


def test_recovered_models_can_be_moved_cast_copied_and_pickled():
    recovered = gl.recover(tiny_model("llama"), tiny_windows(), [2, 3])
    ids = tiny_windows(1, 8)
    assert torch.equal(logits(copy.deepcopy(recovered), ids), logits(recovered, ids))
    state = pickle.loads(pickle.dumps(recovered.state_dict()))
    assert torch.equal(state["model.layers.2.boundary.M"], receiver(recovered, 2).boundary.M)
    assert logits(recovered.double(), ids).dtype == torch.float64


def test_hidden_states_and_batches_with_padding():
    recovered = gl.recover(tiny_model("llama"), tiny_windows(), [2, 3])
    ids = tiny_windows(2, 10)
    out = recovered(ids, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS - 2 + 1
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :4], mask[1, :4] = 0, 0
    alone = logits(recovered, ids[1:, 4:])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    together = logits(recovered, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(together[1:, 4:], alone, rtol=1e-4, atol=1e-4)


def test_every_weight_of_a_model_read_from_a_folder_comes_back(any_tiny, tmp_path):
    """Files of some architectures have other names of weights than their modules."""
    ids = tiny_windows()
    dense = saved_and_loaded(any_tiny, ids, tmp_path / "dense")
    once = saved_and_loaded(gl.recover(dense, ids, [2, 3]), ids, tmp_path / "once")
    saved_and_loaded(once, ids, tmp_path / "twice")


def test_a_text_generation_pipeline_takes_a_recovered_model(embedded, wiki):
    model, tokenizer = embedded
    recovered = gl.recover(model, wiki, range(12, 19))
    generator = pipeline("text-generation", model=recovered, tokenizer=tokenizer)
    out = generator("The river", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert out.startswith("The river") and len(out) > len("The river")


def placed() -> PreTrainedModel:
    """A model with hooks of accelerate."""
    model = tiny_model("llama")
    for module in (*decoder_layers(model), receiver(model, LAYERS)):
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    return model


def test_models_placed_by_accelerate_hooks_are_repaired_too():
    ids, layers = tiny_windows(), [2, 3, LAYERS - 1]
    expected = gl.recover(tiny_model("llama"), ids, layers)
    recovered = gl.recover(placed(), ids, layers)
    assert torch.equal(logits(recovered, ids), logits(expected, ids))
    assert all(hasattr(layer, "_hf_hook") for layer in decoder_layers(recovered))


def test_moments_of_something_else_are_refused():
    model, ids = tiny_model("llama"), tiny_windows()
    gap = Boundary(2, 4)
    stats = gl.calibrate(model, ids, [gap])
    with pytest.raises(ValueError, match=r"no moments for boundary \(1, 4\), only for \(2, 4\)"):
        gl.recover(model, stats, [1, 2, 3])
    with pytest.raises(ValueError, match="collected on model"):
        gl.recover(tiny_model("llama", seed=1), stats, [2, 3])
    with pytest.raises(ValueError, match="width 7 do not fit a model of width 16"):
        gl.recover(model, {gap: gl.Moments(7)}, [2, 3])
    with pytest.raises(ValueError, match=r"moments of boundary \(2, 4\) were given for \(1, 2\)"):
        gl.recover(model, {Boundary(1, 2): stats[gap]}, [1])
    with pytest.raises(ValueError, match="collected on model"):
        gl.recover(tiny_model("llama", num_hidden_layers=5), stats, [2, 3])


def test_operators_of_the_wrong_shape_or_name_are_refused():
    model, ids, gap = tiny_model("llama"), tiny_windows(), Boundary(2, 4)
    moments = gl.Moments(7).update(torch.randn(30, 7), torch.randn(30, 7))
    with pytest.raises(ValueError, match=r"boundary \(2, 4\) must have width 16, got 7"):
        gl.install(model, {gap: gl.solve(moments, "ghost")})
    with pytest.raises(ValueError, match=r"unknown operator 'gost'; did you mean 'ghost'"):
        gl.recover(model, ids, gap.removed, "gost")


def solved(model, name: str = "ghost") -> gl.Operator:
    gap = Boundary(2, 4)
    return gl.solve(gl.calibrate(model, tiny_windows(), [gap])[gap], name, relative_ridge=1e-3)


@pytest.mark.parametrize(
    ("gaps", "message"),
    [
        ([(1, 3), (2, 4)], r"boundaries \(1, 3\) and \(2, 4\) overlap, touch"),
        ([(3, 4), (1, 3)], r"boundaries \(1, 3\) and \(3, 4\) overlap, touch"),
        ([(2, 2)], r"boundary \(2, 2\) is none: it needs 0 <= start < stop"),
        ([(3, 2)], r"boundary \(3, 2\) is none"),
        ([(-1, 2)], r"boundary \(-1, 2\) is none"),
        ([(1, 9)], r"boundary \(1, 9\) does not fit"),
        ([(0, LAYERS)], "removing 6 of 6 layers leaves no layer"),
        ([(1.5, 3)], "boundary must be a pair of whole numbers"),
    ],
)
def test_boundaries_that_no_model_is_left_of_are_refused(gaps, message):
    model = tiny_model("llama")
    for op in (None, solved(model)):
        with pytest.raises(ValueError, match=message):
            gl.install(model, dict.fromkeys(gaps, op))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["M", "bias"])
def test_operators_that_are_no_numbers_are_refused(part, value):
    model, gap = tiny_model("llama"), Boundary(2, 4)
    op = solved(model, "affine")
    bad = getattr(op, part).clone()
    bad[3] = value
    with pytest.raises(ValueError, match=r"boundary \(2, 4\) has NaN or infinite entries: solve"):
        gl.install(model, {gap: replace(op, **{part: bad})})


@pytest.mark.parametrize("name", ["ghost", "replaceme"])
def test_operators_too_large_for_the_dtype_are_refused(name):
    model, gap = tiny_model("llama").half(), Boundary(2, 4)
    regressor = gl.OPERATORS[name].regressor
    stats = gl.calibrate(tiny_model("llama"), tiny_windows(), [gap], regressors=[regressor])
    op = gl.solve(stats.of(regressor)[gap], name, relative_ridge=1e-3)
    large = replace(op, M=op.M * 1e7)
    with pytest.raises(
        ValueError, match=r"fit into torch.float16: model\.layers\.[12]\..* infinite"
    ):
        gl.install(model, {gap: large})
    gl.install(tiny_model("llama"), {gap: large})  # float32 has room


def test_nothing_removed_is_the_dense_model():
    model, ids = tiny_model("llama"), tiny_windows()
    copied = gl.install(model, {})
    assert type(copied) is type(model) and copied is not model
    assert torch.equal(logits(copied, ids), logits(model, ids))


# --- the boundaries that look back ------------------------------------------------------------

LOOKING_BACK = (0, 1, 2)  # before both remaining layers, and before the norm


def looking_back(dense: PreTrainedModel | None = None) -> PreTrainedModel:
    layers = LAYERS_TO_REMOVE["several"]
    options = {"operator": "three-branch-relative", "relative_ridge": 1e-3}
    return gl.recover(dense or tiny_model("llama"), tiny_windows(6, 40), layers, **options)


def loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return saved_and_loaded(model, tiny_windows(), folder)


COPIES: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "itself": lambda model, folder: model,
    "a copy": lambda model, folder: copy.deepcopy(model),
    "a copy that shares": lambda model, folder: share(model, range(num_layers(model))),
    "pickled": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "loaded": loaded,
    "loaded twice": lambda model, folder: loaded(loaded(model, folder), folder / "again"),
    "moved": lambda model, folder: copy.deepcopy(model).double().float().to("cpu"),
    "placed": lambda model, folder: looking_back(placed()),
    "placed, and copied": lambda model, folder: copy.deepcopy(looking_back(placed())),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_every_copy_knows_which_boundaries_look_back(make, tmp_path):
    model, ids = looking_back(), tiny_windows()
    other = make(model, tmp_path)
    assert other.looking_back == model.looking_back == LOOKING_BACK
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert set(check_repaired_model(other, checks=["dynamic cache", "beams"]).values()) == {"right"}


def test_no_pass_searches_the_modules(monkeypatch):
    ids = tiny_windows(1, 4)
    for model in (looking_back(), gl.recover(tiny_model("llama"), tiny_windows(), [2])):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch.nn.Module, "named_modules", None)
            patch.setattr(torch.nn.Module, "modules", None)
            assert model(ids, use_cache=True).logits.shape == (1, 4, 97)


def test_a_gap_that_nothing_receives_is_refused():
    """Its only norm runs before the first layer and after the last."""
    model, gap = tiny_model("nanochat"), Boundary(4, LAYERS)
    with pytest.raises(
        ValueError, match=r"receives the stream after its last layer .* keep layer 5"
    ):
        gl.install(model, {gap: None})
    assert gl.prune(model, [4]).config.num_hidden_layers == LAYERS - 1
