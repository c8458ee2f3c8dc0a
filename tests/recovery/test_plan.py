"""Estimates of a recovery before it starts, against known sizes of the models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import tiny_model, tiny_windows
from transformers import JetMoeConfig, LlamaConfig, MixtralConfig

import ghostlib as gl
from ghostlib.models.tiny import tiny_config
from ghostlib.recovery import plan as plan_module
from ghostlib.recovery.plan import Plan, plan
from ghostlib.recovery.recipe import SHORTLIST
from ghostlib.selection.criteria import needed_boundaries

pytestmark = pytest.mark.thorough


@pytest.fixture
def llama(tmp_path):
    """The folder of an 8B model's configuration, without weights."""
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    return tmp_path


def test_weights_of_an_8b_model_are_counted_without_them(llama):
    expected = plan(llama, n=7)
    assert expected.parameters == 8_030_261_248
    assert expected.memory["weights"] == 2 * expected.parameters
    assert plan(llama, n=7, dtype="float32").memory["weights"] == 4 * expected.parameters


def test_a_mixture_of_experts_is_planned_in_every_dtype(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 97}
    MixtralConfig(**sizes, num_hidden_layers=4).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        assert plan(tmp_path, n=2, length=64, dtype=dtype).seconds["scoring"] > 0


def test_operations_that_depend_on_values_are_those_of_all_experts(tmp_path):
    config = tiny_config(JetMoeConfig())
    config.save_pretrained(tmp_path)
    model = plan_module._without_weights(str(tmp_path), None)
    with pytest.raises(ValueError, match="depends on values"):
        gl.flops(model, 8)
    forward, head = plan_module._operations(model, 8)
    assert forward == 16 * gl.count_parameters(model)
    assert head == 2 * config.vocab_size * config.hidden_size
    assert plan(tmp_path, n=2, length=64).seconds["scoring"] > 0


def test_calibration_is_counted_as_calibrate_counts_it(llama):
    expected = plan(llama, layers=[20, 21, 22, 24], n=7, length=1024)
    gaps = [(20, 23), (24, 25)]
    assert expected.memory["calibration"] == gl.calibration_bytes(4096, gaps, length=1024).total
    assert expected.removed == 4


@pytest.mark.parametrize("operator", ["refit", "ghost-refit"])
def test_a_repair_of_the_mlp_is_counted_wherever_the_layers_are(llama, operator):
    chosen, named = (
        plan(llama, n=7, layers=layers, operator=operator).memory["calibration"]
        for layers in (None, range(12, 19))
    )
    assert chosen == named
    regressor = gl.OPERATORS[operator].regressor
    once = gl.calibration_bytes(4096, [(12, 19)], hidden=14336, regressors=[regressor])
    assert named == once.total + once.moments, "of the fitted windows, and of those held out"
    alone = plan(llama, n=7, layers=range(12, 19), operator=operator, windows=1)
    assert alone.memory["calibration"] == once.total


def test_spread_weights_need_not_fit(llama):
    whole, spread = plan(llama, n=7), plan(llama, n=7, spread=True)
    assert whole.peak - spread.peak == whole.memory["weights"]


def test_more_windows_take_longer_and_no_more_memory(llama, monkeypatch):
    monkeypatch.setattr(plan_module, "_rate", lambda *_: 1e12)
    few, many = plan(llama, n=7, windows=8), plan(llama, n=7, windows=32)
    assert few.memory == many.memory
    assert many.seconds["choosing layers"] == 4 * few.seconds["choosing layers"]
    assert many.seconds["scoring"] == few.seconds["scoring"]
    recipe = plan(llama, n=7, operator="auto")
    assert sum(recipe.seconds.values()) > 2 * sum(plan(llama, n=7).seconds.values())


def test_an_ability_to_keep_takes_a_search_of_its_own(llama, monkeypatch):
    monkeypatch.setattr(plan_module, "_rate", lambda *_: 1e12)
    usual, kept = (plan(llama, n=11, operator="auto", keep=keep) for keep in (None, "copying"))
    gaps = {gap for name in (*SHORTLIST, "abilities") for gap in needed_boundaries(name, 11, 32)}
    assert kept.memory["calibration"] >= gl.calibration_bytes(4096, sorted(gaps), length=2048).total
    assert kept.memory["calibration"] > usual.memory["calibration"]
    one = usual.seconds["scoring"] / (3 * 8)  # a window
    search = kept.seconds["choosing layers"] - usual.seconds["choosing layers"]
    assert search > (32 + 10 * 9) * one
    options = {"n": 1, "layers": [3], "operator": "auto"}
    first, second = (plan(llama, **options, keep=keep).seconds for keep in (None, "copying"))
    assert first == second and first["choosing layers"] == 0


def test_a_greedy_search_scores_one_window(llama, monkeypatch):
    monkeypatch.setattr(plan_module, "_rate", lambda *_: 1e12)
    few, many = (plan(llama, n=3, criterion="perplexity", windows=w).seconds for w in (1, 9))
    one = few["scoring"] / (3 * 8)
    assert few["choosing layers"] > 3 * 31 * one
    assert many["choosing layers"] - few["choosing layers"] < 9 * one


def test_weights_that_the_cache_lacks_are_downloaded(monkeypatch):
    sizes = {"model-1.safetensors": 5, "model-2.safetensors": 7, "pytorch_model.bin": 12}
    sizes |= {"original/a.safetensors": 100, "config.json": 1}
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    api = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(plan_module, "HfApi", lambda: api)
    assert plan_module._download("org/model") == 12
    cache = {"model-1.safetensors": "path"}
    monkeypatch.setattr(plan_module, "try_to_load_from_cache", lambda _, name: cache.get(name))
    assert plan_module._download("org/model") == 7


def test_the_embedded_model_is_planned_before_it_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("GHOSTLIB_CACHE", str(tmp_path))
    expected = plan("smollm2", n=7)
    assert expected.parameters == 134_515_008 and expected.download == 98_000_000
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused():
    fits = Plan(0, {"weights": 10, "process": 2}, 12, {"scoring": 1.0}, False, "cpu", 7, 5)
    fits.check()
    replace(fits, available=3, spread=True).check()
    with pytest.raises(MemoryError, match=r"needs about 0\.0 MB on cpu"):
        replace(fits, available=11).check()
    with pytest.raises(OSError, match="have to be fetched"):
        replace(fits, download=10**18).check()


@pytest.mark.parametrize("operator", ["refit", "ghost"])
def test_a_model_that_was_recovered_is_refused(tmp_path, operator):
    gl.recover(tiny_model("llama"), tiny_windows(), [2], operator).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="recovered before: start from the dense model"):
        plan(tmp_path, n=1, length=8)


@pytest.mark.parametrize("layers", [None, range(6)])
def test_layers_that_cannot_be_removed_are_refused(tmp_path, layers):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(n = 6 layers cannot|leaves no layer)"):
        plan(tmp_path, n=6, layers=layers)


@pytest.mark.embedded
def test_the_configuration_of_the_embedded_model_is_its_own(embedded):
    model, _ = embedded
    planned, own = plan_module._embedded_config().to_dict(), model.config.to_dict()
    sizes = [k for k in own if k.endswith(("size", "layers", "heads", "embeddings"))]
    assert len(sizes) >= 8 and {k: planned[k] for k in sizes} == {k: own[k] for k in sizes}
    assert plan("smollm2", n=7).parameters == model.num_parameters()
