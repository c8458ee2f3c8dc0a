"""The runner on a tiny model, local text and local tasks: resumed, sharded and never mixed."""

import json
import random
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from conftest import LAYERS, tiny_model, tiny_tokenizer

import ghostlib as gl
from ghostlib.evaluation.abilities import ProbeSet, t_interval
from ghostlib.experiments import run as runner
from ghostlib.experiments.run import read_shard, run_experiment
from ghostlib.experiments.tables import choices, report, scores, selections
from ghostlib.models.boundaries import read_layers, spell

TOKENIZER = tiny_tokenizer(bos=True)
SOLVED = ("magnitude", "linearpatch-d", "replaceme", "ghost", "ghost sequential", "refit")
OPERATORS = ("pruned", *SOLVED, "auto", "auto matrix", "auto none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, two corpora and two tasks."""
    folder = tmp_path_factory.mktemp("experiment")
    tiny_model("llama", vocab_size=len(TOKENIZER)).save_pretrained(folder / "tiny")
    TOKENIZER.save_pretrained(folder / "tiny")
    for seed, name in enumerate(("one", "two")):
        rng = random.Random(seed)
        words = ["the", "theory", "of", "thing", "größer", "東京", "then"]
        text = "\n\n".join(" ".join(rng.choices(words, k=40)) for _ in range(30))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        items = [
            {"query": rng.choice(words), "choices": rng.sample(words, 3), "gold": rng.randrange(3)}
            for _ in range(12)
        ]
        quiz = "\n".join(json.dumps(item) for item in items)
        (folder / f"quiz-{name}.jsonl").write_text(quiz, encoding="utf-8")
    return folder


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    corpora = [str(folder / "one.txt"), str(folder / "two.txt")]
    defaults: dict[str, Any] = {
        "model": str(folder / "tiny"),
        "operators": ("pruned", "ghost"),
        "calibration": corpora,
        "windows": 3,
        "length": 24,
        "selection_length": 12,
        "perplexity": corpora,
        "test_windows": 3,
        "test_length": 16,
        "limit": 8,
    }
    return defaults | changes


def specification(folder: Path, **changes: Any) -> gl.Specification:
    return gl.Specification(**arguments(folder, **changes))


def complete(folder: Path) -> gl.Specification:
    """Several criteria, depths and operators."""
    changes = {"criteria": ["block-influence", "residual"], "n": [1, 2]}
    return specification(folder, **changes, operators=["pruned", "ghost", "auto"])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> gl.Results:
    path = tmp_path_factory.mktemp("results") / "complete.jsonl"
    return run_experiment(complete(folder), path)


def content(results: gl.Results) -> dict[Any, Any]:
    """The records of cells, without their times."""
    return {
        name: {k: v for k, v in record.items() if k not in ("seconds", "environment")}
        for name, record in results.records.items()
        if record["kind"] in ("selection", "choice", "score", "skipped")
    }


@pytest.mark.thorough
def test_every_cell_equals_the_public_functions(folder, tmp_path):
    spec = specification(folder, layers="1,3-4", operators=OPERATORS)
    rows = scores(run_experiment(spec, tmp_path / "a.jsonl")).set_index(["operator", "dataset"])
    model, tokenizer = spec.load()
    calib, layers = spec.draw_calibration(tokenizer), (1, 3, 4)
    variants = {"dense": model, "pruned": gl.prune(model, layers)}
    for operator in OPERATORS[1:]:
        name, _, fit = operator.partition(" ")
        options = {"fit": fit} if fit == "sequential" else {"budget": fit} if fit else {}
        variants[operator] = gl.recover(model, calib, layers, name, **options, verbose=False)
    for operator, variant in variants.items():
        for corpus in spec.perplexity:
            expected = gl.corpus_perplexity(variant, tokenizer, corpus, length=16, count=3)
            row = rows.loc[(operator, Path(corpus).name)]
            # A folded scale reaches the norms' epsilon, which one at the gap does not.
            tolerance = 1e-3 if operator == "magnitude" else 1e-5
            assert row["value"] == pytest.approx(expected.perplexity, rel=tolerance)
            assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=tolerance)
            assert row["size"] == expected.tokens == 3 * 15


