"""Folded repairs equal the same repair as a module, in every architecture, and cost nothing."""

from collections.abc import Callable

import pytest
import torch
from conftest import LAYERS, WIDTH, saved_and_loaded, tiny_model, tiny_windows
from torch import nn
from transformers import PreTrainedModel

import ghostlib as gl
from ghostlib import Boundary
from ghostlib.models.architectures import decoder_layers
from ghostlib.models.layers import down_projection
from ghostlib.models.streams import record
from ghostlib.operators.families import Family
from ghostlib.recovery.recipe import Recipe
from ghostlib.statistics.features import Regressor

GAPS = [Boundary(1, 3), Boundary(4, 5)]
REMOVED = [1, 2, 4]
MLP_OUTPUT = Regressor.parse("f")
NORM_AFTER = ("gemma2", "gemma3_text", "olmo2")


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.thorough
@pytest.mark.parametrize("tied", [True, False])
def test_a_folded_scale_is_a_scale_at_the_gap(any_tiny, tied):
    kind = any_tiny.config.model_type
    model = tiny_model(kind, tie_word_embeddings=tied).double()
    ids, before = tiny_windows(), state(model)
    operators = {}
    for gap, a in zip(GAPS, (1.7, 0.6), strict=True):
        X = torch.randn(40, WIDTH, dtype=torch.float64)
        operators[gap] = gl.solve(gl.Moments(WIDTH).update(X, a * X), "magnitude")
        assert torch.allclose(operators[gap].W, a * torch.eye(WIDTH, dtype=torch.float64))
    if kind == "olmo2":
        with pytest.raises(ValueError, match="of this olmo2 reads its stream without a norm"):
            gl.install(model, operators)
        return
    # Only the epsilon of a norm depends on the scale of the stream.
    for module in model.modules():
        for name in {"variance_epsilon", "eps"} & set(vars(module)):
            setattr(module, name, 1e-30)
    folded = gl.install(model, operators)
    as_module = {
        gap: gl.solve(gl.Moments(WIDTH).update(X, op.W[0, 0] * X), "scalar")
        for gap, op in operators.items()
    }
    expected = logits(gl.install(model, as_module), ids)
    torch.testing.assert_close(logits(folded, ids), expected, rtol=1e-4, atol=1e-4)
    assert type(folded) is type(model)
    assert gl.count_parameters(folded) == gl.count_parameters(gl.prune(model, REMOVED))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.thorough
@pytest.mark.parametrize(
    "names",
    [
        ("affine", "magnitude"),
        ("two-branch", "magnitude"),
        ("magnitude", "ghost", "magnitude"),
        ("magnitude", "refit", "magnitude"),
        ("ghost-refit", "magnitude"),
    ],
)
def test_a_folded_scale_also_scales_what_the_repairs_before_it_add(names):
    model, ids = tiny_model("llama"), tiny_windows(12, 40)
    operators = {}
    for start, name in zip((1, 3, 5), names, strict=False):
        gap = Boundary(start, start + 1)
        family = Family.of(name)
        stats = gl.calibrate(model, ids, [gap], regressors=[family.regressor])
        operators[gap] = gl.solve(stats.of(family.regressor)[gap], family)
    folded = gl.install(model, operators)
    at_the_gap = gl.install(model, operators, at_gap=True)
    torch.testing.assert_close(logits(folded, ids), logits(at_the_gap, ids), rtol=1e-3, atol=1e-3)
    linear = not {"affine", "two-branch"} & set(names)
    modules = sum("boundary" in name for name, _ in folded.named_parameters())
    assert not linear or modules == sum("ghost" in name for name in names), "scales are folded"


@pytest.mark.thorough
@pytest.mark.parametrize("tied", [True, False])
def test_folded_models_survive_saving(tied, tmp_path):
    model, ids = tiny_model("llama", tie_word_embeddings=tied), tiny_windows()
    for name in ("magnitude", "replaceme"):
        loaded = saved_and_loaded(gl.recover(model, ids, REMOVED, name), ids, tmp_path / name)
        head, table = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        assert (head.weight is table.weight) == tied


