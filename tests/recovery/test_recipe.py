"""The recipe against an independent path: what it holds out, fits and chooses."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYERS, WIDTH, saved_and_loaded, tiny_model, tiny_windows
from torch import Tensor, nn
from transformers import PreTrainedModel

import ghostlib as gl
from ghostlib.models.architectures import decoder_layers
from ghostlib.operators.families import FAMILIES
from ghostlib.operators.paths import RIDGES, choose_ridge, choose_ridges
from ghostlib.operators.solve import Operator, solve
from ghostlib.recovery import recipe as recipe_module
from ghostlib.recovery.recipe import BUDGETS, PRUNED, SHORTLIST, Choice, Recipe
from ghostlib.selection.criteria import needed_boundaries
from ghostlib.selection.trials import Trials

pytestmark = pytest.mark.thorough

CANDIDATES = BUDGETS["any"]
LENGTH = 40
HELD_OUT = [1, 3, 5]  # half of six short windows
REMOVED = (1, 2, 4)
GAPS = gl.runs(REMOVED, LAYERS)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def windows() -> Tensor:
    return tiny_windows(6, LENGTH)


def split_windows() -> tuple[Tensor, Tensor]:
    """The fitted windows and those held out, by hand."""
    return windows()[[i for i in range(6) if i not in HELD_OUT]], windows()[HELD_OUT]


def moments(model: PreTrainedModel, ids: Tensor, repair: str) -> dict[gl.Boundary, gl.Moments]:
    regressor = FAMILIES[repair].regressor
    return gl.calibrate(model, ids, GAPS, regressors=[regressor]).of(regressor)


def fix_losses(
    monkeypatch: pytest.MonkeyPatch, losses: dict[str, float], other: float = 2.0
) -> None:
    """Let trials give these losses, by the operator's name."""

    def on_windows(self, layers, operators) -> Tensor:
        names = {op.name for op in operators.values()} or {PRUNED}
        return torch.full((len(HELD_OUT),), losses.get(names.pop(), other), dtype=torch.float64)

    monkeypatch.setattr(Trials, "losses", on_windows)


# --- windows held out -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "length", "held_out"),
    [
        (16, 2048, [4, 12]),  # 8 + 8 windows of two corpora: one of each
        (32, 2048, [8, 24]),
        (8, 1024, [1, 3, 5, 7]),
        (5, 512, [1, 3]),  # never more than half
        (3, 24, [1]),
        (2, 24, [1]),
        (9, 4096, [4]),
        (4, 6000, [2]),  # longer windows: one
    ],
)
def test_windows_held_out_are_spread_and_whole(count, length, held_out) -> None:
    ids = torch.arange(count)[:, None].expand(count, length)
    recipe = gl.Recipe(tiny_model("llama", max_position_embeddings=8192), ids)
    assert recipe.judges[:, 0].tolist() == held_out
    assert recipe.fitted[:, 0].tolist() == [i for i in range(count) if i not in held_out]
    assert recipe.judges.shape[1] == recipe.fitted.shape[1] == length


# --- the choice of a repair -------------------------------------------------------------------


def test_every_loss_is_that_of_a_model_recovered_from_the_fitted_windows(model) -> None:
    fitted, judges = split_windows()
    choice = gl.Recipe(model, windows()).choose(REMOVED)
    by_window = {PRUNED: gl.window_losses(gl.prune(model, REMOVED), judges)}
    for repair in CANDIDATES:
        train, held_out = (moments(model, ids, repair) for ids in (fitted, judges))
        operators = {}
        for gap in GAPS:
            several = len(FAMILIES[repair].regressor.sources) > 1
            ridge: Any = choose_ridges(train[gap], held_out[gap]) if several else None
            ridge = ridge or choose_ridge(train[gap], held_out=held_out[gap])
            operators[gap] = solve(train[gap], repair, relative_ridge=ridge)
            grid = [solve(train[gap], repair, relative_ridge=r) for r in RIDGES]
            best, error = min(map(held_out[gap].error, grid)), held_out[gap].error(operators[gap])
            if several:  # a coarser grid for each feature
                assert error <= 1.05 * best
            else:
                assert error == pytest.approx(best, rel=1e-9)
            if repair == choice.repair:
                assert choice.ridges[gap] == ridge
        by_window[repair] = gl.window_losses(gl.install(model, operators), judges)
    expected = {repair: float(losses.mean()) for repair, losses in by_window.items()}
    assert choice.rivals == pytest.approx(expected, rel=1e-5)
    assert list(choice.rivals) == [PRUNED, *CANDIDATES]
    safe = torch.minimum(by_window[PRUNED], by_window["ghost"]) + 0.01
    admitted = [r for r in expected if r in (PRUNED, "ghost") or (by_window[r] <= safe).all()]
    assert choice.repair == min(admitted, key=lambda repair: expected[repair]) != PRUNED
    assert choice.layers == REMOVED and choice.tokens == judges.numel() == 120


