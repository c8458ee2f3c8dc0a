"""A specification refuses invalid values before any model is loaded, and draws its windows."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from conftest import tiny_tokenizer
from papermill import inspect_notebook

import ghostlib as gl
from ghostlib.cli import _descriptions, parser
from ghostlib.evaluation.tasks import PAPER_TASKS
from ghostlib.tutorial.stored import stored

TOKENIZER = tiny_tokenizer(bos=True)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of the theory." for i in range(400)))
    return str(path)


def test_a_single_value_serves_for_a_list(text: str) -> None:
    one = gl.Specification(n=3, operators="ghost", calibration=Path(text), perplexity=text)
    many = gl.Specification(n=[3], operators=["ghost"], calibration=[text], perplexity=(text,))
    assert one == many and one.criteria == ("cosine",) and one.calibration == (text,)
    several = gl.Specification(layers=["17,12-14", (3, 2)])
    assert several.layers == ((12, 13, 14, 17), (2, 3)) and several.criteria == several.n == ()
    assert gl.Specification(layers="12-14").layers == ((12, 13, 14),)


def test_operators_have_one_spelling() -> None:
    names = ["ghost sequential", "two-branch", "x, n(x); 1/|y|", "n(x)", "auto", "auto none"]
    assert gl.Specification(operators=[*names, "pruned"]).operators == (*names, "pruned")
    with pytest.raises(ValueError, match="operators has 'x, n\\(x\\)' twice"):
        gl.Specification(operators=["x, n(x)", "x, n(x); 1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [12, 13]}, "layers = 12: give sets of layers"),
        ({"layers": "a-b"}, "layers 'a-b' are not of the form"),
        ({"layers": ["1-2", (2, 1)]}, r"layers has \(1, 2\) twice"),
        ({"layers": "12", "n": 7}, "give criteria and n, or the layers"),
        ({"layers": "12", "criteria": "cosine"}, "give criteria and n, or the layers"),
        ({"starts": 7, "n": 7}, "give criteria and n, or the layers"),
        ({"operators": "gost sequential"}, "did you mean 'ghost'"),
        ({"operators": "auto sequential"}, "unknown operator 'auto sequential'"),
        ({"operators": "pruned sequential"}, "unknown operator 'pruned sequential'"),
        ({"operators": "dense"}, "unknown operator 'dense'"),
        ({"operators": "none"}, "unknown operator 'none'"),
        ({"operators": "x, n(y)"}, "unknown feature 'n\\(y\\)'"),
        ({"operators": "x; 1/|z|"}, "unknown weight '1/\\|z\\|'"),
        ({"operators": "replaceme sequential"}, "replaceme reads more than the stream"),
        ({"operators": "auto", "calibration": "wiki", "windows": 1}, "needs at least 2 in total"),
        ({"operators": "auto free"}, "unknown budget 'free'. Known: none, matrix"),
        ({"calibration": []}, "at least one calibration corpus"),
        ({"perplexity": [], "layers": "2"}, "nothing to do"),
        ({"split": "tests"}, "unknown split 'tests' of corpus wiki"),
        ({"test_split": "tests"}, "unknown split 'tests' of corpus wiki"),
        pytest.param(
            {"tasks": "wiki-topics"},
            "unknown task 'wiki-topics'; near are wiki-topic",
            marks=pytest.mark.thorough,  # it asks the harness for all of its tasks
        ),
        ({"length": 512, "selection_length": 1024}, "length = 1024: at most length = 512"),
    ],
)
def test_invalid_values_are_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        gl.Specification(**changes)
    assert "\n" not in str(raised.value)


def test_an_invalid_task_file_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": 1}')
    with pytest.raises(ValueError, match="line 1: no key 'choices'"):
        gl.Specification(tasks=[bad])


@pytest.mark.parametrize("field", ["calibration", "perplexity", "tasks"])
def test_two_files_of_one_name_are_refused(tmp_path: Path, field: str) -> None:
    # Results name a file by its last name: only one of the two would be reported.
    paths = [tmp_path / folder / "x.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"text": "a b", "query": "a", "choices": ["b", "c"], "gold": 0}')
    gl.Specification(**{field: paths[:1]})
    with pytest.raises(ValueError, match=rf"{field} has 'x\.jsonl' twice: .*different last names"):
        gl.Specification(**{field: paths})


def test_local_files_are_identified_by_their_content(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("one.txt", "two.txt", "notes.md"):
        (folder / name).write_text(name)
    spec = gl.Specification(calibration=[text, "wiki"], perplexity=["wiki", folder], layers="2")
    first, second = spec.files()
    assert [first["field"], first["name"]] == ["calibration", "text.txt"]
    assert [second["field"], second["name"]] == ["perplexity", "folder"]
    (folder / "notes.md").write_text("which is not read")
    assert spec.files() == [first, second]
    (folder / "two.txt").write_text("more")
    Path(text).write_text("other")
    assert {f["digest"] for f in spec.files()}.isdisjoint((first["digest"], second["digest"]))


def test_windows_are_disjoint_and_ordered(text: str) -> None:
    spec = gl.Specification(
        calibration=text, windows=3, length=24, selection_windows=2, selection_length=16,
        perplexity=text, test_windows=2, test_length=16,
    )  # fmt: skip
    calib, selection = spec.draw_calibration(TOKENIZER), spec.draw_selection(TOKENIZER)
    assert calib.shape == (3, 24) and selection.shape == (2, 16)
    longer = gl.token_windows(text, TOKENIZER, length=24, count=5)
    assert torch.equal(longer[:3], calib)
    assert torch.equal(longer[3:, :16], selection), "the windows after those of calibration"
    test = spec.draw_test(TOKENIZER, text)
    assert test.windows.shape == (2, 16) and (test.corpus, test.split) == ("text.txt", "test")
    other = gl.Specification(**{**vars(spec), "seed": 1, "test_split": "all"})
    assert other.draw_test(TOKENIZER, text).split == "all"


def test_the_identity_determines_the_scores(text: str) -> None:
    spec = gl.Specification(calibration=text, layers="2", dtype="float32", batch_size=4)
    identity = spec.identity()
    assert identity["calibration"] == ["text.txt"]
    assert not {"layers", "batch_size"} & identity.keys()
    other = gl.Specification(calibration=text, n=5, operators="scalar", perplexity=[])
    assert other.identity() == identity
    for name, value in {"seed": 1, "limit": 3, "test_length": 16, "split": "all"}.items():
        assert gl.Specification(**{"calibration": text, name: value}).identity() != identity


def test_every_field_is_described() -> None:
    assert list(_descriptions()) == [field.name for field in fields(gl.Specification)]


NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def documented(name: str) -> list[str]:
    """The shell commands of a notebook, continued lines joined."""
    text = "\n".join(cell.source for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [block.replace("\\\n", " ") for block in blocks]


def parsed(line: str) -> gl.Specification:
    options = vars(parser().parse_args(shlex.split(line, comments=True)[1:]))
    return gl.Specification(**{f.name: options[f.name] for f in fields(gl.Specification)})


def test_notebook_10_has_every_field_as_a_parameter_of_papermill():
    names = {field.name for field in fields(gl.Specification)}
    parameters = inspect_notebook(str(NOTEBOOKS / "10_full_model_evaluation.ipynb"))
    others = {"layers", "starts", "probes", "probe_items"}
    assert set(parameters) == names - others | {"output"}


@pytest.mark.thorough
def test_the_commands_of_notebook_10_are_of_the_papers_settings():
    commands = documented("10_full_model_evaluation")
    by_cli, by_papermill, _ = [line for line in commands if "seeds-0.jsonl" not in line]
    (models,) = re.findall(r"for model in (.*?);", by_cli)
    assert len(models.split()) == 3 and "for windows in 32 128;" in by_cli
    (line,) = re.findall(r"ghostlib experiment .*", by_cli)
    line = line.replace("$(basename $model)", "some")
    first = parsed(line.replace("$model", models.split()[1]).replace("$windows", "32"))
    (text,) = re.findall(r"-y '(\{.*\})'", by_papermill, re.DOTALL)
    values = yaml.safe_load(text)
    parameters = inspect_notebook(str(NOTEBOOKS / "10_full_model_evaluation.ipynb"))
    assert values.keys() <= parameters.keys()
    values.pop("output", None)
    assert first == gl.Specification(**values)
    assert first.tasks == PAPER_TASKS and first.n == (7, 11)
    assert (first.windows, first.length, first.calibration) == (32, 2048, ("c4",))
    assert (first.test_windows, first.perplexity) == (None, ("wikitext2", "ptb", "c4"))


def test_the_commands_of_notebooks_are_of_the_stored_results():
    commands = [*documented("17_the_whole_grid"), *documented("15_weights_and_the_recipe")]
    of_seeds = [*documented("08_several_boundaries"), *documented("10_full_model_evaluation")]
    commands += [line for line in of_seeds if "seeds-0.jsonl" in line]
    names = ("grid", "seeds", "ablation", "recipe", "seeds", "seeds")
    for line, name in zip(commands, names, strict=True):
        for file, corpus in (("c4.sample.jsonl", "c4"), ("wikitext2.valid.raw", "wikitext2")):
            line = line.replace(file, corpus)  # files that are not in this repository
        identity = parsed(line).identity()
        record = stored(name).of("specification")[0]
        if name == "ablation":  # C4 and WikiText-2 were read from files
            del identity["calibration"]
        for field, value in identity.items():
            stored_value = tuple(record[field]) if isinstance(value, tuple) else record[field]
            assert stored_value == value, (name, field)
