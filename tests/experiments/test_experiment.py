"""A whole evaluation on a tiny model, local text and a local task: resumed, never mixed."""

import json
import math
import random
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import yaml
from conftest import LAYERS, tiny_model, tiny_tokenizer
from papermill import inspect_notebook
from test_tasks import questions, write

import ghostlib as gl
from ghostlib.cli import main, parser
from ghostlib.evaluation.tasks import PAPER_TASKS, Score, paired
from ghostlib.experiments import run as experiment
from ghostlib.experiments.run import evaluate
from ghostlib.experiments.spec import Settings
from ghostlib.experiments.tables import accuracies, perplexities, report, wide

TOKENIZER = tiny_tokenizer(bos=True)
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "09_full_model_evaluation.ipynb"
REPAIRS = ("pruned", "linearpatch-d", "replaceme", "ghost")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, two corpora and two tasks."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_model("llama", vocab_size=len(TOKENIZER)).save_pretrained(folder / "tiny")
    TOKENIZER.save_pretrained(folder / "tiny")
    for seed, name in enumerate(("one", "two")):
        rng = random.Random(seed)
        words = ["the", "theory", "of", "thing", "größer", "東京", "then"]
        text = "\n\n".join(" ".join(rng.choices(words, k=40)) for _ in range(30))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        write(folder / f"quiz-{name}.jsonl", questions(12, seed))
    return folder


def settings(folder: Path, **changes: Any) -> Settings:
    corpora = [str(folder / "one.txt"), str(folder / "two.txt")]
    usual: dict[str, Any] = {
        "model": str(folder / "tiny"),
        "n": [2],
        "operators": REPAIRS,
        "calibration": corpora,
        "windows": 5,
        "length": 24,
        "selection_windows": 2,
        "perplexity": corpora,
        "test_windows": 3,
        "test_length": 16,
        "tasks": [str(folder / f"quiz-{name}.jsonl") for name in ("one", "two")],
        "limit": 8,
    }
    return Settings(**usual | changes)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory) -> tuple[Any, Any, Settings, Any]:
    """(model, tokenizer, settings, results) of one whole evaluation."""
    plan = settings(folder)
    model, tokenizer = plan.load()
    path = tmp_path_factory.mktemp("results") / "evaluation.json"
    return model, tokenizer, plan, evaluate(model, tokenizer, plan, path)