@pytest.mark.thorough
def test_replaceme_is_least_squares_on_the_last_mlp(any_tiny):
    """The repaired stream after the gap is R + F T, with T from lstsq on stored activations."""
    ids, gap = tiny_windows(4, 24), Boundary(2, 4)
    if any_tiny.config.model_type in NORM_AFTER:
        with pytest.raises(ValueError, match="normalises, scales or routes what its MLP returns"):
            gl.recover(any_tiny, ids, gap.removed, "replaceme")
        return
    F: list[torch.Tensor] = []
    hook = down_projection(any_tiny, gap.start - 1).register_forward_hook(
        lambda module, args, output: F.append(output.detach().reshape(-1, WIDTH).double())
    )
    dense = record(any_tiny, ids, gap)
    hook.remove()
    (f,) = F
    x, y = (dense[index].flatten(0, 1).double() for index in gap)
    T = torch.linalg.lstsq(f, y - (x - f)).solution
    recovered = gl.recover(any_tiny, ids, gap.removed, "replaceme")
    assert type(recovered) is type(any_tiny)
    repaired = record(recovered, ids, [gap.start])[gap.start].flatten(0, 1).double()
    torch.testing.assert_close(repaired, x - f + f @ T, rtol=1e-3, atol=1e-3)


def test_mlp_moments_come_from_the_same_pass():
    model, ids = tiny_model("llama"), tiny_windows(3, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    gaps = [Boundary(0, 2), Boundary(2, 4), Boundary(2, 5)]
    stats = gl.calibrate(
        model, ids, gaps, regressors=[MLP_OUTPUT], attention_mask=mask, batch_size=2
    )
    of_mlp = stats.of(MLP_OUTPUT)
    assert set(of_mlp) == set(gaps[1:]), "nothing is before layer 0"
    assert of_mlp[gaps[1]].G is of_mlp[gaps[2]].G
    assert of_mlp[gaps[1]].tokens == stats[gaps[1]].tokens == 52
    assert of_mlp[gaps[1]].regressor == MLP_OUTPUT
    plain = gl.calibrate(model, ids, gaps, attention_mask=mask, batch_size=2)
    with pytest.raises(ValueError, match="no moments of f were collected"):
        plain.of(MLP_OUTPUT)
    for gap in gaps:
        assert torch.equal(plain[gap].B, stats[gap].B)


def test_moments_of_the_wrong_regressor_are_refused(tmp_path):
    model, ids, gap = tiny_model("llama"), tiny_windows(), Boundary(2, 4)
    stats = gl.calibrate(model, ids, [gap], regressors=[MLP_OUTPUT])
    of_mlp = stats.of(MLP_OUTPUT)[gap]
    with pytest.raises(ValueError, match=r"replaceme is solved from moments of f, these are of x"):
        gl.solve(stats[gap], "replaceme")
    with pytest.raises(ValueError, match=r"ghost is solved from moments of x, these are of f"):
        gl.solve(of_mlp, "ghost")
    with pytest.raises(ValueError, match="different regressor cannot be added"):
        _ = stats[gap] + of_mlp
    of_mlp.save(tmp_path / "mlp.safetensors")
    loaded = gl.Moments.load(tmp_path / "mlp.safetensors")
    assert loaded.regressor == MLP_OUTPUT and (loaded + of_mlp).regressor == MLP_OUTPUT
    from_stats = gl.recover(model, stats, gap.removed, "replaceme")
    from_windows = gl.recover(model, ids, gap.removed, "replaceme")
    assert torch.equal(logits(from_stats, ids), logits(from_windows, ids))


def test_a_gap_at_the_first_layer_has_no_mlp_before_it():
    model, ids = tiny_model("llama"), tiny_windows()
    with pytest.raises(ValueError, match=r"boundary \(0, 2\) has no layer before it: keep layer 0"):
        gl.recover(model, ids, [0, 1], "replaceme")
    x, y, output = torch.randn(3, 40, WIDTH)
    moments = gl.Moments(WIDTH, regressor=MLP_OUTPUT).update(x, y, output=output)
    with pytest.raises(ValueError, match="replaceme acts on the MLP before the gap"):
        gl.install(model, {Boundary(0, 2): gl.solve(moments, "replaceme")})


def test_magnitude_is_the_mean_of_linearpatch():
    model, ids, gap = tiny_model("llama"), tiny_windows(), Boundary(2, 4)
    moments = gl.calibrate(model, ids, [gap])[gap]
    scale, patch = (gl.solve(moments, name).W.diagonal() for name in ("magnitude", "linearpatch-d"))
    assert float(scale[0]) == pytest.approx(float(patch.mean()))


def test_a_low_rank_repair_is_stored_as_two_factors(tmp_path):
    model, ids, gap = tiny_model("llama"), tiny_windows(), Boundary(2, 4)
    stats = gl.calibrate(model, ids, [gap])
    op = gl.solve(stats[gap], "low-rank", rank=3)
    recovered = gl.recover(model, stats, gap.removed, "low-rank", rank=3)
    boundary = decoder_layers(recovered)[gap.start].boundary
    assert (tuple(boundary.A.shape), tuple(boundary.B.shape)) == ((WIDTH, 3), (3, WIDTH))
    torch.testing.assert_close((boundary.A @ boundary.B).double(), op.M, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(boundary(x), op.apply(x), rtol=1e-4, atol=1e-5)
    assert saved_and_loaded(recovered, ids, tmp_path).config.ghost[0]["rank"] == 3
    pruned = gl.prune(model, gap.removed)
    extra = gl.count_parameters(recovered) - gl.count_parameters(pruned)
    assert extra == 2 * 3 * WIDTH < WIDTH * WIDTH
    assert len(decoder_layers(recovered)) == LAYERS - 2


# ---------------------------------------------------------------- weights that cannot be changed


def quantised(model: PreTrainedModel) -> str:
    for layer in decoder_layers(model):
        layer.mlp = torch.ao.quantization.quantize_dynamic(layer.mlp, {nn.Linear}, inplace=False)
    return "are quantised"


class Adapted(nn.Module):
    """A projection with an adapter stored as in PEFT, which tests/interop uses itself."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.base_layer = projection
        self.lora = nn.Linear(projection.in_features, projection.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora(x)


def adapted(model: PreTrainedModel) -> str:
    for layer in decoder_layers(model):
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    return "have an adapter on them"


def tied(model: PreTrainedModel) -> str:
    first, second = (decoder_layers(model)[i].mlp.down_proj for i in (1, 4))
    second.weight = first.weight
    return r"model\.layers\.4\.mlp\.down_proj has the same"


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation")
@pytest.mark.parametrize("change", [quantised, adapted, tied])
@pytest.mark.parametrize("name", ["refit", "replaceme", "ghost-refit"])
def test_a_projection_that_cannot_be_changed_is_refused_before_the_pass(
    change: Callable[[PreTrainedModel], str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model("llama"), tiny_windows()
    before, message = state(model), change(model)
    monkeypatch.setattr("ghostlib.recovery.recover.calibrate", None)  # no pass begins
    with pytest.raises(ValueError, match=message) as caught:
        gl.recover(model, ids, [2, 3], name)
    assert "such as ghost" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    recovered = gl.recover(model, ids, [2, 3], "ghost", relative_ridge=1e-3)  # as advised
    assert torch.isfinite(logits(recovered, ids)).all()
    after = state(model)
    assert all(torch.equal(after[name], p) for name, p in before.items() if name in after)


def test_the_recipe_leaves_out_what_it_cannot_install() -> None:
    model, ids = tiny_model("llama"), tiny_windows(8, 24)
    with pytest.warns(DeprecationWarning):
        quantised(model)
    recipe = Recipe(model, ids, budget="matrix")
    assert set(recipe.families) == {"ghost", "ghost-relative"}
