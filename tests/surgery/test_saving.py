"""Folders that other programs load: the stock class, the portable file, the model card."""

import ast
import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fresh
import pytest
import torch
import transformers
from conftest import tiny_model, tiny_windows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ghostlib as gl
from ghostlib.surgery.saving import check_output, save

GAP = gl.Boundary(2, 4)

# Loads folders without ghostlib; prints the class and some logits of each.
SCRIPT = """
import json, sys
sys.modules["ghostlib"] = None
import torch
from transformers import AutoModelForCausalLM
ids = torch.arange(1, 10)[None]
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, **json.loads(sys.argv[1]))
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    for cache in (None, "static"):
        cached = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation=cache)
        assert torch.equal(cached, plain), folder
    print(json.dumps([type(model).__name__, model(ids).logits[0, -1].tolist()]))
"""


def run_elsewhere(*folders: Path, **options: Any) -> fresh.Done:
    return fresh.run(SCRIPT, json.dumps(options), *folders)


def load_elsewhere(*folders: Path, **options: Any) -> list[tuple[str, torch.Tensor]]:
    """Class name and last logits of each folder's model, from one process without ghostlib."""
    done = run_elsewhere(*folders, **options)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return [(kind, torch.tensor(logits)) for kind, logits in lines]


def last_logits(model: Any) -> torch.Tensor:
    return model(torch.arange(1, 10)[None]).logits[0, -1]


def repaired(name: str, model: Any = None, **options: Any) -> Any:
    model = tiny_model("llama") if model is None else model
    return gl.recover(model, tiny_windows(24, 24), GAP.removed, name, **options)


@pytest.mark.thorough
def test_folded_repairs_load_as_the_stock_class_without_ghostlib(tmp_path: Path) -> None:
    models = {name: repaired(name) for name in ("refit", "replaceme", "magnitude")}
    folders = [save(model, tmp_path / name) for name, model in models.items()]
    loaded = load_elsewhere(*folders)
    for folder, (kind, logits) in zip(folders, loaded, strict=True):
        assert kind == "LlamaForCausalLM"
        torch.testing.assert_close(logits, last_logits(models[folder.name]))
        files = {p.name for p in folder.iterdir()}
        assert {"config.json", "model.safetensors", "README.md"} <= files
        settings = json.loads((folder / "config.json").read_text())
        assert settings["model_type"] == "llama" and settings["num_hidden_layers"] == 4
        assert settings["recovery"]["removed"] == [2, 3]


@pytest.mark.thorough
def test_portable_folders_load_with_their_own_code(tmp_path: Path) -> None:
    models = {
        f"{layout}-{name}": repaired(name, tiny_model(layout), relative_ridge=1e-3)
        for layout in ("llama", "gpt2")
        for name in ("ghost", "ghost-refit", "three-branch", "affine")
    }
    models["half"] = repaired("two-branch", relative_ridge=1e-3).bfloat16()
    folders = [save(m, tmp_path / name, portable=True) for name, m in models.items()]
    outcomes = load_elsewhere(*folders, trust_remote_code=True, dtype="auto")
    for folder, (kind, logits) in zip(folders, outcomes, strict=True):
        model = models[folder.name]
        assert kind == type(model).__name__
        # Processes may round differently, by the alignment of memory; the weights are the same.
        torch.testing.assert_close(logits, last_logits(model).float(), rtol=1e-5, atol=1e-5)
        nodes = ast.walk(ast.parse((folder / "modeling_ghosted.py").read_text()))
        imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
        assert imports and not any("ghostlib" in ast.unparse(node) for node in imports)
        loaded = AutoModelForCausalLM.from_pretrained(folder)  # with ghostlib
        assert type(loaded) is type(model)
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), f"{folder.name}: {key}"


