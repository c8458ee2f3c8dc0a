"""The project's own files agree with each other."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import fill
import ghostlib as gl
import rules
from ghostlib import cli
from ghostlib.evaluation.perplexity import PUBLISHED
from ghostlib.evaluation.tasks import PAPER_TASKS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
EXTRAS = [Requirement(r) for group in PROJECT["optional-dependencies"].values() for r in group]
CONSTRAINTS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
SUITE = sorted((ROOT / "notebooks").glob("*.ipynb"))
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def tracked() -> list[Path]:
    """Files of the repository, or of the folder where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listing.stdout.split("\0") if listing.returncode == 0 else []
    if not names:
        skip = {".git", ".venv", "build", "dist"}
        paths = (p for p in ROOT.rglob("*") if not skip & set(p.relative_to(ROOT).parts))
        names = [str(p.relative_to(ROOT)) for p in paths if "__pycache__" not in p.parts]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def conda(path: str) -> tuple[dict[str, Requirement], list[str]]:
    """(conda packages, pip lines) of an environment file."""
    entries = yaml.safe_load((ROOT / path).read_text())["dependencies"]
    names = [re.sub(r"(?<![<>=!])=(?!=)", "==", d) for d in entries if isinstance(d, str)]
    pip = [line for d in entries if isinstance(d, dict) for line in d["pip"]]
    return {r.name: r for r in map(Requirement, names)}, pip


def targets() -> set[str]:
    """Targets that `make` alone lists, without the environment of an outer make."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--no-print-directory"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(re.findall(r"^  make ([a-z-]+) ", result.stdout, re.MULTILINE))


# ---------------------------------------------------------------- versions


def test_dependencies_are_ranges_with_a_lower_end():
    for requirement in [*RANGES.values(), *EXTRAS]:
        operators = {s.operator for s in requirement.specifier}
        assert requirement.name == "ghostlib" or ">=" in operators, requirement
        assert not operators & {"==", "==="}, requirement


def test_exact_versions_lie_within_the_ranges_and_name_no_build():
    exact = {}
    for requirement in CONSTRAINTS:
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "+" not in pin.version, requirement
        exact[re.sub(r"[-_.]+", "-", requirement.name).lower()] = pin.version
    for requirement in [*RANGES.values(), *EXTRAS]:
        if requirement.name not in ("ghostlib", "pip"):
            assert exact[requirement.name] in requirement.specifier, requirement


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0"])
def test_torch_range(version):
    assert version in RANGES["torch"].specifier


def test_pip_can_fetch_the_embedded_wheels():
    assert "25.1" in RANGES["pip"].specifier
    assert "24.0" not in RANGES["pip"].specifier


def test_every_import_of_the_package_is_a_dependency():
    own = {"ghostlib", "pydoc_data"}
    names = {"IPython": "ipython", "huggingface_hub": "huggingface-hub", "lm_eval": "lm-eval"}
    dependencies = set(RANGES) | {requirement.name for requirement in EXTRAS}
    for path in (ROOT / "ghostlib").rglob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE):
            if module not in sys.stdlib_module_names and module not in own:
                assert names.get(module, module) in dependencies, f"{path.name} imports {module}"


def test_conda_environment_installs_the_one_list():
    packages, pip = conda("environment.yml")
    assert pip == ["-e .[dev]"]
    assert set(packages) == {"python", "pip"}
    assert str(packages["python"].specifier) == PROJECT["requires-python"]
    assert packages["pip"].specifier == RANGES["pip"].specifier


def test_binder_installs_the_one_list():
    packages, pip = conda("binder/environment.yml")
    assert not pip, "a relative path here would depend on who resolves it; postBuild installs"
    assert packages["pytorch-cpu"].specifier == RANGES["torch"].specifier
    assert packages["pip"].specifier == RANGES["pip"].specifier
    (python,) = packages["python"].specifier
    assert python.version in Requirement(f"x{PROJECT['requires-python']}").specifier
    script = ROOT / "binder" / "postBuild"
    assert os.access(script, os.X_OK)
    # a second description would take precedence over, or contradict, this one
    assert {p.name for p in script.parent.iterdir()} == {"environment.yml", "postBuild"}


def test_the_version_is_set_once():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", PROJECT["version"]]
    for path in (ROOT / "ghostlib").rglob("*.py"):
        assert PROJECT["version"] not in re.findall(r"[\d.]+", path.read_text()), path.name


def test_the_licence_is_the_same_everywhere():
    assert PROJECT["license"] == "Apache-2.0"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    assert [a["family-names"] for a in paper["authors"]] == ["Yun", "Jo", "Karimireddy", "Lee"]
    assert "2605.15491" in paper["url"]


# ---------------------------------------------------------------- generated parts


@pytest.mark.thorough
def test_house_rules_and_generated_parts():
    assert rules.check(ROOT, SUITE) == []


@pytest.mark.thorough
def test_the_address_can_be_set_and_removed(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in (*fill.FILLED, "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    project = tmp_path / "pyproject.toml"
    without = project.read_text()
    line = 'Repository = "https://github.com/someone/something"\n'
    project.write_text(without.replace("[project.urls]\n", f"[project.urls]\n{line}"))
    fill.fill(tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "git clone https://github.com/someone/something" in readme
    assert "pip install git+https://github.com/someone/something" in readme
    assert "someone/something/actions/workflows/test.yml/badge.svg" in readme
    citation = yaml.safe_load((tmp_path / "CITATION.cff").read_text())
    assert citation["repository-code"] == "https://github.com/someone/something"
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        text = path.read_text()
        assert "git+https://github.com/someone/something" in text, path.name
        assert (
            f"colab.research.google.com/github/someone/something/blob/main/notebooks/{path.name}"
            in text
        )
    project.write_text(without)
    fill.fill(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes(), path.name


@pytest.mark.parametrize("path", tracked(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_absolute_paths_and_no_registry_hosts(path):
    """Nothing in the repository depends on one machine or one package index."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # a picture
    if path.suffix == ".ipynb":
        text = re.sub(r'"image/png": "[^"]*"', "", text)
    absolute = re.compile(r"(?<![\w.~:/\\-])/(?:home|tmp|work|root|Users)/\w")
    hosts = re.compile(
        r"\b(?:pypi|pythonhosted|anaconda|download\.pytorch|npmjs|crates)\.(?:org|com|io|net)\b"
    )
    assert not absolute.search(text)
    assert not hosts.search(text)


