"""The tools, on tiny synthetic notebooks."""

import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import fill
import notebooks as tool
import rules

FIRST = """# Prune a toy

<!-- begin:badges -->
<!-- end:badges -->

**What you'll do** Take one layer out. Then more.

**What you’ll learn** Nothing.

**What you'll need** One minute on two cores, 1 GB.

**What do you expect?** One, or two?
"""
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(8)).decode()


def tags(*names: str) -> dict[str, list[str]]:
    return {"tags": list(names)}


def exercise(number: int, answer: str):
    check = f"assert a{number} in (None, {number})\nprint(a{number})"
    return (
        new_code_cell(f"a{number} = {answer}", metadata=tags("exercise")),
        new_code_cell(check, metadata=tags("check")),
    )


def solved():
    """The solutions to `good`, filled and as if executed."""
    cells = [new_code_cell(fill.setup_source("someone/something"), metadata=tags("setup"))]
    nb = new_notebook(cells=[*cells, *exercise(1, "1"), *exercise(2, "2")])
    tool.clean(nb)
    nb.cells[1].outputs = [new_output("stream", text="1\n")]
    return nb


def good(*cells):
    """A notebook that keeps the house rules once it is filled and executed."""
    return new_notebook(
        cells=[
            new_markdown_cell(FIRST),
            new_code_cell("", metadata=tags("setup")),
            new_markdown_cell("## Measure"),
            *cells,
            new_code_cell("assert 1 + 1 == 2"),
            new_markdown_cell("## What we saw\nTwo."),
            new_markdown_cell("## Exercises"),
            *exercise(1, "None"),
            *exercise(2, "None"),
            new_markdown_cell("## Further reading\nNothing."),
        ]
    )


def address(root: Path, url: str | None) -> None:
    """Make ``url`` the public address of the repository at ``root``; None for no address."""
    urls = "" if url is None else f'[project.urls]\nRepository = "{url}"\n'
    (root / "pyproject.toml").write_text(f'[project]\nname = "toy"\n{urls}')


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small repository with an address of its own, whose kernels find the package."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    address(tmp_path, "https://github.com/someone/something")
    regions = [f"<!-- begin:{name} -->\n<!-- end:{name} -->\n" for name in ("notebooks", "start")]
    (tmp_path / "README.md").write_text("# X\n" + "".join(regions))
    (tmp_path / "notebooks" / "solutions").mkdir(parents=True)
    return tmp_path


def put(root: Path, nb, name: str = "00_toy.ipynb") -> Path:
    path = root / "notebooks" / name
    path.write_text(nbformat.writes(nb))
    return path


# ---------------------------------------------------------------- execute and run


@pytest.mark.thorough
def test_a_filled_and_executed_notebook_keeps_the_rules(root, capsys):
    noisy = """\
import os, sys
print("kept"); print("a bar", end="\\r"); print("the end")
print("noise", file=sys.stderr)
os.environ["GHOSTLIB_PROGRESS"]"""
    path = put(root, good(new_code_cell(noisy)))
    solution = put(root, solved(), "solutions/00_toy.ipynb")
    fill.fill(root)
    tool.main(["execute"], root)
    fill.fill(root)
    assert rules.check(root, [path]) == []
    nb = tool.read(path)
    assert [c.execution_count for c in nb.cells if c.cell_type == "code"] == [*range(1, 8)]
    assert tool.read(solution).cells[-1].execution_count == 5
    stream, result = nb.cells[3].outputs
    assert stream.text == "kept\nthe end\n"
    assert result.data["text/plain"] == "'0'"
    assert all(set(cell.metadata) <= {"tags"} for cell in nb.cells)
    assert nb.metadata.kernelspec.name == "python3"
    assert "version" not in nb.metadata.language_info
    assert not nb.cells[1].outputs, "the setup cell is silent"
    assert "left out: In [2]: stderr: noise" in capsys.readouterr().out
    before = path.read_bytes()
    tool.main(["execute", str(path)], root)
    assert path.read_bytes() == before, "the same inputs must give the same file"