@pytest.mark.thorough
@pytest.mark.parametrize("criterion", ["block-influence", "perplexity", "greedy-recovered"])
def test_every_kind_of_criterion_chooses_as_alone(folder, tmp_path, criterion):
    spec = specification(folder, criteria=criterion, n=[1, 2], perplexity=[])
    chosen = selections(run_experiment(spec, tmp_path / "a.jsonl")).set_index("n").layers
    model, tokenizer = spec.load()
    calib, searched = spec.draw_calibration(tokenizer), spec.draw_selection(tokenizer)
    for n in (1, 2):
        alone = gl.select_layers(model, calib, n, criterion, windows=searched)
        assert chosen[n] == spell(alone)


@pytest.mark.thorough
def test_tasks_are_scored_as_alone(folder, tmp_path):
    tasks = [str(folder / f"quiz-{name}.jsonl") for name in ("one", "two")]
    spec = specification(folder, layers="2", operators="ghost", perplexity=[], tasks=tasks)
    results = run_experiment(spec, tmp_path / "a.jsonl")
    rows = scores(results).set_index(["operator", "dataset"])
    model, tokenizer = spec.load()
    recovered = gl.recover(model, spec.draw_calibration(tokenizer), [2])
    for operator, variant in (("dense", model), ("ghost", recovered)):
        for task, score in gl.zero_shot(variant, tokenizer, tasks, limit=8).items():
            assert rows.loc[(operator, task), "value"] == score.acc
            assert rows.loc[(operator, task), "evidence"] == score
            assert rows.loc[(operator, task), "size"] == 8
    assert "Zero-shot accuracy" in report(results) and "mean" in report(results)


@pytest.mark.thorough
def test_abilities_are_scored_as_alone(folder, tmp_path):
    changes = {"layers": ["2", "1-2"], "probes": ("copying-16", "brackets"), "perplexity": ()}
    spec = specification(folder, **changes, probe_items=5)
    results = run_experiment(spec, tmp_path / "a.jsonl")
    rows = scores(results).set_index(["layers", "operator", "dataset"])
    model, tokenizer = spec.load()
    probes = ProbeSet(model, tokenizer, spec.probes, count=5)
    dense, pruned = probes.ask(model), probes.ask(gl.prune(model, [1, 2]))
    for name in spec.probes:
        row = rows.loc["1–2", "pruned", name]
        assert row.value == pytest.approx(pruned[name].mean()) and row["size"] == 5
        relative = row[["relative", "relative_low", "relative_high"]].tolist()
        assert relative == pytest.approx(t_interval(pruned[name] - dense[name]), abs=1e-6)
        assert rows.loc["", "dense", name].value == row.dense
    assert "Abilities: share right, or nats per token" in report(results)
    assert run_experiment(spec, tmp_path / "a.jsonl").records == results.records


@pytest.mark.thorough
def test_the_choice_of_the_recipe_is_recorded(finished, folder):
    spec = complete(folder)
    model, tokenizer = spec.load()
    row = choices(finished).iloc[-1]  # one for each set of layers
    choice = gl.Recipe(model, spec.draw_calibration(tokenizer)).choose(read_layers(row.layers))
    assert row.operator == choice.repair and row.losses == pytest.approx(choice.rivals, rel=1e-6)
    assert f"auto without {row.layers}: {row.operator}" in report(finished)


@pytest.mark.thorough
def test_the_file_is_json_and_names_no_folder_of_this_machine(finished, folder):
    text = finished.path.read_text()
    records = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert str(folder) not in text
    assert [r["kind"] for r in records[:2]] == ["specification", "environment"]
    assert records[0]["model"] == "tiny" and records[0]["calibration"] == ["one.txt", "two.txt"]
    assert {"versions", "hardware", "commit"} <= records[1].keys()
    assert [p.name for p in finished.path.parent.iterdir()] == ["complete.jsonl"], "no lock file"