@pytest.mark.parametrize("repair", [*CANDIDATES, "ghost-relative", "three-branch-relative"])
def test_the_choice_is_solved_from_all_windows(model, repair, capsys, monkeypatch) -> None:
    fix_losses(monkeypatch, {PRUNED: 3.0})
    recovered = gl.recover(model, windows(), REMOVED, "auto", candidates=[repair], batch_size=2)
    choice = gl.Recipe(model, windows(), candidates=[repair]).choose(REMOVED)
    assert choice.repair == repair
    all_moments = moments(model, windows(), repair)
    for gap in GAPS:
        op = solve(all_moments[gap], repair, relative_ridge=choice.ridges[gap])
        torch.testing.assert_close(choice.operators[gap].M, op.M, rtol=1e-6, atol=1e-8)
        assert choice.operators[gap].residual == pytest.approx(op.residual, rel=1e-6)
    with torch.no_grad():
        expected = gl.install(model, choice.operators)(windows()).logits
        torch.testing.assert_close(recovered(windows()).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(choice.apply(model)(windows()).logits, expected)
    assert capsys.readouterr().out.startswith(f"auto: {repair} for layers 1–2 (ridge ")


def test_ties_go_to_no_repair_and_then_to_the_first_named(model, monkeypatch) -> None:
    idle = tiny_model("llama")
    layer: Any = decoder_layers(idle)[3]
    for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
        nn.init.zeros_(module.weight)
    choice = gl.Recipe(idle, windows()).choose([3])  # which did nothing to the stream
    assert len(set(choice.rivals.values())) == 1 and choice.repair == PRUNED
    fix_losses(monkeypatch, {PRUNED: 3.0})
    assert gl.Recipe(model, windows()).choose([3]).repair == CANDIDATES[0]
    backwards = gl.Recipe(model, windows(), candidates=CANDIDATES[::-1])
    one_matrix = [name for name in CANDIDATES if not name.startswith("two-branch")]
    assert backwards.choose([3]).repair == one_matrix[-1]


@pytest.mark.parametrize(("loss", "repair"), [(2.96, "ghost"), (2.94, "two-branch")])
def test_two_matrices_must_be_worth_it(model, monkeypatch, loss: float, repair: str) -> None:
    fix_losses(monkeypatch, {PRUNED: 4.0, "ghost": 3.0, "two-branch": loss})
    recipe = gl.Recipe(model, windows(), candidates=["ghost", "two-branch"])
    assert recipe.choose([3]).repair == repair


def test_the_pruned_model_can_win(model, monkeypatch, capsys) -> None:
    fix_losses(monkeypatch, {PRUNED: 1.0})
    recovered = gl.recover(model, windows(), REMOVED, "auto")
    assert type(recovered) is type(model) and not hasattr(recovered.config, "ghost")
    with torch.no_grad():
        expected = gl.prune(model, REMOVED)(windows()).logits
        assert torch.equal(recovered(windows()).logits, expected)
    choice = gl.Recipe(model, windows()).choose(REMOVED)
    assert not choice.operators and not choice.ridges
    assert capsys.readouterr().out == str(choice) + "\n"
    assert str(choice).startswith("auto: pruned for layers 1–2, 4; loss on 120 held-out ")


def test_nan_never_wins(model, monkeypatch) -> None:
    fix_losses(monkeypatch, {PRUNED: math.nan, "ghost": 3.0, "two-branch": math.nan})
    candidates = ("two-branch", "ghost")
    choice = gl.Recipe(model, windows(), candidates=candidates).choose([2])
    assert choice.repair == "ghost"
    assert choice.rivals == {PRUNED: math.inf, "two-branch": math.inf, "ghost": 3.0}
    assert choice.summary["losses"] == {PRUNED: None, "two-branch": None, "ghost": 3.0}
    assert str(choice).endswith("ghost 3.000, pruned inf, two-branch inf")
    fix_losses(monkeypatch, {}, other=math.nan)
    with pytest.raises(ValueError, match=r"every repair of the recipe give NaN .* a wider dtype"):
        gl.Recipe(model, windows(), candidates=candidates).choose([2])


def test_earlier_trials_are_reused(model, monkeypatch) -> None:
    recipe = gl.Recipe(model, windows(), candidates=("refit", "ghost", "two-branch"))
    every = recipe.choose([2])
    alone = gl.Recipe(model, windows(), candidates=("refit", "ghost")).choose([2])
    monkeypatch.setattr(recipe._trials, "losses", None)
    some = recipe.choose([2], among=("refit", "ghost"))
    assert (some.losses, some.repair) == (alone.losses, alone.repair)
    assert set(some.losses) < set(every.losses)
    assert recipe.fit([2], some.repair) is some.operators
    with pytest.raises(ValueError, match=r"unknown candidate 'replaceme'.* Known: refit, ghost"):
        recipe.choose([2], among=["replaceme"])
    assert {repair for _, repair in recipe.choose([2], among=[]).losses} == {PRUNED}


# --- the choice of layers ---------------------------------------------------------------------


def test_a_number_of_layers_is_the_best_of_the_shortlist(capsys) -> None:
    model, fitted = tiny_model("gpt2", seed=1), split_windows()[0]
    sets = {tuple(gl.select_layers(model, fitted, 2, criterion)) for criterion in SHORTLIST}
    assert len(sets) > 1
    recipe = gl.Recipe(model, windows())
    choice = recipe.choose(2)
    assert set(recipe.shortlist(2)) == {layers for layers, _ in choice.losses} == sets
    alone = {layers: recipe.choose(layers).losses for layers in sets}
    assert choice.losses == {key: loss for losses in alone.values() for key, loss in losses.items()}
    assert choice.losses[choice.layers, choice.repair] == min(choice.losses.values())
    recovered = gl.recover(model, windows(), 2, "auto")
    assert recovered.config.num_hidden_layers == LAYERS - 2
    with torch.no_grad():
        assert torch.equal(recovered(windows()).logits, choice.apply(model)(windows()).logits)
    assert f"best of {len(sets)} choices of layers" in capsys.readouterr().out


def test_one_pass_collects_what_several_choices_need(model, monkeypatch) -> None:
    passes = []

    def counted(model, ids, boundaries, **options):
        passes.append((len(ids), boundaries))
        return gl.calibrate(model, ids, boundaries, **options)

    monkeypatch.setattr("ghostlib.recovery.recipe.calibrate", counted)
    recipe = gl.Recipe(model, windows())
    recipe.collect([(1, 2), (1, 2, 4), (0,)])
    gaps = [gl.Boundary(0, 1), gl.Boundary(1, 3), gl.Boundary(4, 5)]
    assert passes == [(3, gaps), (3, gaps)]  # the fitted windows, and those held out
    losses = recipe.choose((1, 2, 4)).losses
    assert len(passes) == 2
    assert gl.Recipe(model, windows()).choose([4, 2, 1]).losses == pytest.approx(losses)


def test_a_choice_is_explained_in_one_line() -> None:
    losses = {(REMOVED, PRUNED): 4.0, (REMOVED, "ghost"): 2.5, ((1, 2, 3), "ghost"): 3.0}
    operators = dict.fromkeys(GAPS, Operator.of(torch.eye(2)))
    ridges: Any = {GAPS[0]: 0.01, GAPS[1]: (1e-3, 0.1)}
    choice = Choice(REMOVED, "ghost", operators, ridges, losses, 4096)
    assert str(choice) == (
        "auto: ghost for layers 1–2 (ridge 1e-02), 4 (ridge 1e-03/1e-01), best of 2 choices of "
        "layers; loss on 4,096 held-out calibration tokens: ghost 2.500, pruned 4.000"
    )
    losses = {PRUNED: 4.0, "ghost": 2.5}
    assert choice.summary == {"repair": "ghost", "losses": losses, "tokens": 4096}


# --- invariances ------------------------------------------------------------------------------


def rotated(R: Tensor) -> PreTrainedModel:
    """The same llama with its stream multiplied by ``R``, a multiple of a rotation."""
    model = tiny_model("llama")
    Q = R / (float(R.square().sum().sqrt()) / WIDTH**0.5)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ R)
        model.lm_head.weight.copy_(model.lm_head.weight @ Q)
        for layer in model.model.layers:
            attn, mlp = layer.self_attn, layer.mlp
            for reader in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj):
                reader.weight.copy_(reader.weight @ Q)
            for writer in (attn.o_proj, mlp.down_proj):
                writer.weight.copy_(R.T @ writer.weight)
    return model