@pytest.mark.thorough
def test_a_failing_cell_is_named_and_nothing_is_stored(root, capsys):
    bad = put(root, good(new_code_cell("raise ValueError('no such layer')")))
    dead = put(root, good(new_code_cell("import os; os._exit(1)")), "01_dead.ipynb")
    fine = put(root, good(), "02_fine.ipynb")
    before = bad.read_bytes()
    with pytest.raises(SystemExit, match=r"FAILED: 00_toy.ipynb, 01_dead.ipynb"):
        tool.main(["execute"], root)
    error = capsys.readouterr().err
    assert "00_toy.ipynb: " in error and "ValueError: no such layer" in error
    assert "01_dead.ipynb: Kernel died" in error
    assert "\x1b" not in error
    assert bad.read_bytes() == before and not tool.read(dead).cells[3].execution_count
    assert tool.read(fine).cells[3].execution_count == 2, "the others are executed all the same"


@pytest.mark.thorough
def test_run_writes_a_page_and_prints_the_table(root, capsys):
    table = new_code_cell("print('dense 33.8')", metadata=tags("results-table"))
    path = put(root, good(table))
    before = path.read_bytes()
    tool.main(["run", str(path)], root)
    assert "\ndense 33.8\n" in capsys.readouterr().out
    assert "dense 33.8" in (root / "build" / "00_toy.html").read_text()
    assert tool.read(root / "build" / "00_toy.ipynb").cells[3].outputs[0].text == "dense 33.8\n"
    assert path.read_bytes() == before


@pytest.mark.thorough
def test_run_without_a_table_fails(root, capsys):
    path = put(root, good())
    with pytest.raises(SystemExit):
        tool.main(["run", str(path)], root)
    assert "results-table" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", '{"cells": 3}'])
def test_an_invalid_notebook_is_refused_by_name(root, content):
    path = root / "notebooks" / "02_none.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"02_none\.ipynb: not a notebook"):
        tool.read(path)


def test_written_notebooks_are_ordinary_files(root):
    path = put(root, good())
    fill.fill(root)
    text = path.read_text()
    assert text.endswith("}\n") and json.loads(text)["nbformat"] == 4
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == [path.name]


# ---------------------------------------------------------------- fill


def test_setup_badges_and_table_follow_the_one_address(root):
    path = put(root, good())
    fill.fill(root)
    nb = tool.read(path)
    assert "git+https://github.com/someone/something" in nb.cells[1].source
    for site in ("colab.research.google.com/github", "mybinder.org/v2/gh"):
        assert f"{site}/someone/something" in nb.cells[0].source
    readme = (root / "README.md").read_text()
    assert "**Learn**\n\n- [00 · Prune a toy](notebooks/00_toy.ipynb)\n" in readme
    assert "git clone https://github.com/someone/something && cd something" in readme
    assert fill.stale(root) == {}
    address(root, "https://github.com/other/place")
    assert {p.name for p in fill.stale(root)} == {"00_toy.ipynb", "README.md"}
    assert "00_toy.ipynb: not as generated" in "\n".join(rules.check(root, []))
    fill.fill(root)
    assert "someone" not in path.read_text() + (root / "README.md").read_text()


def test_without_an_address_nothing_needs_one(root):
    path = put(root, good())
    address(root, None)
    fill.fill(root)
    text = path.read_text() + (root / "README.md").read_text()
    assert not re.search(r"https?://|git\+|git clone", text)
    assert "make run" in text and "make wheel" in tool.read(path).cells[0].source


def test_the_course_has_parts_in_order_and_the_explorer_last(root):
    for name in ("explore.ipynb", "13_b.ipynb", "07_a.ipynb", "00_toy.ipynb", "08_c.ipynb"):
        put(root, good(), name)
    course = fill.course({path: tool.read(path) for path in tool.suite(root)})
    assert {part: [p.name for p in titles] for part, titles in course.items()} == {
        "Learn": ["00_toy.ipynb", "07_a.ipynb"],
        "Use": ["08_c.ipynb"],
        "Beyond": ["13_b.ipynb"],
        "Explore": ["explore.ipynb"],
    }
    assert course["Explore"][root / "notebooks" / "explore.ipynb"] == "Prune a toy"


@pytest.mark.parametrize("url", ["", "https://example.com/a/b", "https://github.com/a"])
def test_an_invalid_address_is_refused(root, url):
    address(root, url)
    with pytest.raises(SystemExit, match="Repository"):
        fill.fill(root)


