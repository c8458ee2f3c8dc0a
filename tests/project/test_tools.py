"""The tools, on tiny synthetic notebooks."""

import base64
import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import install
import notebooks as tool
from ghostlib.tutorial.claims import CLAIMS

FIRST = """# Prune a toy

**What you'll do** Take one layer out. Then more.

**What you’ll learn** Nothing.

**What you'll need** One minute on two cores, 1 GB.
"""
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(8)).decode()


def tags(*names: str) -> dict[str, list[str]]:
    return {"tags": list(names)}


def good(*cells):
    """A notebook that keeps the house rules once it is filled and executed."""
    ending = "## Exercises\n1. Why?\n<details><summary>Solution</summary>Because.</details>"
    return new_notebook(
        cells=[
            new_markdown_cell(FIRST),
            new_code_cell("", metadata=tags("setup")),
            new_markdown_cell("## Measure"),
            *cells,
            new_code_cell("assert 1 + 1 == 2"),
            new_markdown_cell("## What we saw\nTwo."),
            new_markdown_cell(ending),
            new_markdown_cell("## Further reading\nNothing."),
        ]
    )


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small repository with an address of its own, whose kernels find the package."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    (tmp_path / "pyproject.toml").write_text(
        '[project.urls]\nRepository = "https://github.com/someone/something"\n'
    )
    readme = "# X\n<!-- begin:notebooks -->\n<!-- end:notebooks -->\n"
    (tmp_path / "README.md").write_text(readme + "<!-- begin:figure -->\n<!-- end:figure -->\n")
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def put(root: Path, nb, name: str = "00_toy.ipynb") -> Path:
    path = root / "notebooks" / name
    path.write_text(nbformat.writes(nb))
    return path


# ---------------------------------------------------------------- fill and execute


def test_fill_and_execute_make_a_notebook_that_keeps_the_rules(root, capsys):
    noisy = """\
import os, sys
print("kept"); print("a bar", end="\\r"); print("the end")
print(os.path.join(os.getcwd(), "x"))
print("noise", file=sys.stderr)
os.environ["GHOSTLIB_PROGRESS"]"""
    path = put(root, good(new_code_cell(noisy)))
    assert tool.main(["fill"], root) == 0
    assert tool.main(["execute"], root) == 0, capsys.readouterr().err
    nb = tool.read(path)
    assert [c.execution_count for c in nb.cells if c.cell_type == "code"] == [1, 2, 3]
    stream, result = nb.cells[3].outputs
    assert stream.text == "kept\nthe end\nnotebooks/x\n"
    assert result.data["text/plain"] == "'0'"
    assert all(set(cell.metadata) <= {"tags"} for cell in nb.cells)
    assert nb.metadata.kernelspec.name == "python3"
    assert "version" not in nb.metadata.language_info
    assert "install" in nb.cells[1].source and not nb.cells[1].outputs
    shown = capsys.readouterr().out
    assert "[1/3] Setup … " in shown and "[2/3] Measure … " in shown
    assert "left out: cell 4, stderr: noise" in shown
    before = path.read_bytes()
    assert tool.main(["execute", str(path)], root) == 0
    assert path.read_bytes() == before, "the same inputs must give the same file"


def test_fill_writes_setup_badges_and_table_from_the_one_address(root):
    path = put(root, good())
    assert tool.main(["fill"], root) == 0
    nb = tool.read(path)
    assert "git+https://github.com/someone/something" in nb.cells[1].source
    title, blank, *rest = nb.cells[0].source.splitlines()
    assert (title, blank) == ("# Prune a toy", "")
    assert "begin:badges" in rest[0]
    for site in ("colab.research.google.com/github", "mybinder.org/v2/gh", "nbviewer.org/github"):
        assert f"{site}/someone/something" in rest[1]
    readme = (root / "README.md").read_text()
    assert "[00 · Prune a toy](notebooks/00_toy.ipynb) | Take one layer out. |" in readme
    assert tool.stale(root) == {}
    (root / "pyproject.toml").write_text(
        '[project.urls]\nRepository = "https://github.com/other/place"\n'
    )
    assert {p.name for p in tool.stale(root)} == {"00_toy.ipynb", "README.md"}
    assert any("00_toy.ipynb: not as generated" in found for found in tool.check(root, []))
    tool.main(["fill"], root)
    assert "someone" not in path.read_text() + (root / "README.md").read_text()


def test_the_setup_cell_is_silent_where_the_package_is_installed(capsys):
    source = tool.setup_source("someone/something")
    ordinary = source.replace("%pip install --quiet", "raise SystemError #")
    exec(compile(ordinary, "setup", "exec"), {})
    assert capsys.readouterr() == ("", "")