def test_every_cell_equals_the_public_functions(done):
    model, tokenizer, plan, results = done
    windows = plan.calibration_windows(tokenizer)
    assert windows.shape == (5, 24)
    first = gl.token_windows(plan.calibration[0], tokenizer, length=24, count=3)
    assert torch.equal(windows[:3], first), "what is over goes to the first corpus"
    layers = gl.select_layers(model, windows[[0, 2]], 2)
    assert results.cells["layers n=2"]["layers"] == list(layers)
    rows = perplexities(results.cells).set_index(["operator", "corpus"])
    scores = accuracies(results.cells).set_index(["operator", "task"])
    for name in ("dense", *REPAIRS):
        variant = model
        if name != "dense":
            pruned = name == "pruned"
            variant = (
                gl.prune(model, layers) if pruned else gl.recover(model, windows, layers, name)
            )
        for corpus in plan.perplexity:
            found = gl.corpus_perplexity(variant, tokenizer, corpus, length=16, count=3)
            row = rows.loc[(name, Path(corpus).name)]
            assert row["perplexity"] == pytest.approx(found.perplexity, rel=1e-5)
            assert row["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-5)
            assert (row["windows"], row["tokens"]) == (3, 3 * 15)
        for task, score in gl.zero_shot(variant, tokenizer, plan.tasks, limit=8).items():
            assert scores.loc[(name, task), "acc"] == score.acc
            assert scores.loc[(name, task), "items"] == 8
    assert len(results.cells) == 1 + 5 * 4


def test_the_file_is_json_and_names_no_folder_of_this_machine(done, folder):
    path = done[3].path
    whole = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert str(folder) not in path.read_text()
    assert whole["settings"]["model"] == "tiny" and whole["settings"]["seed"] == 0
    assert whole["settings"]["calibration"] == ["one.txt", "two.txt"]
    assert {"versions", "hardware", "commit"} <= whole["environments"][0].keys()


def test_a_stopped_run_goes_on_at_the_first_missing_cell(done, tmp_path, monkeypatch):
    model, tokenizer, plan, whole = done
    path, original, calls = tmp_path / "evaluation.json", experiment.corpus_perplexity, []

    def interrupted(*args, **how):
        calls.append(args)
        if len(calls) == 6:  # of linearpatch-d, after the dense and the pruned model's two
            raise KeyboardInterrupt
        return original(*args, **how)

    monkeypatch.setattr(experiment, "corpus_perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, plan, path)
    assert len(json.loads(path.read_text())["cells"]) == 1 + 2 * 4 + 1
    again = evaluate(model, tokenizer, plan, path)
    assert len(calls) == 5 * 2 + 1, "only the interrupted cell was begun twice"
    assert again.cells == whole.cells


def test_a_finished_run_computes_nothing(done, monkeypatch):
    model, tokenizer, plan, results = done
    before = results.path.read_bytes()
    for name in ("calibrate", "select_several", "check_tasks", "recover"):
        monkeypatch.setattr(experiment, name, None)
    assert evaluate(model, tokenizer, plan, results.path).cells == results.cells
    assert results.path.read_bytes() == before


def test_more_repairs_and_depths_are_added(done, folder, monkeypatch):
    """The issue's table is one command; what is there is not computed again."""
    model, tokenizer, _, results = done
    passes, original = [], experiment.calibrate

    def counted(model, windows, boundaries, **how):
        passes.append(boundaries)
        return original(model, windows, boundaries, **how)

    monkeypatch.setattr(experiment, "calibrate", counted)
    more = settings(folder, n=[1, 2, 3], operators=["pruned", "ghost", "ghost sequential"])
    cells = evaluate(model, tokenizer, more, results.path).cells
    assert len(passes) == 2, "one pass to choose layers, one for all operators"
    assert len(passes[1]) == 2, "of what is missing: n = 1 and 3"
    for n in (1, 2, 3):
        alone = gl.select_layers(model, more.calibration_windows(tokenizer)[[0, 2]], n)
        assert cells[f"layers n={n}"]["layers"] == list(alone)
    # One gap: both ways of fitting are the same.
    rows = perplexities(cells).set_index(["operator", "n", "corpus"])["perplexity"]
    assert rows["ghost sequential", 3, "one.txt"] == pytest.approx(rows["ghost", 3, "one.txt"])
    text = report(cells)
    assert text.index("pruned, n = 1") < text.index("ghost, n = 2") < text.index("pruned, n = 3")


def test_operators_with_branches_are_served(folder, tmp_path, monkeypatch):
    """Beside those of the stream, from the same pass, and as the public functions repair."""
    passes, original = [], experiment.calibrate

    def counted(*args, **how):
        passes.append(how)
        return original(*args, **how)

    monkeypatch.setattr(experiment, "calibrate", counted)
    branched = "two-branch-relative"
    operators = ["pruned", "ghost", branched, f"{branched} sequential"]
    plan = settings(folder, n=[1, 2], operators=operators, tasks=[], criterion="block-influence")
    model, tokenizer = plan.load()
    cells = evaluate(model, tokenizer, plan, tmp_path / "evaluation.json").cells
    assert len(passes) == 2 and passes[1]["regressors"] == {"stream", "x, n(x); 1/|y|"}
    measured = [(c["operator"], c["n"]) for c in cells.values() if "perplexity" in c]
    expected = [("dense", 0), *((name, n) for n in (1, 2) for name in operators)]
    assert list(dict.fromkeys(measured)) == expected and len(measured) == 2 * len(expected)
    rows = perplexities(cells).set_index(["operator", "n", "corpus"])["perplexity"]
    assert list(dict.fromkeys(rows.index.droplevel("corpus"))) == expected
    for n in (1, 2):
        layers, windows = cells[f"layers n={n}"]["layers"], plan.calibration_windows(tokenizer)
        for fit, name in (("teacher", branched), ("sequential", f"{branched} sequential")):
            variant = gl.recover(model, windows, layers, branched, fit=fit)
            found = gl.corpus_perplexity(variant, tokenizer, plan.perplexity[0], length=16, count=3)
            assert rows[name, n, "one.txt"] == pytest.approx(found.perplexity, rel=1e-5)


def test_the_recipe_is_served(folder, tmp_path, monkeypatch, capsys):
    """Beside other operators, from one collection for all depths; its choice is kept and told."""
    passes, original = [], gl.calibrate

    def counted(model, windows, boundaries, **how):
        passes.append(len(windows))
        return original(model, windows, boundaries, **how)

    monkeypatch.setattr("ghostlib.recovery.recipe.calibrate", counted)
    plan = settings(folder, n=[1, 2], operators=["pruned", "auto"], tasks=[])
    model, tokenizer = plan.load()
    path = tmp_path / "evaluation.json"
    cells = evaluate(model, tokenizer, plan, path).cells
    assert passes == [3, 2], "the fitted windows and those kept out, once"
    rows = perplexities(cells).set_index(["operator", "n", "corpus"])["perplexity"]
    windows, printed = plan.calibration_windows(tokenizer), capsys.readouterr().out
    for n in (1, 2):
        choice = gl.Recipe(model, windows).choose(cells[f"layers n={n}"]["layers"])
        assert f"n = {n}, {choice}\n" in printed
        kept = cells[f"choice n={n}"]
        assert kept["repair"] == choice.repair and kept["losses"] == pytest.approx(choice.rivals)
        variant = choice.apply(model)
        found = gl.corpus_perplexity(variant, tokenizer, plan.perplexity[0], length=16, count=3)
        assert rows["auto", n, "one.txt"] == pytest.approx(found.perplexity, rel=1e-5)
        assert f"auto n={n} / perplexity of one.txt" in cells
    assert "auto, n = 2" in report(cells)
    monkeypatch.setattr(experiment, "Recipe", None)
    assert evaluate(model, tokenizer, plan, path).cells == cells


def test_what_the_recipe_refuses_ends_the_run_before_it_computes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "corpus_perplexity", None)
    model = tiny_model("olmo2", vocab_size=len(TOKENIZER))
    plan = settings(folder, operators="auto", tasks=[])
    with pytest.raises(ValueError, match=r"candidates=\('ghost', 'ghost-relative'\)"):
        evaluate(model, TOKENIZER, plan, tmp_path / "evaluation.json")


@pytest.mark.parametrize("criterion", ["block-influence", "perplexity", "residual"])
def test_every_kind_of_criterion_chooses_as_alone(criterion, folder, tmp_path):
    plan = settings(
        folder,
        criterion=criterion,
        n=[1, 2],
        operators="ghost",
        perplexity=[],
        selection_windows=None,
    )
    model, tokenizer = plan.load()
    cells = evaluate(model, tokenizer, plan, tmp_path / "evaluation.json").cells
    for n in (1, 2):
        alone = gl.select_layers(model, plan.calibration_windows(tokenizer), n, criterion)
        assert cells[f"layers n={n}"]["layers"] == list(alone)


def test_other_settings_are_refused(done, folder):
    model, tokenizer, _, results = done
    with pytest.raises(ValueError, match="other settings: limit = 8 there, 7 now"):
        evaluate(model, tokenizer, settings(folder, limit=7), results.path)
    other = tiny_model("llama", seed=1, vocab_size=len(TOKENIZER))
    with pytest.raises(ValueError, match="other settings: fingerprint"):
        evaluate(other, tokenizer, settings(folder), results.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operators": ["gost"]}, "did you mean 'ghost'"),
        ({"operators": ["gost sequential"]}, "did you mean 'ghost'"),
        ({"operators": ["auto sequential"]}, "unknown operator 'auto sequential'"),
        (
            {"operators": "auto", "calibration": ["wiki"], "windows": 1, "selection_windows": 1},
            "windows = 1: the recipe fits some windows and judges by others: give at least 2",
        ),
        ({"criterion": "cosin"}, "did you mean 'cosine'"),
        ({"calibration": ["wikki"]}, "wiki"),
        ({"perplexity": ["wikki"]}, "wiki"),
        ({"dtype": "float99"}, "unknown dtype 'float99'"),
        ({"n": [2, 2]}, "n has '2' twice"),
        ({"windows": 1}, "windows = 1 must lie between 2"),
        ({"selection_windows": 6}, "selection_windows = 6 must lie between 2 .* and 5"),
        ({"perplexity": [], "tasks": []}, "a corpus or task to score"),
        ({"calibration": []}, "at least one calibration corpus"),
    ],
)
def test_settings_that_cannot_be_are_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(folder, **changes)


