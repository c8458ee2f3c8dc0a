"""Repaired models pass every check, and the checks fail for models that are wrong."""

import re
from contextlib import suppress
from threading import Barrier, BrokenBarrierError, current_thread, main_thread
from typing import Any

import pytest
import torch
from conftest import LAYERS, tiny_model, tiny_windows
from torch import Tensor
from transformers import PreTrainedModel

import ghostlib as gl
from ghostlib.models.architectures import receiver
from ghostlib.surgery import previous
from ghostlib.surgery.ghosted import BoundaryModule
from ghostlib.surgery.testing import CHECKS, check_repaired_model

pytestmark = pytest.mark.thorough

SEVERAL = [0, 2, 3, LAYERS - 1]  # after the embeddings, between layers, before the final norm
LOOKING_BACK = "three-branch-relative"
STREAM = {"ghost": {}, "affine": {}, "low-rank": {"rank": 4}, "two-branch-relative": {}}
GPU = torch.cuda.is_available()

# These ways need a token before the last one, which the cache does not keep.
REFUSED = {
    "assisted generation": "cannot go back|cache that can be cropped",
    "as an assistant": "keeps one token and cannot go back",
    "prompt lookup": "cannot go back|cache that can be cropped",
}
QUICK = [name for name in CHECKS if name != "compiled"]


def repaired(model: PreTrainedModel, name: str, **options: Any) -> PreTrainedModel:
    return gl.recover(model, tiny_windows(6, 40), SEVERAL, name, relative_ridge=1e-3, **options)


def refused(results: dict[str, str], model: PreTrainedModel) -> dict[str, str]:
    """Refusals, without those of transformers itself."""
    refusals = {name: result for name, result in results.items() if result != "right"}
    if not GPU:
        assert "from CUDA alone" in refusals.pop("offloaded cache")
    types = getattr(model.config, "layer_types", None) or []
    if "sliding_attention" in types or getattr(model.config, "sliding_window", None):
        refusals.pop("quantised cache", None)
    return refusals


def test_a_repair_with_the_previous_token_is_right_or_refused(any_tiny: PreTrainedModel) -> None:
    if any_tiny.config.model_type == "olmo2":
        pytest.skip("reads its stream without a norm: see test_several_features.py")
    model = repaired(any_tiny, LOOKING_BACK)
    refusals = refused(check_repaired_model(model, any_tiny, checks=QUICK), model)
    assert refusals.keys() == REFUSED.keys()
    for name, message in refusals.items():
        assert re.search(REFUSED[name], message), message


def test_a_repair_of_the_stream_is_right(any_tiny: PreTrainedModel) -> None:
    model = repaired(any_tiny, "ghost")
    assert not refused(check_repaired_model(model, any_tiny, checks=QUICK), model)


@pytest.mark.parametrize("name", STREAM)
def test_every_kind_of_module_is_right(name: str) -> None:
    dense = tiny_model("llama")
    model = repaired(dense, name, **STREAM[name])
    assert not refused(check_repaired_model(model, dense, checks=QUICK), model)


def test_a_module_and_a_fold_together_are_right() -> None:
    dense = tiny_model("llama")
    model = gl.recover(dense, tiny_windows(12, 40), [2, 3, 5], "ghost-refit", relative_ridge=1e-3)
    assert not refused(check_repaired_model(model, dense, checks=QUICK), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ghost", LOOKING_BACK])
def test_a_compiled_model_is_right(name: str) -> None:
    model = repaired(tiny_model("llama"), name)
    assert check_repaired_model(model, checks=["compiled"]) == {"compiled": "right"}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("name", ["ghost", LOOKING_BACK])
def test_a_gpu_is_right_too(name: str) -> None:
    dense = tiny_model("llama").to("cuda")
    results = check_repaired_model(repaired(dense, name), dense, checks=QUICK)
    assert results["offloaded cache"] == results["static cache"] == "right"


# --- wrong models fail --------------------------------------------------------------------------

# Refused, skipped on the CPU, compared with generation of the same kind, or a single pass.
BLIND = {*REFUSED, "offloaded cache", "threads", "resized embeddings", "gradient checkpointing"}
FAIL_WITHOUT_MEMORY = [name for name in QUICK if name not in BLIND]


@pytest.mark.parametrize("name", FAIL_WITHOUT_MEMORY)
def test_a_forgotten_token_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = repaired(tiny_model("llama"), LOOKING_BACK)
    recall = previous._recall
    monkeypatch.setattr(previous, "_recall", lambda cache, places: (recall(cache, places)[0], {}))
    with pytest.raises(AssertionError, match=f"{name}: (logits are|other tokens)"):
        check_repaired_model(model, checks=[name])


def test_a_lost_beam_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = repaired(tiny_model("llama"), LOOKING_BACK)
    monkeypatch.setattr(previous.RememberingCache, "_keep", lambda self, change: None)
    with pytest.raises(AssertionError, match="beams: other tokens"):
        check_repaired_model(model, checks=["beams"])


def test_padding_that_counts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = repaired(tiny_model("llama"), LOOKING_BACK)
    shifted = previous.previous
    monkeypatch.setattr(previous, "previous", lambda x, real, before: shifted(x, None, before))
    with pytest.raises(AssertionError, match="left padding: other tokens"):
        check_repaired_model(model, checks=["left padding"])


def test_a_pass_that_does_not_come_along_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = repaired(tiny_model("llama"), LOOKING_BACK)
    monkeypatch.setattr("ghostlib.surgery.ghosted.current_pass", lambda: None)
    with pytest.raises(RuntimeError, match="call the language model itself"):
        check_repaired_model(model, checks=["gradient checkpointing"])


@pytest.mark.parametrize(
    "name",
    ["dynamic cache", "assisted generation", "as an assistant", "prompt lookup"],
)
def test_a_module_that_differs_token_by_token_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny_model("llama")
    model, forward = repaired(dense, "ghost"), BoundaryModule.forward

    def by_length(self: BoundaryModule, x: Tensor) -> Tensor:
        return forward(self, x) if x.shape[1] > 8 else x

    monkeypatch.setattr(BoundaryModule, "forward", by_length)
    if name == "as an assistant":  # any proposal is allowed
        assert check_repaired_model(model, dense, checks=[name]) == {name: "right"}
        return
    with pytest.raises(AssertionError, match=f"{name}: logits are off"):
        check_repaired_model(model, dense, checks=[name])


def test_threads_that_share_a_state_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the pass belonged to the model instead of the thread, with two always running."""
    model = repaired(tiny_model("llama"), LOOKING_BACK)
    both = Barrier(2)

    class Shared:
        def __init__(self) -> None:
            self.value: Any = None

        def get(self) -> Any:
            return self.value

        def set(self, value: Any) -> Any:
            before, self.value = self.value, value
            if value is not None and current_thread() is not main_thread():
                with suppress(BrokenBarrierError):  # the last one times out, once
                    both.wait(timeout=5)
            return before

        reset = set

    monkeypatch.setattr(previous, "_PASS", Shared())
    result = "noticed"
    with suppress(AssertionError, RuntimeError, KeyError):
        result = check_repaired_model(model, checks=["threads"])["threads"]
    assert result != "right"


def test_the_model_stays_as_it_is() -> None:
    model = repaired(tiny_model("llama"), LOOKING_BACK).train()
    receiver(model, 1).eval()  # a frozen part stays frozen
    modes = [module.training for module in model.modules()]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    check_repaired_model(model, checks=QUICK)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="unknown check 'statics cache'; did you mean 'static"):
        check_repaired_model(model, checks=["statics cache"])
