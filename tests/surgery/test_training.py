"""Recovered models are trained: by transformers' own Trainer, and beside the dense model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_windows
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import ghostlib as gl
from ghostlib.recovery.recipe import Recipe

pytestmark = pytest.mark.thorough

LAYERS_REMOVED = [2, 3, 5]


def repaired(name: str) -> PreTrainedModel:
    ids = tiny_windows(6, 40)
    return gl.recover(
        tiny_model("llama"), ids, LAYERS_REMOVED, name, relative_ridge=1e-3, share=False
    )


def trained(
    folder: Path, name: str, steps: int, resume: bool = False, **options: Any
) -> tuple[PreTrainedModel, Trainer]:
    """A repaired model after so many steps of two windows, a checkpoint every second step."""
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
    whole, _ = trained(tmp_path / "whole", name, 4)
    states = [model.state_dict() for model in (resumed, whole, first)]
    for key, value in before.items():
        torch.testing.assert_close(states[0][key], states[1][key], msg=key)
        assert not torch.equal(states[0][key], states[2][key]), f"{key}: nothing after resumption"
        assert not torch.equal(states[2][key], value), f"{key} was not trained"
    # and what is saved, beside the checkpoints and over itself, is read back
    for _ in range(2):
        trainer.save_model()
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "run"), tiny_windows()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, resumed(ids).logits)


def test_the_best_checkpoint_is_loaded_in_the_end(tmp_path: Path) -> None:
    how = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    how |= {
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }  # so that it is not the last
    model, trainer = trained(tmp_path, "three-branch", 4, **how)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for key, value in best.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_shards_of_an_earlier_checkpoint_do_not_stay(tmp_path: Path) -> None:
    old, new, ids = repaired("ghost"), repaired("two-branch"), tiny_windows()
    for first, options in ((old, {"max_shard_size": "10KB"}), (old, {})):
        first.save_pretrained(tmp_path, is_main_process=True, **options)
        sizes = {} if options else {"max_shard_size": "10KB"}
        new.save_pretrained(tmp_path, is_main_process=True, **sizes)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, new(ids).logits)


def step(model: PreTrainedModel) -> None:
    """One step of gradient descent, in place."""
    ids = tiny_windows()
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)


def copies(model: PreTrainedModel, **how: Any) -> dict[str, PreTrainedModel]:
    """A copy of every way to make one."""
    ids, gap = tiny_windows(4, 40), gl.Boundary(2, 4)
    op = gl.solve(gl.calibrate(model, ids, [gap])[gap], relative_ridge=1e-3)
    return {
        "prune": gl.prune(model, [2, 3], **how),
        "install": gl.install(model, {gap: op}, **how),
        "recover": gl.recover(model, ids, [2, 3], "affine", relative_ridge=1e-3, **how),
        "folded": gl.recover(model, ids, [2, 3], "replaceme", **how),
        "sequential": gl.recover(model, ids, [1, 3], fit="sequential", relative_ridge=1e-3, **how),
        "auto": gl.recover(model, ids, [2, 3], "auto", verbose=False, **how),
        "recipe": Recipe(model, ids).choose([2, 3]).apply(model, **how),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_training_a_copy_of_its_own_leaves_the_dense_model(tied: bool) -> None:
    model, ids = tiny_model("llama", tie_word_embeddings=tied), tiny_windows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shared = copies(model)
    for name, copied in copies(model, share=False).items():
        with torch.no_grad():
            assert torch.equal(copied(ids).logits, shared[name](ids).logits), name
        theirs = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
        assert not theirs & {p.data_ptr() for p in copied.parameters()}, name
        head, table = copied.get_output_embeddings(), copied.get_input_embeddings()
        assert (head.weight is table.weight) == tied, name
        step(copied)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), (name, key)
        assert all(p.grad is None for p in model.parameters())


def test_training_a_copy_that_shares_changes_both() -> None:
    """As the docstrings of recover, install and prune say."""
    model, ids = tiny_model("llama"), tiny_windows()
    with torch.no_grad():
        before = model(ids).logits
        step_of = torch.enable_grad()(step)
        step_of(gl.prune(model, [2, 3]))
        assert not torch.allclose(model(ids).logits, before, rtol=1e-2)
    for function in (gl.recover, gl.install, gl.prune):
        assert "share: False" in str(function.__doc__) or "share: as in" in str(function.__doc__)