# ---------------------------------------------------------------- commands


NEEDS_ADDRESS = re.compile(r"git\+https?:|git clone|mybinder\.org|colab\.research\.google\.com")


def test_nothing_that_needs_a_public_address_is_printed_without_one():
    if fill.address(ROOT) is None:
        pages = [*SUITE, *(ROOT / name for name in fill.FILLED), *(ROOT / "docs").rglob("*.md")]
        for path in pages:
            assert not NEEDS_ADDRESS.search(path.read_text(encoding="utf-8")), path.name


def test_the_readme_is_short_and_its_links_are_alive():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 7_000
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 20
    for target in targets:
        if not target.startswith("https://"):
            assert (ROOT / target.partition("#")[0]).exists(), target


@needs_make
def test_documented_commands_are_targets():
    commands = [(ROOT / "README.md").read_text(), (ROOT / "CONTRIBUTING.md").read_text()]
    mentioned = set(re.findall(r"`make ([a-z-]+)", "\n".join(commands)))
    assert {"run", "site", "fill"} <= mentioned <= targets()


@pytest.mark.thorough
@needs_make
def test_the_classroom_has_no_solutions_and_no_outputs(tmp_path):
    for path in (ROOT / "Makefile", *SUITE[:1]):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    shutil.copytree(tmp_path / "notebooks", tmp_path / "notebooks" / "solutions")
    command = ["make", "classroom", "DEV=", f"PY={sys.executable}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (written,) = (tmp_path / "build" / "classroom").iterdir()
    cells = fill.read(written).cells
    assert not any(cell.get("outputs") for cell in cells)
    assert [cell.source for cell in cells] == [cell.source for cell in fill.read(SUITE[0]).cells]


COMMANDS = re.compile(r"^(?:ghostlib) (?:recover|experiment|inspect|fetch|names).*$", re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_commands_of_the_pages_are_valid():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    commands = COMMANDS.findall(text) + re.findall(r"`(ghostlib experiment [^`]+)`", text)
    assert len(commands) > 8
    for line in commands:
        words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "1"), comments=True)
        options = cli.parser().parse_args(words[1:])
        for kind, registry in (("criteria", gl.CRITERIA), ("operators", gl.OPERATORS)):
            for name in getattr(options, kind, ()):
                assert name in registry or name in ("pruned", "auto"), line