def rotation() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q


@pytest.mark.parametrize("R", [16 * torch.eye(WIDTH), rotation()], ids=["scale", "rotation"])
def test_scale_and_basis_of_the_stream_change_no_choice(model, R) -> None:
    variant = rotated(R)
    with torch.no_grad():
        logits = variant(windows()).logits
        torch.testing.assert_close(logits, model(windows()).logits, rtol=1e-3, atol=1e-3)
    expected, choice = (gl.Recipe(m, windows()).choose(REMOVED) for m in (model, variant))
    assert choice.repair == expected.repair
    assert choice.losses == pytest.approx(expected.losses, rel=1e-4)
    assert list(choice.ridges.values()) == list(expected.ridges.values())


def test_order_of_windows_and_batches_change_no_choice(model) -> None:
    order = [2, 5, 0, 3, 4, 1]  # the same windows are held out
    expected = gl.Recipe(model, windows()).choose(REMOVED)
    choice = gl.Recipe(model, windows()[order], batch_size=4).choose(REMOVED)
    assert choice.repair == expected.repair and choice.ridges == expected.ridges
    assert choice.losses == pytest.approx(expected.losses, rel=1e-5)


# --- recovered models -------------------------------------------------------------------------


def test_every_architecture_is_served_or_told_what_serves_it(any_tiny, tmp_path, capsys) -> None:
    ids = windows()
    if any_tiny.config.model_type == "olmo2":
        assert set(gl.Recipe(any_tiny, ids).families) == {"ghost", "ghost-relative"}
        remedy = r"without a norm: .* candidates=\('ghost', 'ghost-relative'\)"
        with pytest.raises(ValueError, match=remedy):
            gl.recover(any_tiny, ids, REMOVED, "auto", candidates=["two-branch"])
    recovered = gl.recover(any_tiny, ids, REMOVED, "auto")
    assert recovered.config.num_hidden_layers == LAYERS - 3
    loaded = saved_and_loaded(recovered, ids, tmp_path)
    text = loaded.generate(ids[:1, :5], max_new_tokens=4, do_sample=False)
    assert text.shape[1] <= 9
    assert capsys.readouterr().out.count("auto: ") == 1