def test_a_wrong_n_or_task_ends_the_run_before_it_computes(folder, done, tmp_path, monkeypatch):
    model, tokenizer, *_ = done
    monkeypatch.setattr(experiment, "corpus_perplexity", None)
    path = tmp_path / "evaluation.json"
    with pytest.raises(ValueError, match=f"n = {LAYERS}"):
        evaluate(model, tokenizer, settings(folder, n=LAYERS), path)
    with pytest.raises(FileNotFoundError, match="no such task file"):
        evaluate(model, tokenizer, settings(folder, tasks="quiz.jsonl"), path)


def losses(*values: float) -> dict[str, Any]:
    mean = float(np.mean(values))
    return {
        "corpus": "text",
        "perplexity": math.exp(mean),
        "bits_per_byte": None,
        "windows": len(values),
        "tokens": 100,
        "window_nll": list(values),
    }


def test_ratios_are_paired_by_window():
    """Windows differ by far more than models do; the interval must not see that."""
    hard = np.linspace(0, 3, 9)
    noise = 0.01 * np.array([1, -1, 2, -2, 0, 1, -1, 2, -2])
    cells = {
        "a": {"operator": "dense", "n": 0, "perplexity": losses(*hard)},
        "b": {"operator": "ghost", "n": 7, "perplexity": losses(*(hard + 0.5 + noise))},
    }
    row = perplexities(cells).query("operator == 'ghost' and corpus == 'text'").iloc[0]
    half = 2.306 * noise.std(ddof=1) / 3  # Student's t with 8 degrees of freedom
    assert row["ratio"] == pytest.approx(math.exp(0.5))
    assert (row["low"], row["high"]) == pytest.approx(
        (math.exp(0.5 - half), math.exp(0.5 + half)), rel=1e-4
    )
    single = {key: {**c, "perplexity": losses(2.0)} for key, c in cells.items()}
    row = perplexities(single).query("operator == 'ghost' and corpus == 'text'").iloc[0]
    assert row["ratio"] == 1 and math.isnan(row["low"])
    assert "7.39" in report(single) and "nan" not in report(single).lower()