def run_setup(source: str) -> list[str]:
    """Run a setup cell as IPython does; returns its magic commands."""
    commands: list[str] = []
    shell = SimpleNamespace(run_line_magic=lambda magic, line: commands.append(f"{magic} {line}"))
    code = TransformerManager().transform_cell(source)
    exec(compile(code, "setup", "exec"), {"get_ipython": lambda: shell})
    return commands


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_setup_cell_installs_what_is_missing_and_nothing_else(
    evaluates, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    source = fill.setup_source(None, evaluates)
    assert run_setup(source) == [] and capsys.readouterr() == ("", "")
    missing = "lm_eval" if evaluates else "ghostlib"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)
    with pytest.raises(AssertionError, match=r"put ghostlib's wheel \(make wheel\) next to"):
        run_setup(source)
    (tmp_path / "ghostlib-1.0-py3-none-any.whl").touch()
    (command,) = run_setup(source)
    assert command.startswith("pip install --quiet ") and "wheels[0]" in command


def test_a_notebook_with_zero_shot_tasks_installs_the_harness(root):
    nb = good()
    nb.cells[1].metadata["tags"] = ["setup", "eval"]
    path = put(root, nb)
    fill.fill(root)
    source = tool.read(path).cells[1].source
    assert '"ghostlib[eval] @ git+https://github.com/someone/something"' in source


def test_the_figure_of_the_readme_comes_from_the_stored_output(root):
    nb = good(new_code_cell("plot()", metadata=tags("effect-figure")))
    nb.cells[3].outputs = [new_output("display_data", {"image/png": PIXEL})]
    put(root, nb)
    fill.fill(root)
    assert (root / "docs" / "effect.png").read_bytes().startswith(b"\x89PNG")
    (root / "docs" / "effect.png").write_bytes(b"old")
    assert [p.name for p in fill.stale(root)] == ["effect.png"]


@pytest.mark.thorough
def test_the_ledger_comes_from_the_stored_outputs(root):
    entry = 'from ghostlib.tutorial.claims import record\nrecord(1, "off by 1e-7", holds=1 < 2)'
    put(root, good(new_code_cell(entry)))
    ledger = root / "docs" / "claims.md"
    fill.fill(root)
    assert "holds: 1," not in ledger.read_text()
    tool.main(["execute"], root)
    assert [p.name for p in fill.stale(root)] == ["claims.md"]
    fill.fill(root)
    assert "holds: 1," in ledger.read_text()
    assert "off by 1e-7 | [00, cell 2](../notebooks/00_toy.ipynb)" in ledger.read_text()


# ---------------------------------------------------------------- rules


def executed(nb):
    """``nb`` with outputs, as if it had been executed, and clean metadata."""
    tool.clean(nb)
    nb.cells[-8].outputs = [new_output("stream", text="2\n")]
    return nb


def problems(nb, root: Path) -> str:
    path = put(root, nb)
    if not (root / "notebooks" / "solutions" / path.name).exists():
        put(root, solved(), "solutions/00_toy.ipynb")
    return "\n".join(problem for rule in rules.RULES for problem in rule(nb, path))


def test_a_good_notebook_has_no_problems(root):
    nb = executed(good())
    nb.cells[1].source = "import ghostlib"
    assert problems(nb, root) == ""


def drop(index):
    return lambda nb: nb.cells.pop(index)


def source(index, text):
    return lambda nb: nb.cells[index].update(source=text)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop(0), "does not begin with a title"),
        (source(0, FIRST.replace("learn", "see")), "lacks “What you'll learn”"),
        (source(0, FIRST.replace("begin:badges", "")), "lacks “<!-- begin:badges”"),
        (source(0, FIRST.replace("1 GB", "")), "how much memory"),
        (lambda nb: nb.cells[1].metadata.clear(), "must have the tag setup"),
        (lambda nb: [cell.update(source="one = 1") for cell in nb.cells[4:]], "no assert"),
        (source(4, "assert 1\n" * 26), "In [3] has 26 lines"),
        (source(3, ""), "In [2] has 0 lines"),
        (source(3, "open('" + "/ho" + "me/me/x')"), "absolute path /ho" + "me/me/x"),
        (source(3, "open('" + "/tm" + "p/')"), "absolute path /tm" + "p"),
        (source(2, "## See [this](none.ipynb)"), "dead link none.ipynb"),
        (drop(5), "the last sections are not What we saw"),
        (source(11, "## Further reading\n## And more"), "the last sections are not"),
        (source(0, FIRST.replace("expect", "see")), "no line “**What do you expect?**"),
        (drop(8), "not two to four pairs of cells tagged exercise and check"),
        (source(8, "assert a1 == 1"), "solutions: no cell, tagged check, is ['assert a1 == 1']"),
        (
            lambda nb: nb.cells.extend(new_markdown_cell("…") for _ in range(40)),
            "cells, more than 45",
        ),
        (source(2, "x" * 800_000), "kB, more than 700"),
    ],
)
def test_every_broken_rule_is_named(root, change, problem):
    nb = executed(good(new_code_cell("two = 2")))
    change(nb)
    assert problem in problems(nb, root)