@pytest.mark.thorough
@pytest.mark.parametrize("portable", [False, True])
def test_without_ghostlib_or_trust_loading_fails_loudly(portable: bool, tmp_path: Path) -> None:
    folder = save(repaired("ghost"), tmp_path / "model", portable=portable)
    done = run_elsewhere(folder)
    assert done.returncode != 0
    assert ("trust_remote_code" if portable else "ghosted_llama") in done.stderr


@pytest.mark.thorough
def test_a_portable_folder_edited_by_hand_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save(repaired("ghost"), tmp_path / "model", portable=True)
    edited(folder, lambda settings: settings["ghost"].pop())
    done = run_elsewhere(folder, trust_remote_code=True)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("ValueError: ")
    assert "lists its operators in config.ghost, got []" in done.stderr.splitlines()[-1]


@pytest.mark.thorough
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


def test_a_model_with_nothing_removed_is_saved_and_its_card_says_so(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for name, each in {"dense": model, "copy": gl.install(model, {})}.items():
        card = (save(each, tmp_path / name) / "README.md").read_text()
        assert "No decoder layer of the dense model is removed." in card
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(last_logits(loaded), last_logits(model))


def test_output_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    recovered = repaired("refit")
    (tmp_path / "file").write_text("keep me")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep me")
    for path, match in (("file", "is a file"), ("full", "not empty"), ("file/below", "is a file")):
        with pytest.raises(OSError, match=match):
            save(recovered, tmp_path / path)
    assert (tmp_path / "file").read_text() == "keep me"
    assert (tmp_path / "full" / "notes.txt").read_text() == "keep me"
    with pytest.raises(OSError, match="GB are free"):
        check_output(tmp_path / "new", bytes_needed=10**18)
    (tmp_path / "empty").mkdir()
    assert save(recovered, tmp_path / "empty") == tmp_path / "empty"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "full", "empty"}


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recovered = repaired("refit")
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(Path, "write_text", full)  # the card is written last
    with pytest.raises(OSError, match="No space left"):
        save(recovered, tmp_path / "model")
    assert not list(tmp_path.iterdir())


# --- save_pretrained itself -------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    recovered = repaired("ghost")
    (tmp_path / "file").write_text("keep me")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="file is a file: name a folder"):
        recovered.save_pretrained(tmp_path / "file")
    with pytest.raises(FileExistsError, match="exists and is not empty: name a new one"):
        recovered.save_pretrained(tmp_path / "full")
    paths = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    assert paths == {"file", "full", "full/precious.txt"}
    assert (tmp_path / "file").read_text() == "keep me"


# A limit on file sizes acts as a full disk; the configuration fits.
FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
import ghostlib as gl
from conftest import tiny_model, tiny_windows
recovered = gl.recover(tiny_model("llama"), tiny_windows(), [2, 3])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
for folder in sys.argv[1:2] + sys.argv[3:]:
    try:
        recovered.save_pretrained(folder)
    except OSError as error:
        print(error)