# --- bad input --------------------------------------------------------------------------------


def test_low_rank_is_refused(model) -> None:
    with pytest.raises(ValueError, match="cannot choose low-rank, which takes no ridge alone"):
        Recipe(model, windows(), candidates=("ghost", "low-rank"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(6, LENGTH)}, "dense model's text: leave out attention_mask"),
        ({"skip_leading": 1}, "dense model's text: leave out skip_leading"),
        ({"calibration": {}}, "give token windows, not statistics"),
        ({"operator": "ghost", "layers": 2}, r"got the number 2: .* or use operator='auto'"),
    ],
)
def test_arguments_without_effect_on_auto_are_refused(model, changes, message) -> None:
    arguments = {"calibration": windows(), "layers": [2], "operator": "auto"} | changes
    with pytest.raises(ValueError, match=message):
        gl.recover(model, **arguments)


def test_an_ability_counts_besides_the_loss() -> None:
    """The best total of loss and weighted probe wins."""
    model, ids = tiny_model("llama"), windows()
    free, kept = gl.Recipe(model, ids), gl.Recipe(model, ids, keep="copying-16", weight=100.0)
    assert free.choose([2]).keep is None and "copying" not in str(free.choose([2]))
    choice = kept.choose([2])
    assert set(choice.kept) == set(choice.losses)
    admitted = {key for key in choice.losses if key[1] in (PRUNED, "ghost", choice.repair)}
    total = {key: choice.losses[key] + 100 * choice.kept[key] for key in admitted}
    assert choice.repair == min(total, key=total.__getitem__)[1]
    assert choice.summary["copying-16"] == choice.kept[(2,), choice.repair]
    assert f"; copying-16 {choice.summary['copying-16']:.2f}" in str(choice)
    scores = kept._trials.abilities((2,), {})["copying-16"]
    assert choice.kept[(2,), PRUNED] == pytest.approx(float(scores.mean()))