def test_the_commands_for_the_published_tables_score_all_that_the_paper_scores():
    text = (ROOT / "docs" / "maintainers.md").read_text(encoding="utf-8")
    lines = re.findall(r"`(ghostlib experiment [^`]+)`", text)
    options = [cli.parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert len(options) == 3
    for table in options:
        assert tuple(table.tasks) in ((), PAPER_TASKS)
        assert not table.perplexity or (
            set(table.perplexity) == set(PUBLISHED) and table.bos is False
        )
        assert table.tasks or table.perplexity


def test_links_between_pages_are_alive():
    for path in PAGES:
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


@needs_make
def test_the_workflow_runs_commands_of_the_project():
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    assert job["steps"][-1] == {"run": "${{ matrix.command }}"}
    matrix = job["strategy"]["matrix"]
    for command in [*matrix["command"], *(case["command"] for case in matrix["include"])]:
        program, *rest = command.split()
        assert rest[0] in targets() if program == "make" else os.access(ROOT / program, os.X_OK)
    for python in [*matrix["python"], *(case["python"] for case in matrix["include"])]:
        assert python in Requirement(f"x{PROJECT['requires-python']}").specifier


@needs_make
def test_make_says_what_it_needs_when_there_is_no_python(tmp_path):
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "touch"):
        (programs / name).symlink_to(shutil.which(name))
    old = programs / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = subprocess.run(
        [shutil.which("make"), "run"],
        cwd=tmp_path,
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "Python >= 3.11" in result.stderr


# ---------------------------------------------------------------- where there is no clone


SETUP = """
import sys
from importlib.util import find_spec
from IPython.core.interactiveshell import InteractiveShell

torch = find_spec("torch").origin
assert find_spec("ghostlib") is None
InteractiveShell.instance().run_cell(sys.argv[1]).raise_error()

import ghostlib as gl
from ghostlib.tutorial.stored import stored

assert find_spec("torch").origin == torch
print(gl.__file__, len(stored("grid").records), sep="\\n")
"""


@pytest.mark.thorough
def test_the_setup_cell_installs_the_wheel_as_on_colab(tmp_path):
    """PyTorch stays as it is, the folder has only the notebook's wheel, no index is used."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", f"--wheel-dir={tmp_path}"]
    subprocess.run([*wheel, ROOT], check=True, cwd=tmp_path)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/*/site-packages")
    # this environment without the editable project, which is a .pth of its own
    (packages / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    (cell,) = (c.source for c in fill.read(SUITE[0]).cells if "setup" in c.metadata.get("tags", []))
    command = [environment / "bin" / "python", "-c", SETUP, cell]
    result = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *_, file, records = result.stdout.split()
    assert Path(file).parent == packages / "ghostlib" and int(records) > 100
    own = {path.name for path in packages.iterdir()}
    version = PROJECT["version"]
    assert own == {"dependencies.pth", "ghostlib", f"ghostlib-{version}.dist-info"}


# ---------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site() -> dict[str, object]:
    """The site's configuration, after it has written the pages for Sphinx."""
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


@pytest.mark.thorough
def test_every_public_name_is_on_one_page_of_the_reference(site):
    api = "\n".join(site["api"]().values())
    for name in gl.__all__:
        assert len(re.findall(rf"^\.\. (?:auto|py:)\w+:: ghostlib\.{name}$", api, re.M)) == 1, name


@pytest.mark.thorough
def test_the_site_has_the_course_and_every_page_of_the_documentation(site):
    staged = {str(p.relative_to(site["SOURCE"])) for p in site["SOURCE"].rglob("*")}
    for path in [*SUITE, *(ROOT / "docs").rglob("*.md")]:
        assert str(path.relative_to(ROOT)) in staged
    course = (site["SOURCE"] / "notebooks" / "index.md").read_text()
    assert re.findall(r"<(\w+)>", course) == [path.stem for path in SUITE]
    goals = (site["SOURCE"] / "docs" / "teachers.md").read_text()
    assert all(f"../notebooks/{path.name}" in goals for path in SUITE)


@pytest.mark.thorough
def test_figures_of_the_site_have_the_stored_alternative_texts(site):
    for path in SUITE:
        cells = fill.read(site["SOURCE"] / "notebooks" / path.name).cells
        for cell in cells:
            texts = [
                o.metadata["image/png"]["alt"]
                for o in cell.get("outputs", [])
                if "image/png" in o.get("data", {})
            ]
            if texts:
                assert cell.metadata["mystnb"]["image"]["alt"] == " ".join(texts), path.name


@pytest.mark.thorough
def test_results_of_the_site_are_the_stored_ones(site):
    page = site["results"]()
    assert page.count('class="dataframe sortable"') == 5
    assert len(re.findall("<tr>", page)) > 1000 and "cdn" not in page
