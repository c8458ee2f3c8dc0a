"""Repairs that go into the down-projection before a gap, on models of several layouts."""

from typing import Any

import pytest
import torch
from conftest import LAYERS, saved_and_loaded, tiny_model, tiny_windows
from torch import Tensor

import ghostlib as gl
from ghostlib.models.layers import listen
from ghostlib.models.streams import record
from ghostlib.recovery.recipe import BUDGETS, Recipe
from ghostlib.selection.trials import Trials

GAP = gl.Boundary(2, 4)
FOLDED = ["replaceme", "refit", "ghost-refit", "ghost-refit-relative"]
LAYOUTS = ["llama", "qwen2", "phi3", "gpt_neox", "opt", "gpt2"]  # gated, biased, parallel, Conv1D
NORMALISED = ["gemma2", "gemma3_text", "olmo2"]
RIDGE = {"relative_ridge": 1e-6}


def solved(model: Any, name: str, gap: gl.Boundary = GAP, **options: Any) -> gl.Operator:
    regressor = gl.OPERATORS[name].regressor
    stats = gl.calibrate(model, tiny_windows(12, 24), [gap], regressors=[regressor])
    return gl.solve(stats.of(regressor)[gap], name, **(options or RIDGE))


def stream_after(model: Any, index: int, ids: Tensor) -> Tensor:
    """Input of layer ``index`` of a repaired model, after its module if it has one."""
    outputs: list[Tensor] = []
    if boundary := getattr(gl.receiver(model, index), "boundary", None):
        boundary.register_forward_hook(lambda m, args, out: outputs.append(out))
    streams = record(model, ids, [index, len(gl.decoder_layers(model))])
    return outputs[0] if outputs else streams[index]


@pytest.mark.thorough
@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_installed_repair_is_the_one_that_was_solved(layout: str, name: str) -> None:
    model, ids = tiny_model(layout), tiny_windows(3, 17, seed=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    op = solved(model, name)
    recovered = gl.install(model, {GAP: op})

    recorded: list[tuple[Tensor, Tensor]] = []
    with listen(model, [GAP.start], lambda start, read, out: recorded.append((read, out))):
        stream = record(model, ids, [GAP.start, LAYERS])[GAP.start]
    hidden, output = (t.view(*ids.shape, -1) for t in recorded[0])
    expected = op.apply(stream, hidden=hidden, output=output)
    torch.testing.assert_close(stream_after(recovered, 2, ids), expected, rtol=1e-4, atol=1e-4)

    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the dense model changed: {key}"
    shared = {p.data_ptr() for p in model.parameters()}
    new = [key for key, p in recovered.named_parameters() if p.data_ptr() not in shared]
    layer = gl.decoder_layers(recovered)[1]
    folded = {n for n, p in layer.named_parameters() if p.data_ptr() not in shared}
    assert len(folded) in (1, 2) and all(n.split(".")[-1] in ("weight", "bias") for n in folded)
    assert len(new) == len(folded) + (1 if name.startswith("ghost") else 0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["replaceme", "refit"])
def test_a_free_repair_leaves_the_stock_class_and_its_size(name: str, tmp_path: Any) -> None:
    model = tiny_model("llama")
    recovered = gl.install(model, {GAP: solved(model, name)})
    pruned = gl.prune(model, GAP.removed)
    assert type(recovered) is type(model) and gl.OPERATORS[name].free
    assert gl.count_parameters(recovered) == gl.count_parameters(pruned)
    assert gl.flops(recovered, 8) == gl.flops(pruned, 8)
    loaded = saved_and_loaded(recovered, tiny_windows(2, 9), tmp_path)
    assert type(loaded) is type(model)


def test_the_joint_repair_costs_what_ghost_costs() -> None:
    model = tiny_model("llama")
    joint, ghost = (
        gl.install(model, {GAP: solved(model, name)}) for name in ("ghost-refit", "ghost")
    )
    assert gl.count_parameters(joint) == gl.count_parameters(ghost)
    assert gl.flops(joint, 8) == gl.flops(ghost, 8)


@pytest.mark.parametrize("layout", NORMALISED)
def test_layouts_that_normalise_what_the_mlp_writes_are_refused(layout: str) -> None:
    model = tiny_model(layout)
    with pytest.raises(ValueError, match="normalises, scales or routes what its MLP"):
        gl.recover(model, tiny_windows(4, 12), [2, 3], "refit")
    assert "refit" not in Recipe(model, tiny_windows(4, 12), budget="any").families
    with pytest.raises(ValueError, match="normalises, scales or routes what its MLP"):
        Recipe(model, tiny_windows(4, 12), candidates=["refit"])


@pytest.mark.parametrize("fit", ["teacher", "sequential"])
def test_a_gap_at_layer_0_is_refused(fit: str) -> None:
    model, ids = tiny_model("llama"), tiny_windows(4, 12)
    for layers in ([0, 1], [0, 3]):
        with pytest.raises(ValueError, match="no layer before it: keep layer 0"):
            gl.recover(model, ids, layers, "refit", fit=fit)
    stats = gl.calibrate(model, ids, [(0, 2), (2, 4)], regressors=["x, h"])
    assert list(stats.of("x, h")) == [gl.Boundary(2, 4)]
    assert list(stats) == [gl.Boundary(0, 2), gl.Boundary(2, 4)]


def test_a_bias_with_nowhere_to_go_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="the down-projection has none"):
        gl.install(model, {GAP: solved(model, "refit", relative_ridge=1e-3, bias=True)})