def test_a_notebook_with_zero_shot_tasks_installs_the_harness(root, monkeypatch):
    nb = good()
    nb.cells[1].metadata["tags"] = ["setup", "eval"]
    path = put(root, nb)
    assert tool.main(["fill"], root) == 0
    source = tool.read(path).cells[1].source
    assert '"ghostlib[eval] @ git+https://github.com/someone/something"' in source
    ordinary = source.replace("%pip install --quiet", "raise SystemError #")
    exec(compile(ordinary, "setup", "exec"), {})  # silent: both are here
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "eval" in name else name)
    with pytest.raises(SystemError):
        exec(compile(ordinary, "setup", "exec"), {})


def test_the_figure_of_the_readme_comes_from_the_stored_output(root):
    nb = good(new_code_cell("plot()", metadata=tags("effect-figure")))
    nb.cells[3].outputs = [new_output("display_data", {"image/png": PIXEL})]
    put(root, nb)
    tool.main(["fill"], root)
    assert (root / "docs" / "effect.png").read_bytes().startswith(b"\x89PNG")
    assert "(docs/effect.png)" in (root / "README.md").read_text()
    (root / "docs" / "effect.png").write_bytes(b"old")
    assert [p.name for p in tool.stale(root)] == ["effect.png"]


def test_the_ledger_of_the_readme_comes_from_the_stored_outputs(root):
    (root / "README.md").write_text("<!-- begin:claims -->\n<!-- end:claims -->\n")
    entry = 'from ghostlib.claims import record\nrecord(1, "off by | 1e-7", holds=1 < 2)'
    put(root, good(new_code_cell(entry)))
    tool.main(["fill"], root)
    assert "| 1 | The boundary" in (root / "README.md").read_text()
    assert (root / "README.md").read_text().count("not measured here yet") == len(CLAIMS)
    assert tool.main(["execute"], root) == 0
    rows = (root / "README.md").read_text()
    assert rows.count("not measured here yet") == len(CLAIMS) - 1
    assert r"off by \| 1e-7 | holds | [00](notebooks/00_toy.ipynb), cell 2 |" in rows
    (root / "README.md").write_text(rows.replace("1e-7", "1e-9"))
    assert [p.name for p in tool.stale(root)] == ["README.md"]


@pytest.mark.parametrize("url", ["", "https://example.com/a/b", "https://github.com/a"])
def test_an_address_that_is_none_is_refused(root, url, capsys):
    (root / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{url}"\n')
    assert tool.main(["fill"], root) == 1
    assert "Repository" in capsys.readouterr().err


def test_a_failing_cell_is_named_and_nothing_is_stored(root, capsys):
    bad = put(root, good(new_code_cell("raise ValueError('no such layer')")))
    fine = put(root, good(), "01_fine.ipynb")
    tool.fill(root)
    before = bad.read_bytes()
    assert tool.main(["execute"], root) == 1
    error = capsys.readouterr().err
    assert "00_toy.ipynb, cell 4 (Measure)" in error
    assert "ValueError: no such layer" in error
    assert "\x1b" not in error
    assert bad.read_bytes() == before
    assert tool.read(fine).cells[-4].execution_count == 2, "the others are executed all the same"


def test_a_slow_cell_and_a_dead_kernel_are_named(root, capsys):
    path = put(root, good(new_code_cell("import time; time.sleep(60)")))
    assert tool.main(["execute", "--timeout", "2", str(path)], root) == 1
    assert "took longer than 2 s" in capsys.readouterr().err
    path = put(root, good(new_code_cell("import os; os._exit(1)")))
    assert tool.main(["execute", str(path)], root) == 1
    assert "kernel died" in capsys.readouterr().err


# ---------------------------------------------------------------- run


def test_run_writes_pages_and_prints_the_table(root, capsys):
    table = new_code_cell("print('dense 33.8')", metadata=tags("results-table"))
    path = put(root, good(table))
    tool.fill(root)
    before = path.read_bytes()
    assert tool.main(["run", str(path)], root) == 0
    assert "\ndense 33.8\n" in capsys.readouterr().out
    page = (root / "build" / "00_toy.html").read_text()
    assert "<title>Prune a toy</title>" in page
    assert tool.read(root / "build" / "00_toy.ipynb").cells[3].outputs[0].text == "dense 33.8\n"
    assert path.read_bytes() == before


def test_run_without_a_table_fails(root, capsys):
    path = put(root, good())
    tool.fill(root)
    assert tool.main(["run", str(path)], root) == 1
    assert "results-table" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", '{"cells": 3}'])
def test_what_is_no_notebook_is_refused_by_name(root, content, capsys):
    path = root / "notebooks" / "02_none.ipynb"
    if content is not None:
        path.write_text(content)
    assert tool.main(["check", str(path)], root) == 1
    assert "02_none.ipynb" in capsys.readouterr().err


# ---------------------------------------------------------------- check


def executed(nb):
    """``nb`` with numbers, as if it had been executed, and clean metadata."""
    tool.clean(nb, Path("nowhere"))
    nb.cells[-4].outputs = [new_output("stream", text="2\n")]
    return nb


def broken(root, nb) -> str:
    return "\n".join(tool.problems(executed(nb), root))


def test_a_good_notebook_has_no_problems(root):
    nb = good()
    nb.cells[1].source = tool.setup_source("someone/something")
    assert broken(root, nb) == ""


def drop(index):
    return lambda nb: nb.cells.pop(index)


def source(index, text):
    return lambda nb: nb.cells[index].update(source=text)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop(0), "does not begin with a title"),
        (source(0, FIRST.replace("learn", "see")), "lacks “What you'll learn”"),
        (source(0, FIRST.replace("1 GB", "")), "how much memory"),
        (lambda nb: nb.cells[1].metadata.clear(), "must have the tag setup"),
        (source(4, "one = 1"), "no assert"),
        (source(4, "assert 1\n" * 26), "cell 5 has 26 lines"),
        (source(3, ""), "cell 4 is empty"),
        (source(3, "open('" + "/ho" + "me/me/x')"), "absolute path /ho" + "me/me/x"),
        (source(3, "open('" + "/tm" + "p/')"), "absolute path /tm" + "p"),
        (source(3, "open(r'C" + ":\\data')"), "absolute path C:"),
        (source(2, "## See [this](none.ipynb)"), "dead link none.ipynb"),
        (drop(5), "the last sections are not What we saw"),
        (source(6, "## Exercises\n1. Why?"), "no folded solution"),
        (source(7, "## Further reading\n## And more"), "the last sections are not"),
    ],
)
def test_every_broken_rule_is_named(root, change, problem):
    nb = good(new_code_cell("two = 2"))
    nb.cells[1].source = tool.setup_source("someone/something")
    change(nb)
    assert problem in broken(root, nb)


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (new_output("stream", name="stderr", text="Warning: x"), "stores stderr: Warning: x"),
        (new_output("stream", text="saved 2026-01-02 03:04:05"), "changes with every run"),
        (new_output("stream", text="<X at 0x7f00aabbcc>"), "changes with every run"),
        (new_output("stream", text="in /" + "Users/me"), "absolute path"),
        (new_output("error", ename="E", evalue="x", traceback=[]), "stores an error"),
        (new_output("display_data", {tool.WIDGET: {}}), "not clean"),
    ],
)
def test_outputs_that_must_not_be_stored(root, output, problem):
    nb = executed(good(new_code_cell("two = 2")))
    nb.cells[3].outputs = [output]
    assert problem in "\n".join(tool.problems(nb, root))


