"""The angle objective: activations against stored streams, a fit that beats least squares."""

import pytest
import torch
from conftest import WIDTH, tiny_model, tiny_windows
from torch.nn.functional import cosine_similarity

import ghostlib as gl
from ghostlib import Boundary
from ghostlib.models.streams import tap
from ghostlib.tutorial.cosine import MlpActivations, fit_cosine, mlp_activations

GAP = Boundary(2, 4)


def angle(T, activations) -> float:
    F, R, Y = activations
    return float(1 - cosine_similarity(R + F @ T.float(), Y).mean())


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox"])
def test_activations_are_those_of_the_streams(model_type):
    model, ids = tiny_model(model_type), tiny_windows(3, 20)
    activations = mlp_activations(model, ids, GAP)
    streams: dict[int, torch.Tensor] = {}
    with tap(model, GAP, streams.__setitem__) as run:
        run(input_ids=ids)
    torch.testing.assert_close(
        activations.F + activations.R, streams[2].flatten(0, 1), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(activations.Y, streams[4].flatten(0, 1), rtol=1e-4, atol=1e-4)
    regressor = gl.OPERATORS["replaceme"].regressor  # the output of the last MLP
    moments = gl.calibrate(model, ids, [GAP], regressors=[regressor]).of(regressor)[GAP]
    F = activations.F.double()
    torch.testing.assert_close(F.T @ F, moments.G, rtol=1e-4, atol=1e-3)


@pytest.mark.thorough
def test_the_fit_has_a_smaller_angle_than_least_squares():
    activations = mlp_activations(tiny_model("llama"), tiny_windows(8, 24), GAP)
    op = fit_cosine(activations, steps=400, learning_rate=1e-2)
    F, R, Y = activations
    squares = torch.linalg.lstsq(F, Y - R).solution
    assert angle(op.W, activations) < angle(squares, activations)
    assert angle(squares, activations) < angle(torch.eye(WIDTH), activations)
    error = float((R + F @ squares - Y).square().sum())
    assert op.residual > error, "least squares is the best in squares"
    again = fit_cosine(activations, steps=400, learning_rate=1e-2)
    assert torch.equal(op.W, again.W)
    assert op.name == "replaceme-cosine" and op.dof == WIDTH**2
    onward = fit_cosine(activations, steps=20, start=squares)
    assert angle(onward.W, activations) < angle(squares, activations)
    assert squares.grad is None, "the start stays as it is"


@pytest.mark.thorough
def test_a_known_transform_is_recovered():
    generator = torch.Generator().manual_seed(0)
    F, R = torch.randn(2, 400, 6, generator=generator)
    T = torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator)
    scale = 1 + torch.rand(400, 1, generator=generator)  # a scale per token does not disturb
    op = fit_cosine(MlpActivations(F, R, scale * (R + F @ T)), steps=800, learning_rate=2e-2)
    torch.testing.assert_close(op.W.float(), T, rtol=0, atol=2e-2)


def test_it_folds_like_replaceme():
    model, ids = tiny_model("llama"), tiny_windows()
    op = fit_cosine(mlp_activations(model, ids, GAP), steps=5)
    recovered = gl.install(model, {GAP: op})
    assert type(recovered) is type(model)
    F, R, _ = mlp_activations(model, ids, GAP)
    streams: dict[int, torch.Tensor] = {}
    with tap(recovered, [2], streams.__setitem__) as run:
        run(input_ids=ids)
    expected = R + F @ op.W.float()
    torch.testing.assert_close(streams[2].flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_bad_input_is_named():
    model, ids = tiny_model("llama"), tiny_windows()
    with pytest.raises(ValueError, match="starts at layer 0"):
        mlp_activations(model, ids, (0, 2))
    with pytest.raises(ValueError, match="vocabulary of 97"):
        mlp_activations(model, ids + 97, GAP)
    activations = mlp_activations(model, ids, GAP)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        fit_cosine(activations, steps=0)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        fit_cosine(activations, steps=0.5)
    broken = MlpActivations(activations.F * torch.nan, activations.R, activations.Y)
    with pytest.raises(ValueError, match="became nan: lower learning_rate"):
        fit_cosine(broken, steps=1)