def test_a_fold_that_the_dtype_does_not_hold_is_refused() -> None:
    model = tiny_model("llama").bfloat16()
    op = solved(tiny_model("llama"), "ghost-refit")
    W = op.M[:16] + torch.eye(16)
    U, s, Vh = torch.linalg.svd(W)
    s[-1] = 1e-5 * s[0]
    bad = gl.Operator(
        torch.cat([U @ torch.diag(s) @ Vh - torch.eye(16), op.M[16:]]), op.family, op.regressor
    )
    with pytest.raises(ValueError, match="I \\+ M is close to singular"):
        gl.install(model, {GAP: bad})
    gl.install(tiny_model("llama"), {GAP: bad})  # float32 has room


# --- the recipe's budget ----------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("budget", list(BUDGETS))
def test_a_budget_bounds_what_the_recipe_adds(budget: str) -> None:
    model, ids = tiny_model("llama"), tiny_windows(8, 32)
    recovered = gl.recover(model, ids, [2, 3], "auto", budget=budget, verbose=False)
    pruned = gl.prune(model, [2, 3])
    most = {"none": 0, "matrix": 16 * 16, "any": 2 * 16 * 16}[budget]
    assert gl.count_parameters(recovered) - gl.count_parameters(pruned) <= most
    assert recovered.config.recovery["recipe"]["repair"] in ("pruned", *BUDGETS[budget])
    if budget == "none":
        assert type(recovered) is type(model)


def test_an_unknown_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown budget 'matrices'; did you mean 'matrix'"):
        Recipe(tiny_model("llama"), tiny_windows(4, 12), budget="matrices")


def test_no_repair_that_harms_one_kind_of_text_is_admitted(monkeypatch: Any) -> None:
    """A candidate with the lowest mean that is worse on one window gives way to a safe one."""
    model, calibration, names = tiny_model("llama"), tiny_windows(8, 32), ["ghost", "two-branch"]
    windows = len(Recipe(model, calibration, candidates=names).judges)
    assert windows > 1
    safe = torch.full((windows,), 4.0)
    better_on_average = torch.tensor([4.1] + [3.0] * (windows - 1))
    by_reads = {(): safe + 1, ("x",): safe, ("x", "n(x)"): better_on_average}

    def losses(layers: Any, operators: Any) -> Tensor:
        reads = [tuple(f.name for f in op.regressor.features) for op in operators.values()]
        return by_reads[reads[0] if reads else ()].double()

    monkeypatch.setattr(Trials, "losses", lambda _, *variant: losses(*variant))
    assert Recipe(model, calibration, candidates=names).choose([2, 3]).repair == "ghost"
    by_reads["x", "n(x)"] = torch.full((windows,), 3.9)
    assert Recipe(model, calibration, candidates=names).choose([2, 3]).repair == "two-branch"