def test_a_notebook_that_was_not_executed_in_order(root):
    nb = executed(good(new_code_cell("two = 2")))
    nb.cells[3].execution_count = 7
    assert "execution counts are not 1 … 3" in "\n".join(tool.problems(nb, root))
    nb = good()
    nb.cells[1].source = tool.setup_source("someone/something")
    tool.clean(nb, root)
    assert "no stored outputs" in "\n".join(tool.problems(nb, root))


def test_check_exits_with_the_verdict(root, capsys):
    path = put(root, good())
    assert tool.main(["check", str(path)], root) == 1
    assert "00_toy.ipynb: " in capsys.readouterr().err


def test_code_fences_hold_no_headings():
    nb = new_notebook(cells=[new_markdown_cell("# A\n```python\n# no\n```\n## B ##")])
    assert list(tool.headings(nb)) == [(0, 1, "A"), (0, 2, "B")]


def test_written_notebooks_are_ordinary_files(root):
    path = put(root, good())
    tool.fill(root)
    text = path.read_text()
    assert text.endswith("}\n") and json.loads(text)["nbformat"] == 4
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# ---------------------------------------------------------------- install


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Collecting torch<3,>=2.6 (from ghostlib==0.1.0)", "finding torch"),
        ("  Downloading numpy-2.4.6-cp311-x.whl (16.9 MB)", "downloading numpy 2.4.6 (16.9 MB)"),
        ("  Downloading https://x/y/six-1.17.0-py3.whl (11 kB)", "downloading six 1.17.0 (11 kB)"),
        ("Installing collected packages: a, b", "unpacking 2 packages"),
        ("Requirement already satisfied: six", None),
    ],
)
def test_install_says_what_pip_does(line, said):
    assert install.describe(line) == said


def test_install_fails_with_the_last_words_of_pip(capsys):
    script = "print('no route to the index'); raise SystemExit(3)"
    with pytest.raises(install.InstallError, match="no route to the index"):
        install.run([sys.executable, "-c", script], "finding packages")


def test_a_half_made_environment_is_recognised(tmp_path):
    assert install.works(Path(sys.executable))
    assert not install.works(tmp_path / "bin" / "python")