@pytest.mark.thorough
def test_one_pass_serves_all_operators_and_one_all_criteria(folder, tmp_path, monkeypatch):
    passes = []

    def counted(model, windows, boundaries, **options):
        passes.append(options)
        return gl.calibrate(model, windows, boundaries, **options)

    monkeypatch.setattr(runner, "calibrate", counted)
    operators = ["pruned", "ghost", "x, n(x); 1/|y|", "two-branch-relative sequential"]
    spec = specification(folder, criteria=["cosine", "residual"], n=[1, 2], operators=operators)
    run_experiment(spec, tmp_path / "a.jsonl")
    assert [sorted(options) for options in passes] == [["moments"], ["regressors"]]
    assert set(map(str, passes[1]["regressors"])) == {"x", "x, n(x); 1/|y|"}
    assert passes[0]["moments"] is True
    passes.clear()
    run_experiment(specification(folder, n=1), tmp_path / "b.jsonl")
    assert passes[0]["moments"] is False, "cosine needs similarities only"


@pytest.mark.thorough
def test_little_memory_holds_the_moments_of_few_sets_at_a_time(folder, tmp_path, monkeypatch):
    sets = {"layers": ["1-2", "3-4"], "operators": ["pruned", "ghost", "refit", "auto"]}
    spec = specification(folder, **sets)
    passes: list[int] = []

    def counted(model, windows, boundaries, **options):
        passes.append(len(set(boundaries)))
        return gl.calibrate(model, windows, boundaries, **options)

    for module in ("experiments.run", "recovery.recipe"):
        monkeypatch.setattr(f"ghostlib.{module}.calibrate", counted)
    together = run_experiment(spec, tmp_path / "together.jsonl")
    assert passes == [2, 2, 2]  # fitted and held-out windows of the recipe, and the plain fit
    passes.clear()
    monkeypatch.setattr(runner, "available_bytes", lambda: 1)
    assert content(run_experiment(spec, tmp_path / "apart.jsonl")) == content(together)
    assert passes == 3 * 2 * [1]


def test_a_regressor_is_the_operator_of_its_name(folder, tmp_path):
    operators = ["two-branch-relative", "x, n(x); 1/|y|", "n(x); 1/|y|^0.5", "pruned"]
    spec = specification(folder, layers=["1,4"], operators=operators)
    rows = scores(run_experiment(spec, tmp_path / "a.jsonl")).set_index(["operator", "dataset"])
    named, spelt, free, pruned = (rows.value[operator, "one.txt"] for operator in operators)
    assert named == pytest.approx(spelt) and free != pytest.approx(pruned, rel=1e-3)


@pytest.mark.thorough
def test_operators_that_read_a_layer_are_left_out_where_layer_0_is_removed(folder, tmp_path):
    spec = specification(folder, starts=2, operators=["pruned", "replaceme", "ghost", "auto"])
    results = run_experiment(spec, tmp_path / "a.jsonl")
    (skipped,) = results.of("skipped")
    assert (skipped["layers"], skipped["operator"]) == ("0–1", "replaceme")
    assert "layer 0 is removed" in skipped["reason"] and skipped["reason"] in report(results)
    rows = scores(results)
    assert len(rows) == 2 * (1 + (LAYERS - 1) * 4 - 1)
    before = results.path.read_bytes()
    run_experiment(spec, results.path)
    assert results.path.read_bytes() == before


