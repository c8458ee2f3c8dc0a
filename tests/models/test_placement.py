"""Models placed by accelerate, on several devices or partly on disk, behave like any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from conftest import LAYERS, tiny_model, tiny_windows
from transformers import AutoModelForCausalLM, PreTrainedModel

import ghostlib as gl
from ghostlib.models.architectures import decoder_layers, fingerprint, receiver, structure
from ghostlib.models.placement import compute_device, input_device

REMOVED = [0, 2, 3, LAYERS - 1]


def device_map(model: PreTrainedModel, near: int | str, far: int | str) -> dict[str, int | str]:
    """Layers 0, 4, 5 and the final norm are far, everything else is near."""
    parts = structure(model)
    distant = {parts.receiver, *(f"{parts.layers}.{i}" for i in (0, 4, 5))}
    return {
        name: far if name in distant else near
        for name, module in model.named_modules()
        if name.rpartition(".")[0] == parts.layers
        or (not list(module.children()) and not name.startswith(f"{parts.layers}."))
    }


def pretrained(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder / "model",
        device_map=device_map(model, "cpu", "disk"),
        offload_folder=folder / "offloaded",
    )


def everything_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map={"": "disk"}, offload_folder=folder / "offloaded"
    )


def dispatched(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    return accelerate.dispatch_model(
        loaded, device_map(model, "cpu", "disk"), offload_dir=folder / "offloaded"
    )


def checkpoint_dispatched(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(model.config)
    empty.tie_weights()
    return accelerate.load_checkpoint_and_dispatch(
        empty.eval(),
        folder / "model",
        device_map(model, "cpu", "disk"),
        offload_folder=folder / "offloaded",
    )


Placer = Callable[[PreTrainedModel, Path], PreTrainedModel]
PLACERS: list[Placer] = [pretrained, everything_on_disk, dispatched, checkpoint_dispatched]
# A plain model placed in every way, and every structure placed in one way. (accelerate does not
# know that the head of GPT-NeoX has another name in files.)
PAIRS = [("llama", placer) for placer in PLACERS]
PAIRS += zip(["gpt_neox", "gpt2", "gemma3_text", "opt"], PLACERS, strict=True)


def pair(kind: str, placer: Placer, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model in memory and placed."""
    tiny_model(kind).save_pretrained(folder / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    placed = placer(plain, folder)
    assert any(parameter.device.type == "meta" for parameter in placed.parameters())
    return plain, placed


@torch.no_grad()
def assert_same(one: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor) -> None:
    assert torch.equal(one(ids).logits, other(ids).logits)
    assert gl.perplexity(one, ids) == gl.perplexity(other, ids)


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "placer"), PAIRS)
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_offloaded_models_are_calibrated_and_repaired(
    kind: str, placer: Placer, tmp_path: Path
) -> None:
    plain, placed = pair(kind, placer, tmp_path)
    ids = tiny_windows()
    assert input_device(placed) == torch.device("cpu")
    assert fingerprint(placed) == fingerprint(plain)
    boundary = gl.Boundary(1, 5)
    one, other = (gl.calibrate(m, ids, [boundary])[boundary] for m in (plain, placed))
    assert torch.equal(one.G, other.G) and torch.equal(one.B, other.B)

    assert_same(gl.prune(plain, [1, 2]), gl.prune(placed, [1, 2]), ids)
    expected = gl.recover(plain, ids, REMOVED, relative_ridge=1e-3)
    recovered = gl.recover(placed, ids, REMOVED, relative_ridge=1e-3)
    assert_same(expected, recovered, ids)
    assert torch.equal(
        *(m.generate(ids[:1], max_new_tokens=5, do_sample=False) for m in (expected, recovered))
    )
    recovered.save_pretrained(tmp_path / "recovered")
    assert_same(expected, AutoModelForCausalLM.from_pretrained(tmp_path / "recovered"), ids)
    assert_same(plain, placed, ids)  # the placed model is unchanged