def quiz(task: str, correct: list[int], norm: list[int] | None = None) -> dict[str, Any]:
    def error(hits: list[int]) -> float:
        return float(np.std(hits, ddof=1) / len(hits) ** 0.5)

    return {
        "task": task,
        "acc": float(np.mean(correct)),
        "acc_se": error(correct),
        "acc_norm": None if norm is None else float(np.mean(norm)),
        "acc_norm_se": None if norm is None else error(norm),
        "correct": correct,
        "correct_norm": norm,
        "items": task,
    }


def test_means_over_tasks_and_their_errors():
    rng = np.random.default_rng(0)
    hits = {name: rng.integers(0, 2, (2, 40)).tolist() for name in ("dense", "ghost", "norm")}
    cells = {
        f"{name} {task}": {
            "operator": name,
            "n": 7 * (name == "ghost"),
            "scores": [quiz(task, hits[name][i], hits["norm"][i] if task == "b" else None)],
        }
        for name in ("dense", "ghost")
        for i, task in enumerate("ab")
    }
    rows = accuracies(cells).set_index(["operator", "task"])
    mine, mean = rows.loc["ghost"], rows.loc[("ghost", "mean")]
    assert mean["acc"] == pytest.approx(np.mean(hits["ghost"]))
    assert mean["se"] == pytest.approx(math.hypot(mine.loc["a", "se"], mine.loc["b", "se"]) / 2)
    assert mean["items"] == 80
    pair = [
        paired(*(Score(**cells[f"{name} {task}"]["scores"][0]) for name in ("ghost", "dense")))
        for task in "ab"
    ]
    assert mean["difference"] == pytest.approx(np.mean([p.difference for p in pair]))
    half = math.hypot(*(p.high - p.low for p in pair)) / 4
    assert mean["high"] - mean["low"] == pytest.approx(2 * half)
    assert mean["low"] < mean["difference"] < mean["high"]
    normed = accuracies(cells, normed=True).set_index(["operator", "task"])
    assert normed.loc[("ghost", "a"), "acc"] == rows.loc[("ghost", "a"), "acc"]
    assert normed.loc[("ghost", "b"), "acc"] == pytest.approx(np.mean(hits["norm"][1]))
    unfinished = {key: cell for key, cell in cells.items() if key != "ghost b"}
    assert list(accuracies(unfinished).query("operator == 'ghost'")["task"]) == ["a"]
    assert "mean" in report(cells) and "nan" not in report(unfinished).lower()