def test_a_loss_that_is_not_finite_is_left_out_with_its_reason(folder, tmp_path, monkeypatch):
    original = runner.Trials.losses

    def overflowing(self, layers, operators=None):
        losses = original(self, layers, operators)
        return losses * torch.nan if operators else losses

    monkeypatch.setattr(runner.Trials, "losses", overflowing)
    spec = specification(folder, layers="2-3", perplexity=str(folder / "one.txt"))
    with pytest.warns(UserWarning, match="ghost without layers 2–3 has no finite loss on one.txt"):
        results = run_experiment(spec, tmp_path / "a.jsonl")
    assert scores(results).operator.tolist() == ["dense", "pruned"]
    monkeypatch.undo()
    assert len(scores(run_experiment(spec, results.path))) == 2, "it would be so again"


@pytest.mark.thorough
def test_a_stopped_run_resumes_at_the_first_missing_cell(finished, folder, tmp_path, monkeypatch):
    original, calls, path = runner._Run._perplexity, [], tmp_path / "a.jsonl"

    def interrupted(self, *cell):
        calls.append(cell)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, *cell)

    monkeypatch.setattr(runner._Run, "_perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(complete(folder), path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    results = run_experiment(complete(folder), path)
    assert content(results) == content(finished)
    perplexities = [r for r in finished.of("score") if r["measure"] == "perplexity"]
    assert len(calls) == len(perplexities) + 1, "only the interrupted cell is computed twice"


def test_a_finished_run_computes_nothing(finished, folder, monkeypatch):
    before = finished.path.read_bytes()
    for name in ("calibrate", "select_several", "Trials", "Recipe", "zero_shot"):
        monkeypatch.setattr(runner, name, None)
    assert content(run_experiment(complete(folder), finished.path)) == content(finished)
    assert finished.path.read_bytes() == before


@pytest.mark.thorough
def test_more_operators_depths_and_texts_are_added(folder, tmp_path, monkeypatch):
    path, one = tmp_path / "a.jsonl", str(folder / "one.txt")
    run_experiment(specification(folder, n=1, perplexity=one), path)
    before = path.read_text()
    results = run_experiment(specification(folder, n=[1, 2], operators=["ghost", "scalar"]), path)
    assert path.read_text().startswith(before)
    rows = scores(results).set_index(["n", "operator", "dataset"]).value
    assert rows.index.isin([(1, "scalar", "one.txt"), (0, "dense", "two.txt")]).sum() == 2
    alone = run_experiment(specification(folder, n=2, operators="ghost"), tmp_path / "b.jsonl")
    expected = scores(alone).set_index(["n", "operator", "dataset"]).value
    assert rows[2, "ghost", "two.txt"] == pytest.approx(expected[2, "ghost", "two.txt"])


def test_layers_can_be_chosen_without_scores(folder, tmp_path):
    spec = specification(folder, criteria=["perplexity", "residual"], n=[1, 2], perplexity=[])
    results = run_experiment(spec, tmp_path / "a.jsonl")
    assert len(selections(results)) == 4 and not len(scores(results))
    assert "residual, n = 2: " in report(results)


@pytest.mark.slow
def test_three_shards_in_processes_of_their_own_are_one_run(finished, folder, tmp_path):
    code = (
        "import json, sys, ghostlib as gl;"
        "spec = gl.Specification(**json.loads(sys.argv[1]));"
        "gl.run_experiment(spec, sys.argv[2], shard=sys.argv[3])"
    )
    fields = {name: getattr(complete(folder), name) for name in ("criteria", "n", "operators")}
    spec = json.dumps(arguments(folder, **fields))
    paths = [tmp_path / f"part-{index}.jsonl" for index in (1, 2, 3)]
    jobs = [(spec, path, f"{index}/3") for index, path in enumerate(paths, start=1)]
    for job in fresh.run_all(code, *jobs):
        assert job.returncode == 0, job.stderr
    parts = [content(gl.read_results(path)) for path in paths]
    cells = [{name for name in part if name[0] == "score"} for part in parts]
    assert all(cells) and len(set.union(*cells)) == sum(map(len, cells)), "no cell in two shards"
    joined = tmp_path / "joined.jsonl"
    joined.write_bytes(b"".join(path.read_bytes() for path in paths))
    union = content(gl.read_results(joined))
    assert union.keys() == content(finished).keys()
    for name, record in content(finished).items():
        assert union[name].keys() == record.keys()
        if name[0] == "score":
            assert union[name]["value"] == pytest.approx(record["value"], rel=1e-6)
        else:
            assert union[name].get("layers") == record.get("layers")


@pytest.mark.parametrize("bad", ["0/3", "4/3", "1", "a/3", "1/0", "1/3/5", "-1/3", ""])
def test_an_invalid_shard_is_refused(folder, bad, tmp_path):
    assert read_shard("3/8") == (3, 8)
    with pytest.raises(ValueError, match=f"shard {bad!r} is not of the form 3/8"):
        run_experiment(specification(folder), tmp_path / "a.jsonl", shard=bad)
    assert not list(tmp_path.iterdir())


def test_another_specification_is_refused_before_and_after_the_model_is_loaded(
    finished, folder, monkeypatch
):
    before = finished.path.read_bytes()
    other = tiny_model("llama", seed=1, vocab_size=len(TOKENIZER))
    with pytest.raises(ValueError, match="another specification: fingerprint = 'llama-6x16-"):
        run_experiment(complete(folder), finished.path, model=other, tokenizer=TOKENIZER)
    monkeypatch.setattr(gl.Specification, "load", None)
    with pytest.raises(ValueError, match=r"specification: limit = 8 there, 7 now; name another"):
        run_experiment(specification(folder, limit=7), finished.path)
    assert finished.path.read_bytes() == before
    assert [p.name for p in finished.path.parent.iterdir()] == ["complete.jsonl"]


@pytest.mark.thorough
def test_other_text_in_a_file_of_the_same_name_is_refused(folder, tmp_path):
    text, path = tmp_path / "one.txt", tmp_path / "a.jsonl"
    text.write_text((folder / "one.txt").read_text())
    for field in ("calibration", "perplexity"):
        spec = specification(folder, layers="2", operators="pruned", **{field: str(text)})
        run_experiment(spec, path)
        before = path.read_bytes()
        assert run_experiment(spec, path).path.read_bytes() == before
        text.write_text((folder / "two.txt").read_text())
        with pytest.raises(ValueError, match=f"another {field} file 'one.txt': give the one they"):
            run_experiment(spec, path)
        assert path.read_bytes() == before
        text.write_text((folder / "one.txt").read_text())
        path.unlink()


def test_layers_that_the_model_does_not_have_are_refused_without_a_file(folder, tmp_path):
    for changes in ({"n": LAYERS}, {"layers": f"2-{LAYERS}"}, {"starts": LAYERS}):
        with pytest.raises(ValueError, match=rf"{LAYERS}"):
            run_experiment(specification(folder, **changes), tmp_path / "a.jsonl")
    assert not list(tmp_path.iterdir())


def test_every_window_begins_with_bos_where_the_tokenizer_has_it(folder, tmp_path):
    first = TOKENIZER.bos_token_id
    for bos, begins in ((None, True), (True, True), (False, False)):
        spec = specification(folder, layers="1", operators=["pruned"], bos=bos)
        fitted = [spec.draw_calibration(TOKENIZER), spec.draw_selection(TOKENIZER)]
        test = spec.draw_test(TOKENIZER, spec.perplexity[0]).windows
        for windows in fitted if bos is False else [*fitted, test]:
            only_first = (windows[:, 0] == first).all() and not (windows[:, 1:] == first).any()
            assert only_first == begins
        if bos is False:  # as published: the tokenizer's BOS stands once, before the text
            assert (test == first).sum() == (test[0, 0] == first) == 1
        assert spec.identity().get("bos") == bos
    spec = specification(folder, layers="1", operators=["pruned"])
    records = run_experiment(spec, tmp_path / "a.jsonl").of("score")
    assert records and {record["bos"] for record in records} == {"<bos>"}
    assert {record["tokens"] for record in records} == {3 * 15}  # BOS itself is not scored