def test_a_copy_leaves_offloaded_weights_in_place(tmp_path: Path) -> None:
    """No weight of the placed model is loaded or copied for the repaired one."""
    _, placed = pair("llama", dispatched, tmp_path)
    recovered = gl.recover(placed, tiny_windows(), [1, 2])
    kept = [layer for i, layer in enumerate(decoder_layers(placed)) if i not in (1, 2)]
    for layer, copied in zip(kept, decoder_layers(recovered), strict=True):
        for name, parameter in layer.named_parameters():
            assert copied.get_parameter(name) is parameter
    hook, copied_hook = (
        vars(decoder_layers(model)[-1].get_submodule("mlp.up_proj"))["_hf_hook"]
        for model in (placed, recovered)
    )
    assert hook is not copied_hook and hook.weights_map is copied_hook.weights_map
    operator = receiver(recovered, 1).get_parameter("boundary.M")
    assert operator.device == torch.device("cpu") and operator.abs().max() > 0


def test_a_repaired_model_is_loaded_from_disk_in_parts(tmp_path: Path) -> None:
    ids = tiny_windows()
    recovered = gl.recover(tiny_model("llama"), ids, REMOVED)
    recovered.save_pretrained(tmp_path / "model")
    assert_same(recovered, everything_on_disk(recovered, tmp_path), ids)


def test_moving_a_copy_does_not_move_the_placed_model() -> None:
    """Accelerate binds ``to`` to the placed model; a copy must not inherit that."""
    placed = accelerate.dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)
    recovered = gl.recover(placed, tiny_windows(), [1, 2])
    mover: Callable[[torch.dtype], Any] = recovered.to
    assert mover(torch.float64) is recovered
    assert recovered.dtype == torch.float64


def test_weights_without_values_are_named() -> None:
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    with pytest.raises(ValueError, match=r"weights of a Linear are on the meta device.*device_map"):
        fingerprint(empty)
    with pytest.raises(ValueError, match=r"weights of a (Embedding|Linear) are on the meta device"):
        gl.calibrate(empty, tiny_windows(), [(1, 3)])


def test_blocks_offloaded_as_a_whole_are_refused(tmp_path: Path) -> None:
    placed = accelerate.dispatch_model(
        tiny_model("llama"),
        {"model": "disk", "lm_head": "disk"},
        offload_dir=tmp_path / "offloaded",
        preload_module_classes=["LlamaDecoderLayer"],
    )
    with pytest.raises(ValueError, match="without preload_module_classes"):
        gl.recover(placed, tiny_windows(), [1, 2])


def test_chained_hooks_are_found() -> None:
    layer = decoder_layers(tiny_model("llama"))[0].to("meta")
    hooks = [accelerate.hooks.ModelHook(), accelerate.hooks.AlignDevicesHook("cpu")]
    vars(layer)["_hf_hook"] = accelerate.hooks.SequentialHook(*hooks)
    assert compute_device(layer) == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("far", ["cpu", "disk", 1])
def test_models_on_several_devices(far: int | str, tmp_path: Path) -> None:
    if far == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=device_map(plain, 0, far),
        offload_folder=tmp_path / "offloaded",
    )
    ids, boundaries = tiny_windows(), gl.contiguous(2, LAYERS)
    one, other = (gl.calibrate(model, ids, boundaries) for model in (plain, placed))
    for boundary in boundaries:
        torch.testing.assert_close(other[boundary].G, one[boundary].G, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(other[boundary].B, one[boundary].B, rtol=1e-3, atol=1e-3)
    recovered = gl.recover(placed, ids, REMOVED, relative_ridge=1e-3)
    for position in (0, 1, 2):
        module = receiver(recovered, position)
        if hasattr(module, "boundary"):
            assert module.get_parameter("boundary.M").device == compute_device(module)
    expected = gl.recover(plain, ids, REMOVED, relative_ridge=1e-3)
    assert gl.perplexity(recovered, ids) == pytest.approx(gl.perplexity(expected, ids), rel=1e-3)
    recovered.save_pretrained(tmp_path / "recovered")
