"""Recovered models are trained: by transformers' own Trainer, and with shared or own weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_windows
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import ghostlib as gl
from ghostlib.recovery.recipe import Recipe

pytestmark = pytest.mark.thorough


def repaired(name: str) -> PreTrainedModel:
    model, options = tiny_model("llama"), {"relative_ridge": 1e-3, "share": False}
    return gl.recover(model, tiny_windows(6, 40), [2, 3, 5], name, **options)


def trained(
    folder: Path, name: str, steps: int, resume: bool = False, **options: Any
) -> tuple[PreTrainedModel, Trainer]:
    """A repaired model trained with two windows a step and a checkpoint every second step."""
    model = repaired(name)
    data = [{"input_ids": row, "labels": row} for row in tiny_windows(8, 16)]
    settings = {
        "max_steps": steps,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.01,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    arguments = TrainingArguments(str(folder), **(settings | options))
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return model.eval(), trainer


@pytest.mark.parametrize("name", ["ghost", "three-branch"])
def test_training_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    before = repaired(name).state_dict()
    first, _ = trained(tmp_path / "run", name, 2)
    resumed, trainer = trained(tmp_path / "run", name, 4, resume=True)
    uninterrupted, _ = trained(tmp_path / "uninterrupted", name, 4)
    first, last, expected = (model.state_dict() for model in (first, resumed, uninterrupted))
    for key, value in before.items():
        torch.testing.assert_close(last[key], expected[key], msg=key)
        assert not torch.equal(last[key], first[key]), f"{key}: not trained after resumption"
        assert not torch.equal(first[key], value), f"{key} was not trained"
    # The model is saved next to the checkpoints, over an earlier one, and loaded.
    for _ in range(2):
        trainer.save_model()
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "run"), tiny_windows()
    assert torch.equal(loaded(ids).logits, resumed(ids).logits)


def test_the_best_checkpoint_is_loaded_in_the_end(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    # The highest loss, so that the best checkpoint is not the last.
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}
    model, trainer = trained(tmp_path, "three-branch", 4, **options)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for key, value in best.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_shards_of_an_earlier_checkpoint_do_not_stay(tmp_path: Path) -> None:
    old, new, ids = repaired("ghost"), repaired("two-branch"), tiny_windows()
    for sizes in (["10KB", "1GB"], ["1GB", "10KB"]):
        for model, size in zip((old, new), sizes, strict=True):
            model.save_pretrained(tmp_path, is_main_process=True, max_shard_size=size)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids).logits, new(ids).logits)


def step(model: PreTrainedModel) -> None:
    """One step of gradient descent, in place."""
    ids = tiny_windows()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def copies(model: PreTrainedModel, share: bool = True) -> dict[str, PreTrainedModel]:
    """Copies of ``model`` by every function that makes one."""
    ids, gap = tiny_windows(4, 40), gl.Boundary(2, 4)
    op = gl.solve(gl.calibrate(model, ids, [gap])[gap], relative_ridge=1e-3)
    options = {"relative_ridge": 1e-3, "share": share}
    return {
        "prune": gl.prune(model, [2, 3], share=share),
        "install": gl.install(model, {gap: op}, share=share),
        "recover": gl.recover(model, ids, [2, 3], "affine", **options),
        "folded": gl.recover(model, ids, [2, 3], "replaceme", share=share),
        "sequential": gl.recover(model, ids, [1, 3], fit="sequential", **options),
        "auto": gl.recover(model, ids, [2, 3], "auto", verbose=False, share=share),
        "recipe": Recipe(model, ids).choose([2, 3]).apply(model, share=share),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_training_a_copy_of_its_own_leaves_the_dense_model(tied: bool) -> None:
    model, ids = tiny_model("llama", tie_word_embeddings=tied), tiny_windows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shared = copies(model)
    for name, copied in copies(model, share=False).items():
        assert torch.equal(copied(ids).logits, shared[name](ids).logits), name
        dense = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
        assert not dense & {p.data_ptr() for p in copied.parameters()}, name
        head, table = copied.get_output_embeddings(), copied.get_input_embeddings()
        assert (head.weight is table.weight) == tied, name
        step(copied)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), (name, key)
        assert all(p.grad is None for p in model.parameters())


def test_training_a_copy_that_shares_changes_both() -> None:
    """As the docstrings of recover, install and prune say."""
    model, ids = tiny_model("llama"), tiny_windows()
    before = model(ids).logits
    step(gl.prune(model, [2, 3]))
    assert not torch.allclose(model(ids).logits, before, rtol=1e-2)
    for function in (gl.recover, gl.install, gl.prune):
        assert "share: False" in str(function.__doc__) or "share: as in" in str(function.__doc__)
