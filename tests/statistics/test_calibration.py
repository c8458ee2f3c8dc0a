"""The streaming pass against stored activations, and invalid input."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYERS, WIDTH, assert_same_moments, stored_streams, tiny_model, tiny_windows

import ghostlib as gl
from ghostlib import Boundary, Moments
from ghostlib.models.architectures import decoder_layers, receiver
from ghostlib.models.layers import down_projection, stream_norm
from ghostlib.models.streams import tap
from ghostlib.statistics.calibration import suited
from ghostlib.statistics.features import STREAM, Regressor
from ghostlib.statistics.moments import check_moments

pytestmark = pytest.mark.filterwarnings("error")

GAP = Boundary(2, 4)
READS_RAW = ("olmo2",)
NORM_AFTER = ("gemma2", "gemma3_text", "olmo2")


def count_hooks(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.thorough
def test_streamed_moments_equal_stored_activations(any_tiny):
    ids = tiny_windows(5, 20)
    gaps = [(0, 2), (1, 4), (0, LAYERS), (3, 4), (LAYERS - 1, LAYERS)]
    calibration = gl.calibrate(any_tiny, ids, gaps, batch_size=5)
    streams = stored_streams(any_tiny, ids)
    assert list(calibration) == [Boundary(*gap) for gap in gaps]
    for start, stop in gaps:
        X = streams[start].flatten(0, 1).double()
        Y = streams[stop].flatten(0, 1).double()
        m = calibration[Boundary(start, stop)]
        torch.testing.assert_close(m.G, X.T @ X, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(m.cross, X.T @ (Y - X), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(m.B, X.T @ Y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(m.d2, ((Y - X) ** 2).sum(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(m.f1, X.sum(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(m.y_abs, Y.abs().sum(0), rtol=1e-9, atol=1e-9)
        assert (m.tokens, m.weight, m.sequences) == (100, 100.0, 5)
        ratios = [
            (y.double().abs().mean(0) / x.double().abs().mean(0))
            for x, y in zip(streams[start], streams[stop], strict=True)
        ]
        torch.testing.assert_close(m.ratio, torch.stack(ratios).sum(0))
        # Similarity: cosine over channels, averaged over tokens.
        cosine = torch.nn.functional.cosine_similarity(X, Y, dim=1)
        similarity = calibration.similarities[Boundary(start, stop)]
        assert similarity.cosine == pytest.approx(float(cosine.mean()), abs=1e-6)
        angle = (cosine.clamp(-1, 1).arccos() / torch.pi).mean()
        assert similarity.angular == pytest.approx(float(angle), abs=1e-4)


@pytest.mark.embedded
def test_ghost_from_streamed_moments_equals_lstsq_on_stored_activations(embedded, wiki):
    """Residuals agree to 1e-8, in float64, on the embedded model."""
    model, _ = embedded
    boundary = Boundary(12, 19)
    op = gl.solve(gl.calibrate(model, wiki[:2], [boundary])[boundary], "ghost")
    streams = stored_streams(model, wiki[:2], logits_to_keep=1)
    X, Y = (streams[i].flatten(0, 1).double().numpy() for i in boundary)
    assert len(X) == 1024 > X.shape[1]
    reference = np.linalg.lstsq(X, Y, rcond=None)[0]
    best = np.linalg.norm(X @ reference - Y) ** 2
    error = np.linalg.norm(X @ op.W.numpy() - Y) ** 2
    assert abs(error - best) / best < 1e-8
    assert op.residual == pytest.approx(best, rel=1e-6)


def test_one_pass_serves_many_boundaries_as_well_as_one_each():
    model, ids = tiny_model("llama"), tiny_windows()
    together = gl.calibrate(model, ids, gl.contiguous(2, LAYERS) + gl.contiguous(1, LAYERS))
    for boundary, moments in together.items():
        alone = gl.calibrate(model, ids, [boundary])[boundary]
        assert torch.equal(moments.G, alone.G) and torch.equal(moments.cross, alone.cross)
    shared = together[Boundary(2, 4)].G
    assert shared is together[Boundary(2, 3)].G  # one Gram matrix a start


def test_moments_of_halves_add_up():
    model, ids = tiny_model("llama"), tiny_windows(6)
    boundary = Boundary(2, 4)
    total = gl.calibrate(model, ids, [boundary])[boundary]
    halves = [gl.calibrate(model, part, [boundary])[boundary] for part in ids.split(3)]
    summed = halves[0] + halves[1]
    torch.testing.assert_close(summed.G, total.G, rtol=1e-14, atol=0)
    torch.testing.assert_close(summed.cross, total.cross, rtol=1e-13, atol=1e-13)
    assert summed.tokens == total.tokens and summed.sequences == total.sequences
    assert torch.equal((halves[1] + halves[0]).cross, summed.cross)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_enters_no_statistic(side):
    model, boundary = tiny_model("llama"), Boundary(1, 3)
    ids = tiny_windows(2, 12)
    short = ids[1:, :7]
    padded, mask = ids.clone(), torch.ones_like(ids)
    where = slice(7, None) if side == "right" else slice(0, 5)
    kept = slice(0, 7) if side == "right" else slice(5, None)
    padded[1, where], mask[1, where], padded[1, kept] = 0, 0, short[0]
    together = gl.calibrate(model, padded, [boundary], attention_mask=mask, batch_size=2)
    apart = [gl.calibrate(model, part, [boundary])[boundary] for part in (ids[:1], short)]
    total = apart[0] + apart[1]
    assert together[boundary].tokens == 19 == together.tokens
    torch.testing.assert_close(together[boundary].G, total.G, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[boundary].cross, total.cross, rtol=1e-5, atol=1e-5)


def test_a_window_that_is_all_padding_counts_for_nothing():
    model, boundary = tiny_model("llama"), Boundary(1, 3)
    ids, mask = tiny_windows(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1] = 0
    calibration = gl.calibrate(model, ids, [boundary], attention_mask=mask)
    assert calibration[boundary].sequences == 1 and calibration.tokens == 12
    mask[:] = 0
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="mask and skip_leading leave no token to learn from"):
        gl.calibrate(model, ids, [boundary], attention_mask=mask)
    assert not calls, "an hour's pass must not end with an error known before it"


def test_the_batch_size_changes_only_rounding():
    model, ids, boundary = tiny_model("llama"), tiny_windows(5), Boundary(1, 4)
    one, two, five = (
        gl.calibrate(model, ids, [boundary], batch_size=b)[boundary] for b in (1, 2, 5)
    )
    for other in (two, five):
        torch.testing.assert_close(other.G, one.G, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.cross, one.cross, rtol=1e-5, atol=1e-5)
        assert (other.tokens, other.sequences) == (one.tokens, one.sequences)


def test_leading_positions_are_left_out_on_request():
    model, ids, boundary = tiny_model("llama"), tiny_windows(3, 10), Boundary(2, 4)
    streams = stored_streams(model, ids)
    X = streams[2][:, 2:].flatten(0, 1).double()
    moments = gl.calibrate(model, ids, [boundary], skip_leading=2, batch_size=3)[boundary]
    torch.testing.assert_close(moments.G, X.T @ X, rtol=1e-9, atol=1e-9)
    assert moments.tokens == 24
    # With left padding, "leading" counts from the first real token.
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    padded = gl.calibrate(model, ids, [boundary], attention_mask=mask, skip_leading=2)
    assert padded.tokens == 3 * (10 - 3 - 2)


def test_the_pass_stops_after_the_last_boundary():
    model, ids = tiny_model("llama"), tiny_windows(1, 6)
    ran: list[int] = []
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.lm_head.register_forward_hook(lambda *_: ran.append(-1))
    gl.calibrate(model, ids, [(1, 3)])
    assert ran == [0, 1, 2]
    ran.clear()
    gl.calibrate(model, ids, [(4, LAYERS)])
    assert ran == list(range(LAYERS))  # every layer, never the head


def test_similarities_alone_collect_no_moments():
    model, ids = tiny_model("llama"), tiny_windows()
    bare = gl.calibrate(model, ids, [(1, 3)], moments=False)
    assert not bare and set(bare.similarities) == {(1, 3)}
    full = gl.calibrate(model, ids, [(1, 3)])
    assert full.similarities == bare.similarities
    with pytest.raises(ValueError, match=r"no moments of x were collected: .* moments=True, regr"):
        bare.of("x")
    for regressor in ("x", "h"):
        with pytest.raises(ValueError, match="collected as moments: leave moments=True"):
            gl.calibrate(model, ids, [(1, 3)], moments=False, regressors=[regressor])


def test_moments_set_by_hand_are_those_of_the_stream():
    model, ids, gap = tiny_model("llama"), tiny_windows(4), Boundary(2, 4)
    first, more, total = (gl.calibrate(model, part, [gap]) for part in (ids[:1], ids[1:], ids))
    first[gap] += more[gap]
    assert_same_moments(first.of("x")[gap], total[gap])
    logits, expected = (gl.recover(model, stats, [2, 3])(ids).logits for stats in (first, total))
    torch.testing.assert_close(logits, expected)


def test_bfloat16_activations_give_float64_moments():
    model = tiny_model("llama").to(torch.bfloat16)
    moments = gl.calibrate(model, tiny_windows(), [(1, 3)], batch_size=4)[Boundary(1, 3)]
    assert moments.G.dtype == torch.float64
    streams = stored_streams(model, tiny_windows())
    X = streams[1].flatten(0, 1).double()
    torch.testing.assert_close(moments.G, X.T @ X, rtol=1e-9, atol=1e-9)


def test_hooks_are_always_removed():
    model, ids = tiny_model("llama"), tiny_windows()
    before = count_hooks(model)
    gl.calibrate(model, ids, [(1, 3)])
    assert count_hooks(model) == before
    with pytest.raises(RuntimeError, match="boom"), tap(model, [1, 2], lambda *_: None):
        raise RuntimeError("boom")
    with pytest.raises(ValueError, match="normalises, scales or routes what its MLP returns"):
        gl.calibrate(tiny_model("olmo2"), ids, [(1, 3)], regressors=["f"])
    with torch.no_grad():
        decoder_layers(model)[2].mlp.down_proj.weight[0, 0] = float("nan")
    for regressors in ([], ["x, h"]):
        with pytest.raises(ValueError, match="layer 3 "):
            gl.calibrate(model, ids, [(1, 3)], regressors=regressors)
    assert count_hooks(model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_name_layer_and_window(value):
    model, ids = tiny_model("llama"), tiny_windows(4)
    ids[ids == 50] = 49
    ids[2, 5] = 50  # the only window with the bad embedding
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = value
    with pytest.raises(ValueError, match=r"input of layer 1 .* window 2"):
        gl.calibrate(model, ids, [(1, 3)], batch_size=3)


def test_too_few_tokens_are_refused():
    model, ids = tiny_model("llama"), tiny_windows()
    with pytest.raises(ValueError, match="no token"):
        gl.calibrate(model, ids[:0], [(1, 3)])
    with pytest.raises(ValueError, match="mask and skip_leading leave no token to learn from"):
        gl.calibrate(model, ids, [(1, 3)], skip_leading=24)


def test_moments_from_any_activations_match_the_pass():
    """`Moments(width).update` is the same arithmetic as the streaming pass."""
    model, ids, boundary = tiny_model("llama"), tiny_windows(2), Boundary(2, 4)
    streams = stored_streams(model, ids)
    by_hand = Moments(WIDTH)
    for x, y in zip(streams[2], streams[4], strict=True):
        by_hand.update(x, y)
    streamed = gl.calibrate(model, ids, [boundary])[boundary]
    for name, values in streamed.tensors().items():
        torch.testing.assert_close(by_hand.tensors()[name], values)
    assert by_hand.counts() == pytest.approx(streamed.counts())


# --- other regressors than the stream -----------------------------------------------------------

PREVIOUS = "x, n(x), n(prev); 1/|y|"


def stored_mlp(model: Any, ids: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """Input and output of the last down-projection before ``start``, window by window."""
    stored: dict[str, torch.Tensor] = {}

    def hook(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        # OPT flattens the batch before its MLP
        stored["hidden"] = args[0].reshape(*ids.shape, -1).double()
        stored["output"] = output.reshape(*ids.shape, -1).double()

    handle = down_projection(model, start - 1).register_forward_hook(hook)
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    return stored


@pytest.mark.thorough
@pytest.mark.parametrize("spelling", [PREVIOUS, "x, n(x)", "x, h", "f; 1/|y|^2"])
def test_streamed_moments_of_features_equal_stored_activations(
    any_tiny: Any, spelling: str
) -> None:
    ids, generic = tiny_windows(3, 20), Regressor.parse(spelling)
    error = None
    if any_tiny.config.model_type in READS_RAW and generic.normalised:
        error = "read their stream without a norm: .*ghost-relative"
    if any_tiny.config.model_type in NORM_AFTER and generic.reads_mlp:
        error = "normalises, scales or routes what its MLP returns"
    if error:
        with pytest.raises(ValueError, match=error):
            gl.calibrate(any_tiny, ids, [GAP], regressors=[spelling])
        return
    stats = gl.calibrate(any_tiny, ids, [GAP], batch_size=3, regressors=[spelling])
    moments = stats.of(generic)[GAP]
    regressor, streams = suited(any_tiny, generic), stored_streams(any_tiny, ids)
    mlp = stored_mlp(any_tiny, ids, GAP.start) if generic.reads_mlp else {}
    options: dict[str, Any] = {"boundary": GAP, "model": stats.model}
    options["hidden"] = mlp["hidden"].shape[-1] if mlp else None
    if "hidden" in regressor.sources:
        options["bias"] = down_projection(any_tiny, GAP.start - 1).bias is not None
    expected = Moments(WIDTH, regressor=regressor, **options)
    for row in range(len(ids)):
        sources = {name: values[row] for name, values in mlp.items()}
        expected.update(streams[2][row], streams[4][row], **sources)
    assert_same_moments(moments, expected)
    assert_same_moments(stats[GAP], gl.calibrate(any_tiny, ids, [GAP], batch_size=3)[GAP])


@pytest.mark.thorough
def test_the_norm_a_model_is_said_to_have_is_the_one_it_has(any_tiny: Any) -> None:
    if any_tiny.config.model_type in READS_RAW:
        with pytest.raises(ValueError, match="read their stream without a norm"):
            suited(any_tiny, Regressor.parse("x, n(x)"))
        assert suited(any_tiny, STREAM) == STREAM
        return
    norm = receiver(any_tiny, LAYERS)
    x = torch.randn(4, WIDTH) + 2
    shift_invariant = torch.allclose(norm(x), norm(x + 3), atol=1e-3)
    assert shift_invariant == (stream_norm(any_tiny) == "layer")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_skipped_token_is_still_the_one_before_and_padding_never_is(side: str) -> None:
    model, ids = tiny_model("llama"), tiny_windows(2, 12)
    padded, mask = torch.zeros(2, 15, dtype=torch.long), torch.zeros(2, 15, dtype=torch.long)
    rows = slice(3, None) if side == "left" else slice(0, 12)
    padded[:, rows], mask[:, rows] = ids, 1
    options: dict[str, Any] = {"skip_leading": 1, "regressors": [PREVIOUS]}
    one = gl.calibrate(model, ids, [GAP], **options).of(PREVIOUS)[GAP]
    other = gl.calibrate(model, padded, [GAP], attention_mask=mask, **options).of(PREVIOUS)[GAP]
    assert one.tokens == other.tokens == 22
    torch.testing.assert_close(one.G, other.G, rtol=1e-4, atol=1e-4)
    streams = stored_streams(model, ids)
    expected = Moments(WIDTH, regressor=PREVIOUS)
    for x, y in zip(streams[2], streams[4], strict=True):
        expected.update(x, y, used=torch.arange(12) > 0)
    torch.testing.assert_close(one.G, expected.G)
    torch.testing.assert_close(one.cross, expected.cross)


GAPS = [Boundary(1, 2), Boundary(3, LAYERS), Boundary(3, 4)]
NARROW = ["x; 1/|y|", "x, n(x); 1/|y|", "n(prev); 1/|y|", "n(prev), x; 1/|y|"]


@pytest.mark.thorough
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_narrower_moments_are_cut_from_the_widest(model_type: str) -> None:
    """With either kind of norm, padding and skipped tokens."""
    model, ids = tiny_model(model_type), tiny_windows(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options: dict[str, Any] = {"attention_mask": mask, "skip_leading": 1}
    together = gl.calibrate(model, ids, GAPS, regressors=[*NARROW, PREVIOUS], **options)
    collected = {(str(regressor), gap) for regressor, gap in together.collected}
    assert collected == {(name, gap) for name in ("x", PREVIOUS) for gap in GAPS}, "no others"
    for name in NARROW:
        alone = gl.calibrate(model, ids, GAPS, regressors=[name], **options)
        parts = together.of(name)
        assert list(parts) == GAPS
        for gap in GAPS:
            assert_same_moments(parts[gap], alone.of(name)[gap])
            assert together.of(name)[gap] is parts[gap], "cut once"
    with pytest.raises(ValueError, match=r"no moments of x, n\(x\) were collected: calibrate\("):
        together.of("x, n(x)")  # weighted otherwise


def test_shared_gram_matrices_stay_shared_when_they_are_cut() -> None:
    stats = gl.calibrate(
        tiny_model("llama"), tiny_windows(), GAPS, regressors=["x, n(x), n(prev)", "x, h"]
    )
    for name in ("x", "x, n(x)", "n(prev)", "x, h", "h"):
        parts = stats.of(name)
        assert parts[GAPS[1]].G is parts[GAPS[2]].G
        assert parts[GAPS[1]].gram is parts[GAPS[2]].gram, "and so are their decompositions"
        assert parts[GAPS[0]].G is not parts[GAPS[1]].G
    assert stats.of("x") == dict(stats)


def test_nothing_of_the_mlp_is_before_layer_0_but_the_stream_is() -> None:
    model, ids = tiny_model("llama"), tiny_windows(3, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    gaps = [Boundary(0, 2), Boundary(2, 4), Boundary(2, 5), Boundary(0, 1)]
    options: dict[str, Any] = {"attention_mask": mask, "batch_size": 2}
    plain = gl.calibrate(model, ids, gaps, **options)
    for regressors in (["x, h"], ["f"], ["h", "x, n(x)"], ["x, h", "x, f"]):
        stats = gl.calibrate(model, ids, gaps, regressors=regressors, **options)
        assert list(stats) == gaps
        for gap in gaps:
            assert_same_moments(stats[gap], plain[gap])
        for name in regressors:
            reads_mlp = Regressor.parse(name).reads_mlp
            assert list(stats.of(name)) == (gaps[1:3] if reads_mlp else gaps)
            assert all(moments.tokens == 52 for moments in stats.of(name).values())
        with pytest.raises(ValueError, match="no moments of"):
            stats.of("n(prev)")
    alone = gl.calibrate(model, ids, gaps[:1], regressors=["x, h"])
    assert list(alone) == gaps[:1]
    with pytest.raises(ValueError, match="no moments of x, h were collected"):
        alone.of("x, h")
    for moments in alone.values():
        check_moments(moments)
