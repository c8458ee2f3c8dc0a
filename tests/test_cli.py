"""The command line on a tiny model; its errors are in tests/contract."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, tiny_model, tiny_tokenizer, tiny_windows
from transformers import AutoModelForCausalLM

import ghostlib as gl
from ghostlib import common
from ghostlib.cli import main, parser
from ghostlib.experiments.tables import scores
from ghostlib.recovery.recipe import BUDGETS
from ghostlib.text import assets

pytestmark = pytest.mark.thorough

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Folder with a tiny model, its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama", vocab_size=len(TOKENIZER)).save_pretrained(folder / "tiny")
    TOKENIZER.save_pretrained(folder / "tiny")
    text = "\n\n".join(f"Paragraph {i} of the theory of a thing." for i in range(400))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture
def recover(tiny, tmp_path):
    """``ghostlib recover`` into a new folder, with few and short windows."""
    defaults = ["--corpus", str(tiny / "text.txt"), "--windows", "4", "--length", "32"]
    defaults += ["--test-windows", "2", "--dtype", "float32"]

    def run(*options: str) -> int:
        return main(["recover", str(tiny / "tiny"), str(tmp_path / "out"), *defaults, *options])

    return run


def test_recover_saves_a_model_that_loads(recover, tmp_path, capsys):
    assert recover("--n", "2", "--relative-ridge", "1e-3") == 0
    printed = capsys.readouterr().out
    table = dict(
        re.split(r"  +", line, maxsplit=1) for line in printed.split("\n\n")[0].splitlines()
    )
    assert table["layers removed"].endswith("(2)")
    for name in ("dense", "pruned", "ghost"):
        assert float(table[f"held-out perplexity, {name}"]) > 1
    assert {"parameters", "gap closed", "time", "peak memory", "saved to"} <= set(table)
    assert re.search(r"^copying +nats per token", printed, re.MULTILINE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == LAYERS - 2
    assert loaded.config.ghost[0]["operator"] == "ghost"
    assert loaded.config.recovery["removed"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "held-out perplexity" in card and "| brackets |" in card
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "layers"),
    [(["--n", "2"], 2), (["--layers", "1", "3"], [1, 3]), (["--layers", "2-3"], [2, 3])],
)
def test_recover_by_the_recipe(tiny, recover, tmp_path, capsys, options, layers):
    """Without layers or a criterion the recipe chooses the layers as well."""
    assert recover("--operator", "auto", *options) == 0
    printed = capsys.readouterr().out
    (line,) = re.findall(r"^chosen +(.+)$", printed, re.M)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == LAYERS - 2
    model, tokenizer = gl.load_model(str(tiny / "tiny"))
    calib = gl.token_windows(tiny / "text.txt", tokenizer, length=32, count=4)
    choice = gl.Recipe(model, calib).choose(layers)
    assert line == str(choice)
    assert re.search(rf"^layers removed +{gl.spell(choice.layers)} \(2\)$", printed, re.M)
    assert "held-out perplexity, auto" in printed
    ids = tiny_windows(2, 16)
    with torch.no_grad():
        expected = choice.apply(model)(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_recover_as_json(recover, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GHOSTLIB_PROGRESS", "1")
    assert recover("--layers", "2-3", "--json") == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["layers"] == [2, 3] and record["folder"] == str(tmp_path / "out")
    dense, pruned, repaired = (record["perplexity"][k] for k in ("dense", "pruned", "ghost"))
    if record["gap_closed"] is not None:
        assert record["gap_closed"] == pytest.approx(gl.gap_closed(dense, pruned, repaired))
    assert record["parameters"]["dense"] > record["parameters"]["recovered"]
    assert record["peak_memory"] > 1e8 and record["seconds"] > 0
    for step in ("loading", "choosing layers", "calibrating", "scoring"):
        assert re.search(rf"(?:^|\r){step}; about .+ left$", printed.err, re.M), step


def test_a_dry_run_prints_the_plan_and_does_nothing(recover, tiny, tmp_path, capsys):
    assert recover("--n", "2", "--dry-run", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    model, _ = gl.load_model(str(tiny / "tiny"))
    assert record["memory"]["weights"] == gl.weight_bytes(model)
    assert record["parameters"] == gl.count_parameters(model)
    assert record["download"] == 0 and record["removed"] == 2
    assert sum(record["seconds"].values()) > 0
    assert recover("--n", "2", "--dry-run", "--operator", "auto") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^to download +nothing$", printed, re.M) and "memory on cpu" in printed
    assert not list(tmp_path.iterdir())


def test_an_ability_to_keep_is_planned_and_checked_beforehand(recover, capsys):
    plans = []
    for keep in ([], ["--keep", "copying-16"]):
        assert recover("--n", "2", "--operator", "auto", *keep, "--dry-run", "--json") == 0
        plans.append(json.loads(capsys.readouterr().out))
    first, second = (plan["memory"]["calibration"] for plan in plans)
    assert first < second
    assert recover("--n", "2", "--operator", "auto", "--keep", "copyin", "--dry-run") == 2
    assert "unknown probe 'copyin'; did you mean 'copying'" in one_line(capsys)


@pytest.mark.parametrize("failing", ["dense", "pruned"])
def test_a_repair_is_saved_whatever_the_others_score(
    recover, tmp_path, capsys, monkeypatch, failing
):
    from ghostlib.evaluation import perplexity as module

    original, order = module.window_losses, iter(["dense", "pruned", "ghost"])

    def broken(model, windows, **options):
        if next(order) == failing:
            raise ValueError("the loss of window 0 is nan")
        return original(model, windows, **options)

    monkeypatch.setattr(module, "window_losses", broken)
    assert recover("--layers", "2", "--json") == 0
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert record["perplexity"][failing] is None and record["perplexity"]["ghost"] > 1
    assert record["gap_closed"] is None and (tmp_path / "out" / "README.md").exists()


def test_a_repair_that_is_not_finite_is_not_saved(recover, tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise ValueError("the loss of window 0 is nan")

    monkeypatch.setattr("ghostlib.evaluation.perplexity.window_losses", broken)
    assert recover("--layers", "2") == 2
    assert "the loss of window 0 is nan" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_infinite_perplexities_are_printed_and_saved(tiny, tmp_path, capsys):
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    model.save_pretrained(tmp_path / "loud")
    TOKENIZER.save_pretrained(tmp_path / "loud")
    options = ["--layers", "2", "--windows", "2", "--length", "32", "--test-windows", "1"]
    options += ["--corpus", str(tiny / "text.txt")]
    assert main(["recover", str(tmp_path / "loud"), str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^held-out perplexity, \w+ +inf$", printed, re.M)) == 3
    assert re.search(r"^gap closed +no finite gap$", printed, re.M)
    assert "| dense | inf |" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(
    recover, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ghostlib.recovery.plan.available_bytes", lambda: 5_000_000)
    assert recover("--n", "2", "--dry-run") == 3
    error = capsys.readouterr().err
    assert re.search(r"needs about [\d.]+ MB on cpu .* and 5\.0 MB are free: use", error)
    assert recover("--n", "2") == 3
    assert not list(tmp_path.iterdir())


def test_recover_with_weights_on_disk(recover, tmp_path, capsys):
    assert recover("--n", "2", "--offload", str(tmp_path / "weights"), "--json") == 0
    spread = json.loads(capsys.readouterr().out)["perplexity"]
    shutil.rmtree(tmp_path / "out")
    assert recover("--n", "2", "--json") == 0
    assert spread == pytest.approx(json.loads(capsys.readouterr().out)["perplexity"])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("ghostlib: ") and error.count("\n") == 1 and "\r" not in error
    return error


def test_abilities_of_a_model_and_of_its_repair(tiny, recover, tmp_path, capsys):
    assert recover("--layers", "2", "--relative-ridge", "1e-2") == 0
    capsys.readouterr()
    command = ["abilities", str(tmp_path / "out"), "--reference", str(tiny / "tiny")]
    assert main([*command, "--probes", "copying-16", "brackets", "copying-256"]) == 0
    printed = capsys.readouterr().out
    assert "copying-16" in printed and "dense" in printed
    assert "left out copying-256: it takes 512 tokens, and the model knows 128" in printed
    assert main([*command, "--probes", "brackets", "--json", "--seed", "3"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["seed"] == 3 and len(record["abilities"]["brackets"]["values"]) == 60
    assert main([*command, "--probes", "name"]) == 2
    assert "unknown probe 'name'; did you mean 'names'" in one_line(capsys)
    assert main(["abilities", "./nope"]) == 2
    assert "no such model folder: ./nope" in one_line(capsys)


def test_lost_abilities_are_in_the_output_and_the_card(recover, tmp_path, capsys, monkeypatch):
    line = "lost copying: 2.60 -> 11.9 nats per token"
    monkeypatch.setattr(gl.Profile, "lost", [line])
    assert recover("--layers", "2") == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^abilities lost +{re.escape(line)}$", printed, re.M)
    assert "**L" + line[1:] + ".**" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named(recover, capsys):
    assert recover("--device", "cuda") == 2
    assert "device 'cuda' cannot be used" in one_line(capsys)


def test_an_unusable_output_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for output, message in (
        (tmp_path, "is not empty: name a new one"),
        (tmp_path / "file", "is a file: name a folder"),
        (tmp_path / "file" / "out", "file is a file"),
    ):
        assert main(["recover", "no-such-model", str(output)]) == 2
        assert message in one_line(capsys)
    for output in (tmp_path, tmp_path / "file" / "a"):
        assert main(["experiment", str(output)]) == 2
        assert "cannot be written" in one_line(capsys)


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    for command in (
        ["recover", "./nope", str(tmp_path / "out")],
        ["experiment", "--model", "./nope", str(tmp_path / "out")],
    ):
        assert main(command) == 2
        assert "no such model folder: ./nope" in one_line(capsys)


@pytest.mark.parametrize("command", ["recover", "experiment"])
def test_a_hub_that_is_not_there_is_named_at_once(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    out = str(tmp_path / "out")
    model = ["no-such-org/no-such-model", out]
    assert main([command, *(model if command == "recover" else [out, "--model", model[0]])]) == 2
    assert "the Hugging Face hub cannot be reached" in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def experiment(tiny, tmp_path):
    """``ghostlib experiment`` on few and short windows of a local text."""
    text = str(tiny / "text.txt")
    defaults = ["--model", str(tiny / "tiny"), "--calibration", text, "--perplexity", text]
    defaults += ["--windows", "2", "--length", "32", "--test-windows", "2", "--test-length", "16"]

    def run(*options: str) -> int:
        return main(["experiment", str(tmp_path / "a.jsonl"), *defaults, *options])

    return run


def test_an_experiment_prints_its_tables_and_resumes(experiment, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    options = ["--n", "1", "2", "--criteria", "cosine", "residual"]
    options += ["--operators", "pruned", "scalar"]
    assert experiment(*options) == 0
    printed = capsys.readouterr().out
    for part in ("bits per byte", "÷ dense", "scalar, n = 2, cosine", "residual, n = 1: "):
        assert part in printed
    before = path.read_bytes()
    assert experiment(*options) == 0
    assert capsys.readouterr().out == printed and path.read_bytes() == before
    assert experiment("--starts", "4", "--operators", "pruned") == 0
    assert "pruned, n = 4, 1–4" in capsys.readouterr().out
    assert experiment("--layers", "1-2,4", "3", "--operators", "x, n(x)") == 0
    rows = scores(gl.read_results(path))
    assert {"1–2, 4", "3", "0–3"} <= set(rows.layers) and "x, n(x)" in set(rows.operator)


def test_shards_on_the_command_line_are_one_run(experiment, tmp_path, capsys):
    options = ["--n", "1", "2", "--operators", "pruned", "scalar"]
    counts = []
    for shard in ("1/2", "2/2"):
        assert experiment(*options, "--shard", shard) == 0
        counts.append(len(scores(gl.read_results(tmp_path / "a.jsonl"))))
    assert 0 < counts[0] < counts[1] == 1 + 2 * 2
    before = (tmp_path / "a.jsonl").read_bytes()
    assert experiment(*options) == 0 and (tmp_path / "a.jsonl").read_bytes() == before


def test_another_specification_is_refused(experiment, tmp_path, capsys):
    assert experiment("--n", "1", "--operators", "pruned") == 0
    before = (tmp_path / "a.jsonl").read_bytes()
    capsys.readouterr()
    assert experiment("--n", "1", "--operators", "pruned", "--seed", "1") == 2
    assert "another specification: seed = 0 there, 1 now" in one_line(capsys)
    assert (tmp_path / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize(("kind", "status"), [(ValueError, 2), (RuntimeError, 1)])
def test_an_error_under_a_progress_bar_leaves_one_line(
    experiment, capsys, monkeypatch, kind, status
):
    from ghostlib.experiments import run

    def failing(*_):
        for _ in common.track(range(3), "inner"):
            raise kind("went wrong\nand more of it")

    monkeypatch.setattr(common, "shown", lambda: True)
    monkeypatch.setattr(run._Run, "_score", failing)
    assert experiment("--n", "1", "--operators", "pruned") == status
    error = capsys.readouterr().err
    last = re.split(r"[\r\n]", error.rstrip("\n"))[-1]
    assert last == "ghostlib: went wrong" and "and more of it" not in error


def test_an_interrupt_ends_in_one_line(experiment, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ghostlib.experiments.run.run_experiment", interrupted)
    assert experiment() == 130
    assert one_line(capsys) == "ghostlib: interrupted\n"


def test_fetch_names_the_files(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "fetch_all", lambda: {"wiki": tmp_path / "wiki.json"})
    assert main(["fetch"]) == 0
    assert "wiki.json" in capsys.readouterr().out


def test_a_reader_that_ends_early_is_no_error():
    command = [sys.executable, "-m", "ghostlib.cli", "names"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as head and less do
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_names_lists_the_values_of_options(capsys):
    assert main(["names"]) == 0
    printed = capsys.readouterr().out
    registries = (*gl.OPERATORS, *gl.CRITERIA, *BUDGETS, *gl.CORPORA, *gl.PROBES)
    for name in (*registries, "wiki-topic", "arc_easy"):
        assert re.search(rf"^\w+ +{re.escape(name)}\b", printed, re.MULTILINE)


@pytest.mark.parametrize("command", ["fetch", "names", "abilities", "recover", "experiment"])
def test_help_has_three_valid_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    lines = [line for line in examples.splitlines() if line.startswith("  ")]
    assert len(lines) == 3
    for line in lines:
        match = re.search(r"ghostlib (.+?)(?:   .*| \|.*)?$", line)
        assert parser().parse_args(match[1].split()).command == command


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["recover", "a", "b", "--oper"], ["grid"]]
)
def test_help_version_and_usage_errors_need_no_torch(arguments):
    """Importing it takes seconds."""
    code = (
        "import sys; from ghostlib.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as stop: status = stop.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'datasets', 'scipy'} & sys.modules.keys()\n"
        "print(heavy or 'light'); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.endswith("light\n")
    assert done.returncode == (0 if arguments[0].startswith("--") else 2)
    assert done.stderr.count("\n") == bool(done.returncode)
    if arguments == ["--version"]:
        assert re.match(r"ghostlib \d+\.\d+", done.stdout)


def test_json_is_finite(experiment, tmp_path):
    assert experiment("--n", "1", "--operators", "pruned") == 0
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.embedded
def test_inspect_prints_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "smollm2"]) == 0
    out = capsys.readouterr().out
    assert "30 layers, stream of 576" in out and "ghost-refit" in out