"""


@pytest.mark.thorough
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    (tmp_path / "empty").mkdir()
    folders = [tmp_path / "new", tmp_path / "empty"]
    done = fresh.run(FULL_DISK, folders[0], Path(__file__).parents[1], folders[1])
    assert done.returncode == 0, done.stderr
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{folder} could not be written, nothing was saved: ")
        assert "too large" in line.lower()
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]
    for folder in folders:
        repaired("ghost").save_pretrained(folder)  # a second attempt is not refused
        assert {p.name for p in folder.iterdir()} >= {"config.json", "model.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == {"new", "empty"}


def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovered = repaired("ghost")
    (tmp_path / f".model.{os.getpid()}.tmp").mkdir()  # of a process that was killed
    with monkeypatch.context() as patch:
        interrupted = Mock(side_effect=KeyboardInterrupt)
        patch.setattr(type(recovered.generation_config), "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recovered.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    recovered.save_pretrained(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_named_as_people_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recovered = repaired("ghost")
    (tmp_path / "here").mkdir()
    recovered.save_pretrained("here")
    recovered.save_pretrained(tmp_path / "new" / "below")
    monkeypatch.chdir(tmp_path / "new")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    recovered.save_pretrained(tmp_path / "link" / "beside")
    for folder in ("here", "new/below", "new/beside"):
        AutoModelForCausalLM.from_pretrained(tmp_path / folder)


# --- files that do not match the configuration ------------------------------------------------


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


BAD_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "empty list": (lambda c: c.update(ghost=[]), r"lists its operators in config.ghost, got \[\]"),
    "empty dict": (lambda c: c.update(ghost={}), r"lists its operators in config.ghost, got \{\}"),
    "no list": (lambda c: c.pop("ghost"), "lists its operators in config.ghost, got None"),
    "one twice": (lambda c: c["ghost"].append(c["ghost"][0]), "each of which must be another"),
    "unknown module": (
        lambda c: c["ghost"][0].update(module="model.layers.9"),
        "layers.9, .*each of which must be another",
    ),
    "no shape": (lambda c: c["ghost"][0].pop("features"), "an entry of config.ghost holds module"),
    "no entry": (lambda c: c["ghost"].append("ghost"), "an entry of config.ghost holds module"),
    "one too few": (
        lambda c: c["ghost"].pop(),
        "has weights that its config.json does not name, such as model.norm.boundary.M",
    ),
    "another module": (
        lambda c: c["ghost"][0].update(module="model.layers.1"),
        "lacks weights that its config.json calls for, such as model.layers.1.boundary.M",
    ),
    "fewer layers": (
        lambda c: c.update(num_hidden_layers=c["num_hidden_layers"] - 1),
        "model.layers.2, model.norm, each of which must be another module of the model",
    ),
    "more layers": (
        lambda c: c.update(num_hidden_layers=c["num_hidden_layers"] + 1),
        "lacks weights that its config.json calls for, such as model.layers.3",
    ),
    "unknown feature": (lambda c: c["ghost"][0].update(features=["y"]), "unknown feature 'y'"),
}


@pytest.mark.thorough
@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    recovered = gl.recover(tiny_model("llama"), tiny_windows(), [2, 3, 5])
    recovered.save_pretrained(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    gl.recover(tiny_model("llama"), tiny_windows(), [2, 3, 5]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for missing in ("model.norm.boundary.M", "model.layers.0.mlp.down_proj.weight"):
        others = {name: tensor for name, tensor in tensors.items() if name != missing}
        save_file(others, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"lacks weights .*, such as {missing}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(tensors, file, metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("loader", ["LlamaForCausalLM", "LlamaModel"])
def test_a_stock_class_never_drops_the_operators(loader: str, tmp_path: Path) -> None:
    repaired("ghost").save_pretrained(tmp_path)
    with pytest.raises(OSError, match="import-ghostlib-first"):
        getattr(transformers, loader).from_pretrained(tmp_path)


def test_shards_are_loaded(tmp_path: Path) -> None:
    recovered, ids = repaired("three-branch", relative_ridge=1e-3), tiny_windows()
    recovered.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, recovered(ids).logits)


@pytest.mark.parametrize("name", ["refit", "pruned"])
def test_a_stock_class_is_not_saved_onto_a_file(name: str, tmp_path: Path) -> None:
    """transformers itself logs it, saves nothing and returns."""
    model = tiny_model("llama")
    recovered = gl.prune(model, [2, 3]) if name == "pruned" else repaired(name, model)
    (tmp_path / "file").write_text("keep me")
    for each in (recovered, copy.deepcopy(recovered), pickle.loads(pickle.dumps(recovered))):
        assert type(each) is type(model)
        with pytest.raises(FileExistsError, match="file is a file: name a folder"):
            each.save_pretrained(tmp_path / "file")
        each.config.recovery["note"] = "its own"
        each.save_pretrained(tmp_path / "folder", max_shard_size="10KB")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
        assert loaded.config.recovery == each.config.recovery
        each.config.recovery["note"] = "another's"
    assert (tmp_path / "file").read_text() == "keep me"
