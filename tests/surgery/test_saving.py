"""Folders that other programs load: the stock class, the portable file, the model card."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_windows
from transformers import AutoModelForCausalLM

import ghostlib as gl
from ghostlib.surgery.saving import check_output, save

GAP = gl.Boundary(2, 4)

# Loads a folder where ghostlib cannot be imported; prints the class and some logits.
SCRIPT = """
import json, sys
sys.modules["ghostlib"] = None
import torch
from transformers import AutoModelForCausalLM
folder, options = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, **options)
ids = torch.arange(1, 10)[None]
cached = model.generate(ids, max_new_tokens=6, do_sample=False)
plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
assert torch.equal(cached, plain)
print(json.dumps([type(model).__name__, model(ids).logits[0, -1].tolist()]))
"""


def load_elsewhere(folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(options)]
    return subprocess.run(command, capture_output=True, text=True)


def repaired(name: str, model: Any = None, **options: Any) -> Any:
    model = tiny_model("llama") if model is None else model
    return gl.recover(model, tiny_windows(24, 24), GAP.removed, name, **options)


@pytest.mark.parametrize("name", ["refit", "replaceme", "magnitude"])
def test_a_folded_repair_loads_as_the_stock_class_without_ghostlib(
    name: str, tmp_path: Path
) -> None:
    recovered = repaired(name)
    folder = save(recovered, tmp_path / "model")
    done = load_elsewhere(folder)
    assert done.returncode == 0, done.stderr
    kind, logits = json.loads(done.stdout)
    assert kind == "LlamaForCausalLM"
    expected = recovered(torch.arange(1, 10)[None]).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected)
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in folder.iterdir()}
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model_type"] == "llama" and settings["num_hidden_layers"] == 4
    assert settings["recovery"]["removed"] == [2, 3]


@pytest.mark.parametrize("name", ["ghost", "ghost-refit", "three-branch", "affine"])
@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_a_portable_folder_loads_with_its_own_code(layout: str, name: str, tmp_path: Path) -> None:
    recovered = repaired(name, tiny_model(layout), relative_ridge=1e-3)
    folder = save(recovered, tmp_path / "model", portable=True)
    done = load_elsewhere(folder, trust_remote_code=True)
    assert done.returncode == 0, done.stderr
    kind, logits = json.loads(done.stdout)
    assert kind == type(recovered).__name__
    expected = recovered(torch.arange(1, 10)[None]).logits[0, -1]
    assert torch.equal(torch.tensor(logits), expected), "not bit-equal"
    text = (folder / "modeling_ghosted.py").read_text()
    imports = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert imports and not any("ghostlib" in ast.unparse(node) for node in imports)
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(recovered)  # with ghostlib


def test_a_portable_folder_in_bfloat16(tmp_path: Path) -> None:
    recovered = repaired("two-branch", relative_ridge=1e-3).bfloat16()
    folder = save(recovered, tmp_path / "model", portable=True)
    done = load_elsewhere(folder, trust_remote_code=True, dtype="bfloat16")
    assert done.returncode == 0, done.stderr
    expected = recovered(torch.arange(1, 10)[None]).logits[0, -1]
    assert torch.equal(torch.tensor(json.loads(done.stdout)[1]), expected.float())


@pytest.mark.parametrize("portable", [False, True])
def test_without_ghostlib_or_trust_loading_fails_loudly(portable: bool, tmp_path: Path) -> None:
    folder = save(repaired("ghost"), tmp_path / "model", portable=portable)
    done = load_elsewhere(folder)
    assert done.returncode != 0
    assert ("trust_remote_code" if portable else "ghosted_llama") in done.stderr


def test_the_card_says_what_was_done(tmp_path: Path) -> None:
    facts = {
        "base_model": "someone/model",
        "license": "apache-2.0",
        "text": "wiki, 16 windows of 2,048 tokens",
        "seed": 0,
        "perplexity": {"dense": 12.125, "recovered": 17.5},
    }
    folder = save(repaired("ghost"), tmp_path / "m", facts=facts)
    card = (folder / "README.md").read_text()
    front = card.split("---\n")[1]
    for part in ("base_model: someone/model", "license: apache-2.0", "library_name: transformers"):
        assert f"{part}\n" in front
    for part in ("layers 2–3", "`ghost`", "| dense | 12.12 |", "seed: 0", "import ghostlib"):
        assert part in card, part
    record = json.loads(card.split("```json\n")[1].split("```")[0])
    assert record == repaired("ghost").config.recovery
    portable = (save(repaired("ghost"), tmp_path / "p", portable=True) / "README.md").read_text()
    assert "trust_remote_code=True" in portable and "import ghostlib" not in portable


def test_output_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    recovered = repaired("refit")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for path, match in (("file", "is a file"), ("full", "not empty"), ("file/below", "is a file")):
        with pytest.raises(OSError, match=match):
            save(recovered, tmp_path / path)
    assert (
        (tmp_path / "file").read_text() == (tmp_path / "full" / "notes.txt").read_text() == "mine"
    )
    with pytest.raises(OSError, match="GB are free"):
        check_output(tmp_path / "new", bytes_needed=10**18)
    (tmp_path / "empty").mkdir()
    assert save(recovered, tmp_path / "empty") == tmp_path / "empty"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "full", "empty"}


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recovered = repaired("refit")

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", broken)  # the card comes last
    with pytest.raises(OSError, match="No space left"):
        save(recovered, tmp_path / "model")
    assert not list(tmp_path.iterdir())