def test_to_keep_an_ability_layers_are_searched_by_it(monkeypatch) -> None:
    model, searches = tiny_model("llama"), []

    def counted(model, calibration, n, name, **options):
        searches.append(name)
        return gl.select_layers(model, calibration, n, name, **options)

    monkeypatch.setattr(recipe_module, "select_layers", counted)
    recipe = gl.Recipe(model, windows(), keep="copying-16", weight=0.3, candidates=["ghost"])
    sets = recipe.shortlist(2)
    assert searches == [*SHORTLIST, "abilities"]
    calibration = gl.calibrate(model, recipe.fitted, needed_boundaries("abilities", 2, LAYERS))
    options = {"keep": "copying-16", "weight": 0.3, "windows": recipe.judges[:1], "tries": 9}
    assert tuple(gl.select_layers(model, calibration, 2, "abilities", **options)) in sets
    with pytest.raises(ValueError, match="probe 'names' cannot be run: it needs a tokenizer"):
        gl.Recipe(model, windows(), keep="names")


@pytest.mark.parametrize("name", ["refit", "ghost-refit", "ghost-refit-relative"])
def test_a_repair_that_needs_a_ridge_chooses_it_on_held_out_windows(name: str) -> None:
    model, windows, gap = tiny_model("llama"), tiny_windows(8, 24), gl.Boundary(2, 4)
    family, recipe = gl.OPERATORS[name], gl.Recipe(model, windows, candidates=[name])
    parts = [
        gl.calibrate(model, part, [gap], regressors=[family.regressor]).of(family.regressor)[gap]
        for part in (recipe.fitted, recipe.judges)
    ]
    assert len(recipe.fitted) + len(recipe.judges) == 8 and len(recipe.judges) > 0
    ridges = gl.choose_ridges(*parts)
    if name == "refit":
        ridges = gl.choose_ridge(parts[0], held_out=parts[1])
    expected = gl.solve(parts[0] + parts[1], name, relative_ridge=ridges)
    torch.testing.assert_close(recipe.fit(gap.removed, name)[gap].M, expected.M)
    moments = {gap: parts[0] + parts[1]}
    models = [
        gl.install(model, {gap: expected}),
        gl.recover(model, windows, gap.removed, name),
        # Moments cannot be split again, and an option is obeyed: neither chooses a ridge.
        gl.recover(model, moments, gap.removed, name),
        gl.recover(model, windows, gap.removed, name, **dict(family.default)),
    ]
    with torch.no_grad():
        by_hand, chosen, default, fixed = (model(windows).logits for model in models)
    torch.testing.assert_close(chosen, by_hand)
    torch.testing.assert_close(default, fixed)
    assert not torch.allclose(default, by_hand)
    with pytest.raises(ValueError, match="unknown candidate 'ghost'.* Known: " + name):
        recipe.fit(gap.removed, "ghost")


def moe(**changes: Any) -> PreTrainedModel:
    """Dense MLPs in some layers; in the others routed ones, into which nothing can be folded."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return tiny_model("qwen2_moe", shared_expert_intermediate_size=8, **experts | changes)


@pytest.mark.parametrize("dense", [[0], [1, 2, 3, 4, 5]])
def test_each_gap_must_have_a_place(dense: list[int]) -> None:
    model = moe(mlp_only_layers=dense)
    recipe = Recipe(model, tiny_windows(4, 12), candidates=["refit", "ghost"])
    for layers in ((1,), (3, 4), (1, 3)):
        placed = all(gap.start - 1 in dense for gap in gl.runs(layers, LAYERS))
        assert set(recipe.choose(layers).rivals) == {PRUNED, "ghost", *["refit"] * placed}
        if not placed:
            with pytest.raises(ValueError, match="nothing can be folded"):
                recipe.fit(layers, "refit")
    assert gl.recover(model, tiny_windows(4, 12), 2, "auto", verbose=False).config.recovery


def test_a_number_of_layers_is_any_integer(model: PreTrainedModel) -> None:
    options: dict[str, Any] = {"candidates": ["ghost"], "verbose": False}
    first, second = (gl.recover(model, windows(), n, "auto", **options) for n in (2, np.int64(2)))
    assert first.config.recovery == second.config.recovery