def test_wide_tables_keep_the_order(done):
    rows = perplexities(done[3].cells)
    shown = wide(rows, "corpus", lambda row: f"{row.perplexity:.1f}")
    assert list(shown.columns) == ["one.txt", "two.txt", "mean"]
    assert [name for n, name in shown.index if n in (0, 2)][:5] == ["dense", *REPAIRS]
    mean = rows.query("operator == 'ghost' and n == 2").set_index("corpus")["perplexity"]
    assert mean["mean"] == pytest.approx((mean["one.txt"] + mean["two.txt"]) / 2)
    assert report({}) == ""


def test_the_command_prints_the_tables(folder, tmp_path, capsys):
    plan = settings(folder, operators=["pruned", "ghost"])
    options = []
    for name, value in vars(plan).items():
        if value is not None:
            values = value if isinstance(value, tuple) else [value]
            options += [f"--{name.replace('_', '-')}", *map(str, values)]
    output = str(tmp_path / "evaluation.json")
    assert main(["evaluate", output, *options]) == 0
    printed = capsys.readouterr().out
    for part in ("bits per byte", "÷ dense", "± standard error", "Difference", "ghost, n = 2"):
        assert part in printed
    assert main(["evaluate", output, *options, "--normed"]) == 0
    assert capsys.readouterr().out != printed
    assert main(["evaluate", output, *options, "--limit", "3"]) == 2
    error = capsys.readouterr().err
    assert "limit = 8 there, 3 now" in error and error.count("\n") == 1


def commands() -> list[str]:
    """The shell commands that notebook 09 documents, continued lines joined."""
    text = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, 4).cells)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [block.replace("\\\n", " ") for block in blocks]


def test_the_notebook_has_every_setting_as_a_parameter_of_papermill():
    names = {field.name for field in fields(Settings)}
    assert set(inspect_notebook(str(NOTEBOOK))) == names | {"output"}


def test_the_documented_commands_are_of_the_papers_settings():
    by_cli, by_papermill = commands()
    (models,) = re.findall(r"for model in (.*?);", by_cli)
    assert len(models.split()) == 3 and "for windows in 32 128;" in by_cli
    (line,) = re.findall(r"ghostlib (evaluate .*)", by_cli)
    line = line.replace("$(basename $model)", "some")
    line = line.replace("$model", models.split()[1]).replace("$windows", "32")
    options = vars(parser().parse_args(shlex.split(line)))
    first = Settings(**{f.name: options[f.name] for f in fields(Settings)})
    (parameters,) = re.findall(r"-y '(\{.*\})'", by_papermill, re.DOTALL)
    given = yaml.safe_load(parameters)
    assert given.keys() <= inspect_notebook(str(NOTEBOOK)).keys()
    second = Settings(**{name: value for name, value in given.items() if name != "output"})
    assert first == second
    assert first.tasks == PAPER_TASKS and first.n == (7, 11)
    assert (first.windows, first.length, first.calibration) == (32, 2048, ("c4",))
    assert (first.test_windows, first.perplexity) == (None, ("wikitext2", "ptb", "c4"))
