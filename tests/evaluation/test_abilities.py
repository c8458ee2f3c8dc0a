"""Abilities: items against their description, scores against whole passes, and verdicts."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import LAYERS, tiny_model, tiny_tokenizer, tiny_windows
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ghostlib as gl
from ghostlib.evaluation.abilities import BRIEF, NATS, RIGHT, Ability, Probe, ProbeSet

TOKENIZER = tiny_tokenizer()
WRITTEN = [name for name in gl.PROBES if name not in ("repeated-bigrams", "new-bigrams", "facts")]
SHORT = ["copying-16", "names", "brackets"]


@pytest.fixture
def model():
    return tiny_model("llama", vocab_size=len(TOKENIZER), max_position_embeddings=1024)


def few(model, probes=WRITTEN, seed=0, **options) -> ProbeSet:
    return ProbeSet(model, TOKENIZER, probes, seed=seed, count=4, **options)


def test_items_depend_on_the_seed_alone(model):
    first, again, other = few(model), few(model), few(model, seed=1)
    assert not first.left_out
    assert [item for _, item in first._items] == [item for _, item in again._items]
    assert [item for _, item in first._items] != [item for _, item in other._items]


@pytest.mark.parametrize("distance", [16, 64, 256])
def test_copied_tokens_repeat_the_first_half(model, distance):
    name = "copying" if distance == 64 else f"copying-{distance}"
    special = set(TOKENIZER.all_special_ids)
    for _, item in few(model, [name])._items:
        assert item.ids[:distance] == item.ids[distance:] and not special & set(item.ids)
        assert [item.ids[place + 1] for place in item.places] == list(item.right)
        assert len(item.right) == distance


def test_a_choice_is_scored_where_the_answers_differ(model):
    """The first token that differs decides, and the context ends before it."""
    choices = few(model, ["names", "look-up", "brackets", "sequences", "sums", "agreement"])
    for _, item in choices._items:
        assert item.places == [len(item.ids) - 1] and len(item.right) == len(item.wrong) == 1
        assert item.right != item.wrong
    closer = {"(": ")", "[": "]", "{": "}"}
    for _, item in few(model, ["brackets"])._items:
        shown, (right,) = TOKENIZER.decode(item.ids), TOKENIZER.batch_decode([list(item.right)])
        opened = [c for c in shown if c in closer]
        for closed in [*(c for c in shown if c in closer.values()), right]:
            assert closer[opened.pop()] == closed


@pytest.mark.parametrize(
    ("kind", "bos", "count"),
    [*product(["llama", "gpt2", "gemma2"], [False, True], [5]), ("llama", False, 1)],
)
def test_scores_are_those_of_the_whole_models_logits(kind, bos, count):
    tokenizer = tiny_tokenizer(bos=bos)
    model = tiny_model(kind, vocab_size=len(tokenizer), max_position_embeddings=1024)
    probes = ProbeSet(model, tokenizer, SHORT[-1:] if count == 1 else SHORT, count=count)
    expected: dict[str, list[float]] = {}
    for name, item in probes._items:
        assert not bos or item.ids[0] == tokenizer.bos_token_id
        with torch.no_grad():
            logits = model(torch.tensor([item.ids])).logits[0].double()[list(item.places)]
        if item.wrong:
            value = float(logits[0, item.right[0]] > logits[0, item.wrong[0]])
        else:
            value = -float(logits.log_softmax(-1)[range(len(item.right)), item.right].mean())
        expected.setdefault(name, []).append(value)
    scores = probes.ask(model)
    assert list(scores) == list(expected)
    for name, values in scores.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5)


def test_items_of_one_text_share_a_row(model):
    probes = ProbeSet(model, TOKENIZER, ["sequences"])
    distinct = {tuple(item.ids) for _, item in probes._items}
    assert sum(map(len, probes.batches)) == len(distinct) < len(probes._items)
    (scores,) = probes.ask(model).values()
    by_item = defaultdict(set)
    for (_, item), score in zip(probes._items, scores, strict=True):
        by_item[tuple(item.ids), *item.wrong].add(score)
    assert all(len(values) == 1 for values in by_item.values())


def test_trials_score_as_the_whole_variant(model):
    calib = torch.randint(3, len(TOKENIZER), (4, 24), generator=torch.Generator().manual_seed(0))
    probes, layers, gap = few(model, SHORT), (1, 2), gl.Boundary(1, 3)
    repair = {gap: gl.solve(gl.calibrate(model, calib, [gap])[gap], "ghost")}
    trials = gl.Trials(model, calib, probes=probes)
    for operators in ({}, repair):
        variant = gl.install(model, operators or {gap: None})
        scores, expected = trials.abilities(layers, operators), probes.ask(variant)
        for name in SHORT:
            np.testing.assert_allclose(scores[name], expected[name], rtol=1e-5)
        losses = trials.losses(layers, operators)
        torch.testing.assert_close(losses, gl.window_losses(variant, calib), rtol=1e-5, atol=0)


def values(*numbers: float) -> np.ndarray:
    return np.array(numbers)


def test_intervals_and_verdicts():
    loss, share = Probe("a", "", None, 4, NATS), Probe("b", "", None, 4, RIGHT)
    dense = Ability.of(loss, values(1, 2, 3, 2), chance=6)
    half = stats.t.ppf(0.975, 3) * stats.sem([1, 2, 3, 2])
    assert (dense.score, dense.low, dense.high) == pytest.approx((2, 2 - half, 2 + half))
    assert dense.verdict == "passed" and dense.dense is None and dense.kept is None
    for shift, verdict, kept in ((0.0, "kept", 1), (1.0, "weaker", 0.75), (3.5, "lost", 0.125)):
        noise = values(0, 0.01, 0, 0.01) if shift else 0  # equal differences have no interval
        ability = Ability.of(loss, values(1, 2, 3, 2) + shift + noise, 6, dense)
        assert ability.verdict == verdict and ability.kept == pytest.approx(kept, abs=0.01)
    assert str(ability) == "lost a: 2.00 -> 5.50 nats per token"
    right = Ability.of(share, values(*[1] * 19, 0), chance=0.5)
    wilson = stats.binomtest(19, 20).proportion_ci(method="wilson")
    assert (right.score, right.low, right.high) == pytest.approx((0.95, wilson.low, wilson.high))
    guessing = Ability.of(share, values(1, 0, 1, 0, 1, 0), chance=0.5)
    assert guessing.verdict == "decides nothing"
    worse = Ability.of(share, values(0, 0, 0, 0, 0, 0), 0.5, guessing)
    assert worse.verdict == "decides nothing" and worse.dense == 0.5 and worse.kept is None
    one = Ability.of(loss, values(1), chance=6)
    assert math.isnan(one.low) and one.verdict == "decides nothing"


def test_a_profile_is_a_table_json_and_html(model):
    variant = gl.prune(model, [2])
    profile = gl.abilities(variant, TOKENIZER, probes=SHORT, reference=model)
    table = profile.table
    assert list(table.index) == SHORT and set(table["items"]) == {16, 60}
    assert table["chance"].tolist() == pytest.approx([math.log(len(TOKENIZER)), 0.5, 0.5])
    dense = gl.abilities(model, TOKENIZER, probes=SHORT)
    assert table["dense"].tolist() == dense.table["score"].tolist()
    assert gl.abilities(variant, TOKENIZER, probes=SHORT, reference=dense).table.equals(table)
    read = json.loads(profile.to_json())
    assert len(read["abilities"]["copying-16"]["values"]) == 16 and read["seed"] == 0
    assert "copying-16" in profile._repr_html_() and "copying-16" in str(profile)
    same = gl.abilities(model, TOKENIZER, probes=SHORT, reference=dense)
    assert not same.lost and all(a.score == a.dense for a in same.abilities.values())


def test_a_lost_ability_says_so_in_one_line(model):
    copying, chance = gl.PROBES["copying"], math.log(49152)
    dense = Ability.of(copying, values(2.5, 2.6, 2.7, 2.6), chance)
    scores = {
        "copying": Ability.of(copying, values(11.8, 12.0, 11.9, 11.9), chance, dense),
        "names": Ability.of(gl.PROBES["names"], values(1, 1, 1, 1), 0.5),
    }
    assert gl.Profile(scores, {}, 0).lost == ["lost copying: 2.60 -> 11.9 nats per token"]


def test_a_reference_is_of_the_same_items(model):
    dense = gl.abilities(model, None, probes=["copying-16"])  # as many items, of other tokens
    with pytest.raises(ValueError, match=r"items of 'copying-16' .* arguments and tokenizer"):
        gl.abilities(model, TOKENIZER, probes=["copying-16"], reference=dense)
    assert json.loads(dense.to_json())["digests"] == dense.digests != {}
    every = gl.abilities(model, TOKENIZER, probes=SHORT)
    for reference in (every, replace(every, digests={})):  # old profiles have no digests
        profile = gl.abilities(model, TOKENIZER, probes=["copying-16"], reference=reference)
        assert profile.abilities["copying-16"].dense


@pytest.mark.parametrize("bos", [False, True])
def test_running_text_begins_with_one_bos_at_most(model, bos):
    tokenizer = tiny_tokenizer(bos=bos)
    for _, item in ProbeSet(model, tokenizer, ["repeated-bigrams", "new-bigrams"], count=2)._items:
        assert list(item.ids).count(tokenizer.bos_token_id) == bos
        assert len(item.ids) == 256 + bos
        assert [item.ids[place + 1] for place in item.places] == list(item.right)


# ---------------------------------------------------------------- probes that cannot be run


def word_tokenizer(**options) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1, "blue": 2, ":": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **options)


def test_a_tokenizer_without_the_words_leaves_the_probe_out_by_name():
    model = tiny_model("llama")
    profile = gl.abilities(model, word_tokenizer(unk_token="<unk>"), probes=["copying-16", "names"])
    assert list(profile.abilities) == ["copying-16"]
    assert profile.left_out["names"].startswith("needs a token for each part of")
    assert "left out names: it needs a token" in str(profile)
    blind = gl.abilities(model, word_tokenizer(), probes=["names", "copying-16"])
    assert "tells" in blind.left_out["names"] and list(blind.abilities) == ["copying-16"]


def test_without_a_tokenizer_random_tokens_are_copied():
    profile = gl.abilities(tiny_model("llama"), None, probes=["copying-16", "names", "new-bigrams"])
    assert profile.left_out == dict.fromkeys(["names", "new-bigrams"], "needs a tokenizer")
    assert list(profile.abilities) == ["copying-16"]


def test_a_context_that_is_too_short_leaves_the_probe_out():
    profile = gl.abilities(tiny_model("llama"), None, probes=["copying-256", "copying"])
    assert profile.left_out == {"copying-256": "takes 512 tokens, and the model knows 128"}
    nothing = gl.abilities(tiny_model("llama"), None, probes=["copying-256"])
    assert nothing.table.empty and "left out copying-256: it takes 512" in str(nothing)


def test_a_text_without_items_leaves_the_probe_out(model, monkeypatch):
    monkeypatch.setitem(gl.PROBES, "none", Probe("none", "", lambda rng, language: iter(()), 4))
    profile = gl.abilities(model, TOKENIZER, probes=["none"])
    assert profile.left_out == {"none": "finds no item in the text"}


def test_a_repaired_model_is_profiled_like_any_other(model):
    calib = torch.randint(3, len(TOKENIZER), (4, 24), generator=torch.Generator().manual_seed(0))
    recovered = gl.recover(model, calib, [1, 2], "ghost", relative_ridge=1e-3)
    profile = gl.abilities(recovered, TOKENIZER, probes=BRIEF, reference=model)
    assert list(profile.abilities) == list(BRIEF)


def test_bad_input_is_refused(model):
    dense = gl.abilities(model, TOKENIZER, probes=["names"], seed=1)
    for probes in (["names"], ["brackets"]):
        with pytest.raises(ValueError, match="the reference has other items of"):
            gl.abilities(model, TOKENIZER, probes=probes, reference=dense)
    with pytest.raises(ValueError, match="probe 'names' cannot be run: it needs a tokenizer"):
        ProbeSet(model, None, ["names"], strict=True)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        ProbeSet(model, TOKENIZER, ["names"], count=0)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(ValueError, match="probe 'copying-16' scores nan; a weight"):
        gl.abilities(model, TOKENIZER, probes=["copying-16"])


# ---------------------------------------------------------------- chosen by abilities


@pytest.mark.thorough
def test_the_criterion_weighs_text_against_copying():
    model, ids = tiny_model("llama"), tiny_windows(4, 24)
    options = {"keep": "copying-16", "weight": 0.5, "windows": ids[:2]}
    selection = gl.select_layers(model, ids, 2, "abilities", **options)
    gaps = [gl.Boundary(s, s + n) for n in (1, 2) for s in range(LAYERS - n + 1)]
    stats_of = gl.calibrate(model, ids, gaps)
    probes = ProbeSet(model, None, ["copying-16"], seed=-1, count=4)
    for layers, score in selection.scores.items():
        removed = gl.runs(layers, LAYERS)
        variant = gl.install(model, {gap: gl.solve(stats_of[gap], "ghost") for gap in removed})
        loss, copying = gl.window_losses(variant, ids[:2]), probes.ask(variant)["copying-16"]
        assert score == pytest.approx(float(loss.mean() + 0.5 * copying.mean()), rel=1e-5)
    with pytest.raises(ValueError, match="'names' cannot be run: it needs a tokenizer"):
        gl.select_layers(model, ids, 2, "abilities", keep="names")


@pytest.mark.embedded
def test_the_cosine_block_loses_copying_and_text_does_not_show_it(embedded):
    model, tokenizer = embedded
    layers = range(12, 19)
    calib = gl.token_windows("wiki", tokenizer, length=512, count=2)
    recovered = gl.recover(model, calib, layers, "ghost", relative_ridge=1e-2)
    profile = gl.abilities(recovered, tokenizer, probes=["copying"], reference=model)
    assert [line.split(":")[0] for line in profile.lost] == ["lost copying"]
    assert profile.abilities["copying"].dense < 4 and profile.abilities["copying"].score > 10