def test_solutions_keep_the_rules_too(root):
    broken = solved()
    broken.cells[2].source = "open('" + "/ho" + "me/me/x')"
    put(root, broken, "solutions/00_toy.ipynb")
    assert "solutions: cell 3, source: absolute path" in problems(executed(good()), root)
    (root / "notebooks" / "solutions" / "00_toy.ipynb").unlink()
    path = put(root, executed(good()))
    assert "no solutions/00_toy.ipynb" in list(rules.exercises(tool.read(path), path))


def test_next_and_back_are_links_to_the_neighbours(root):
    nb = good()
    paths = [put(root, nb, f"{name}.ipynb") for name in ("00_toy", "01_game", "02_end")]
    neighbours = [["Next"], ["Back", "Next"], ["Back"]]
    for path, words in zip(paths, neighbours, strict=True):
        missing = list(rules.structure(nb, path))
        assert [problem.split("“")[1].split(":")[0] for problem in missing] == words
    nb.cells[-1].source += "\nBack: [toy](00_toy.ipynb) · Next: [the end](02_end.ipynb)"
    assert not list(rules.structure(nb, paths[1]))


PRINTED = "error 0.7213, gap 63.4%, 165.2 times, 18,060 tokens, step 3"


@pytest.mark.parametrize(
    ("sentence", "unsupported"),
    [
        ("The error is 0.72, or 0.7213.", []),
        ("The error is 0.73.", ["0.73"]),
        ("The error is 0.721 and 0.72130.", ["0.72130"]),
        ("It closes 63 %, or $63.4\\,\\%$.", []),
        ("It closes 165 %.", ["165 %"]),
        ("It is 165 times longer.", []),
        ("It is 166 times longer.", ["166 times"]),
        ("It is ten times longer.", ["ten times"]),
        ("It is hundreds of times longer (165).", []),
        ("The paper finds 46.9 % (figure 3).", []),
        ("The paper finds 46.9 %. See figure 3.", ["46.9 %"]),
        ("Notebook `07` finds 0.93.", []),
        ("As [there](07_calibration.ipynb), 0.93.", []),
        ("See [arXiv 2605.15491](https://arxiv.org/abs/2605.15491) and Llama-3.1-8B.", []),
        ("With `relative_ridge=0.1` on 32,768 tokens.", []),
        ("A setting of 0.5.", []),
    ],
)
def test_a_number_in_prose_needs_support(root, sentence, unsupported):
    exempt = {"numbers": {"0.5": "a setting"}}
    nb = executed(good(new_markdown_cell(sentence, metadata=exempt)))
    nb.cells[-8].outputs[0].text = PRINTED
    problems = rules.numbers(nb, root)
    assert [problem.split("'")[1] for problem in problems] == unsupported


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (new_output("stream", name="stderr", text="Warning: x"), "not clean"),
        (new_output("stream", text="saved 2026-01-02 03:04:05"), "changes with every run"),
        (new_output("stream", text="<X at 0x7f00aabbcc>"), "changes with every run"),
        (new_output("stream", text="in /" + "Users/me"), "absolute path"),
        (new_output("error", ename="E", evalue="x", traceback=[]), "an error among them"),
        (new_output("display_data", {tool.WIDGET: {}}), "not clean"),
    ],
)
def test_outputs_that_must_not_be_stored(root, output, problem):
    nb = executed(good(new_code_cell("two = 2")))
    nb.cells[3].outputs = [output]
    assert problem in problems(nb, root)


def test_a_notebook_that_was_not_executed_in_order(root):
    nb = executed(good(new_code_cell("two = 2")))
    nb.cells[3].execution_count = 7
    assert "execution counts" in problems(nb, root)
    nb = good()
    tool.clean(nb)
    assert "no stored outputs" in problems(nb, root)
