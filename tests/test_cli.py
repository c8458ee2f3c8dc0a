"""The command line on a tiny model, and its one-line errors."""

import json
import runpy

import pytest
import torch
from conftest import LAYERS, VOCABULARY, tiny_model, tiny_windows
from transformers import AutoModelForCausalLM

import ghostlib as gl
from ghostlib.cli import main
from ghostlib.text import assets


@pytest.fixture
def folder(tmp_path, embedded):
    """A tiny model on disk whose vocabulary fits the embedded tokenizer."""
    _, tokenizer = embedded
    assert len(tokenizer) > VOCABULARY
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path


def test_recover_saves_a_model_that_loads(folder, capsys):
    out = folder / "out"
    options = ["--n", "2", "--windows", "4", "--length", "64", "--test-windows", "2"]
    options += ["--relative-ridge", "1e-3", "--dtype", "float32"]
    assert main(["recover", str(folder / "tiny"), str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert "removing layers" in printed and printed.count("held-out perplexity") == 3
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.config.num_hidden_layers == LAYERS - 2
    assert again.config.ghost[0]["operator"] == "ghost"


@pytest.mark.parametrize(
    ("options", "layers"),
    [([], 2), (["--layers", "1", "3"], [1, 3]), (["--criterion", "taylor"], None)],
)
def test_recover_by_the_recipe(folder, capsys, options, layers):
    """Without layers or a criterion it chooses the layers as well."""
    out = folder / "out"
    small = ["--n", "2", "--windows", "6", "--length", "64", "--test-windows", "1"]
    options = [*small, "--operator", "auto", "--dtype", "float32", *options]
    assert main(["recover", str(folder / "tiny"), str(out), *options]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("auto: ")]
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.config.num_hidden_layers == LAYERS - 2
    model, tokenizer = gl.load_model(str(folder / "tiny"))
    calib = gl.token_windows("wiki", tokenizer, length=64, count=6)
    choice = gl.Recipe(model, calib).choose(layers or gl.select_layers(model, calib, 2, "taylor"))
    assert line == str(choice)
    assert f"removing layers {', '.join(map(str, choice.layers))}\n" in printed
    assert printed.index(line) < printed.index("removing layers")
    assert printed.count("held-out perplexity") == 3 and "auto: held-out perplexity" in printed
    ids = tiny_windows(2, 16)
    with torch.no_grad():
        expected = choice.apply(model)(ids).logits
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--operator", "auto"], "give at least 2"),
        (["--operator", "auto", "--relative-ridge", "1e-3"], "leave out --relative-ridge"),
        (["--operator", "auto", "--rank", "4"], "leave out --relative-ridge, --rank and --fit"),
        (["--operator", "auto", "--fit", "sequential"], "leave out --relative-ridge, --rank and"),
        (["--operator", "gost"], "did you mean 'ghost'"),
        (["--criterion", "cosin"], "did you mean 'cosine'"),
        (["--corpus", "wikki"], "wiki"),
        (["--layers", "99"], "out of range"),
        (["--n", "0"], "n = 0"),
        (["--fit", "student"], "'teacher' or 'sequential', got 'student'"),
        (["--operator", "low-rank"], "rank"),
        (["--operator", "low-rank", "--rank", "0"], "between 1 and the width"),
    ],
)
def test_bad_input_ends_in_one_line(folder, capsys, options, message):
    options = ["--n", "2", "--windows", "1", "--length", "64", *options]
    assert main(["recover", str(folder / "tiny"), str(folder / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ghostlib: ") and message in error and error.count("\n") == 1
    assert not (folder / "out").exists()


def test_grid_prints_its_table_and_goes_on(folder, capsys):
    out = folder / "grid.json"
    options = ["--model", str(folder / "tiny"), "--n", "1", "2", "--criteria", "cosine", "taylor"]
    options += ["--repairs", "none", "magnitude", "--dtype", "float32"]
    for name, count, length in (("calibration", 2, 64), ("selection", 1, 32), ("test", 1, 64)):
        options += [f"--{name}-count", str(count), f"--{name}-length", str(length)]
    assert main(["grid", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("cosine", "taylor", "magnitude", "pydoc", "wiki"))
    before = out.read_bytes()
    assert main(["grid", str(out), *options]) == 0
    assert capsys.readouterr().out == printed and out.read_bytes() == before
    assert main(["grid", str(out), *options, "--starts", "4"]) == 0
    assert "cells in" in capsys.readouterr().out
    cells = json.loads(out.read_text())["cells"]
    assert sum(key.startswith("magnitude without") and "–" in key for key in cells) >= 3


def test_grid_scores_given_layers_on_other_corpora(folder, capsys):
    out, text = folder / "grid.json", folder / "mine.txt"
    text.write_text("\n\n".join(f"Paragraph {i} of a text of my own." for i in range(400)))
    options = ["--model", str(folder / "tiny"), "--layers", "1-2,4", "3", "--dtype", "float32"]
    options += ["--repairs", "none", "auto", "x, n(x)", "--test-corpora", str(text)]
    options += ["--calibration-count", "2", "--calibration-length", "64"]
    options += ["--test-count", "2", "--test-length", "32"]
    assert main(["grid", str(out), *options]) == 0
    assert "9 cells in" in capsys.readouterr().out
    whole = json.loads(out.read_text())
    assert whole["settings"]["test_corpora"] == ["mine.txt"]
    keys = {f"{r} without {ls}" for r in ("none", "auto", "x, n(x)") for ls in ("1–2, 4", "3")}
    choices = {"choice for 1–2, 4", "choice for 3"}
    assert whole["cells"].keys() == {"dense"} | keys | choices
    assert all(list(whole["cells"][key]) == ["mine.txt"] for key in keys)
    assert main(["grid", str(folder / "new.json"), *options, "--layers", "3-"]) == 2
    assert "layers '3-' are not of the form 12-15,17,25-26" in capsys.readouterr().err
    assert not (folder / "new.json").exists()


def test_grid_refuses_a_file_of_other_settings(folder, capsys):
    out = folder / "grid.json"
    options = ["--model", str(folder / "tiny"), "--starts", "5", "--repairs", "none"]
    options += ["--test-count", "1", "--test-length", "16"]
    assert main(["grid", str(out), *options]) == 0
    capsys.readouterr()
    assert main(["grid", str(out), *options, "--seed", "1"]) == 2
    assert "other settings: seed = 0 there, 1 now" in capsys.readouterr().err
    assert main(["grid", str(folder / "new.json"), "--criteria", "cosin"]) == 2
    assert "did you mean 'cosine'" in capsys.readouterr().err
    assert not (folder / "new.json").exists()


def test_an_output_folder_in_use_is_refused_before_any_work(folder, capsys):
    assert main(["recover", "no-such-model", str(folder)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_fetch_names_the_files(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "fetch_all", lambda: {"wiki": tmp_path / "wiki.json"})
    assert main(["fetch"]) == 0
    assert "wiki.json" in capsys.readouterr().out


def test_help_and_module_entry(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ghostlib", "recover", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("ghostlib.cli", run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--operator" in shown and "linearpatch-d" in shown and "auto: a recipe" in shown
