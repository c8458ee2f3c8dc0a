"""The project's own files agree with each other."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import notebooks as tool

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
FILLED = ["README.md", "CONTRIBUTING.md", "CITATION.cff"]


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
        found = (p for p in ROOT.rglob("*") if not skip & set(p.relative_to(ROOT).parts))
        names = [str(p.relative_to(ROOT)) for p in found if "__pycache__" not in p.parts]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def conda(path: str) -> tuple[dict[str, Requirement], list[str]]:
    """(conda packages, pip lines) of an environment file."""
    listed = yaml.safe_load((ROOT / path).read_text())["dependencies"]
    names = [re.sub(r"(?<![<>=!])=(?!=)", "==", d) for d in listed if isinstance(d, str)]
    pip = [line for d in listed if isinstance(d, dict) for line in d["pip"]]
    return {r.name: r for r in map(Requirement, names)}, pip


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a person would: without what an outer make hands down."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_dependencies_are_ranges_with_a_lower_end():
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        operators = {s.operator for s in requirement.specifier}
        assert requirement.name == "ghostlib" or ">=" in operators, requirement
        assert not operators & {"==", "==="}, requirement


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0"])
def test_torch_range(version):
    assert version in RANGES["torch"].specifier


def test_pip_can_fetch_the_embedded_wheels():
    assert "25.1" in RANGES["pip"].specifier
    assert "24.0" not in RANGES["pip"].specifier


def test_every_import_of_the_package_is_a_dependency():
    own = {"ghostlib", "pydoc_data"}
    names = {"IPython": "ipython", "PIL": "pillow", "lm_eval": "lm-eval", "yaml": "pyyaml"}
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    known = set(RANGES) | {Requirement(r).name for r in extras}
    import sys

    for path in (ROOT / "ghostlib").glob("*.py"):
        text = path.read_text()
        for module in re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE):
            if module not in sys.stdlib_module_names and module not in own:
                assert names.get(module, module) in known, f"{path.name} imports {module}"


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
    assert "pip install --no-cache-dir -e '.[notebooks]'" in script.read_text()
    assert "assets.fetch_all()" in script.read_text()
    # a second description would take precedence over, or contradict, this one
    assert {p.name for p in script.parent.iterdir()} == {"environment.yml", "postBuild"}


def test_version_stands_once():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    for path in (ROOT / "ghostlib").glob("*.py"):
        assert not re.search(r"__version__\s*=\s*[\"']", path.read_text()), path.name


def test_licence_is_stated_alike():
    assert PROJECT["license"] == "Apache-2.0"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    assert [a["family-names"] for a in paper["authors"]] == ["Yun", "Jo", "Karimireddy", "Lee"]
    assert "2605.15491" in paper["url"]


def test_house_rules_and_generated_parts():
    assert tool.check(ROOT) == []


def test_one_address_everywhere(tmp_path):
    """After a change in the one place and `fill`, the old address is nowhere."""
    old = tool.address(ROOT)
    for name in [*FILLED, "pyproject.toml"]:
        shutil.copy(ROOT / name, tmp_path)
    if (ROOT / "notebooks").is_dir():
        shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    project = tmp_path / "pyproject.toml"
    project.write_text(project.read_text().replace(old, "someone/something"))
    assert tool.main(["fill"], tmp_path) == 0
    assert tool.stale(tmp_path) == {}
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.suffix != ".png":
            assert old not in path.read_text(), path.name
    for path in tracked():
        if path.parent != ROOT / "notebooks" and path.name not in [*FILLED, "pyproject.toml"]:
            assert old.encode() not in path.read_bytes(), path.relative_to(ROOT)


def test_readme_commands_are_targets_and_the_gate_runs_its_test_command():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"\bmake ([a-z]+)", readme.split("## Contributing")[0])) - {"needs"}
    assert {"run", "test", "lab"} <= mentioned <= targets
    assert {"lint", "bench", "notebooks", "clean", "help"} <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_the_targets():
    listed = make()
    assert listed.returncode == 0
    for target in ("run", "test", "lint", "lab", "bench", "notebooks", "clean"):
        assert f"make {target} " in listed.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_what_it_needs_when_there_is_no_python(tmp_path):
    (tmp_path / "pyproject.toml").touch()
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


def test_the_workflow_runs_the_gate():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    for version in workflow["jobs"]["test"]["strategy"]["matrix"]["python"]:
        assert version in Requirement(f"x{PROJECT['requires-python']}").specifier


def test_pre_commit_runs_what_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text()
    for hook in hooks:
        command = hook["entry"].removeprefix(".venv/bin/python ")
        assert f"$(PY) {command}" in lint, hook["id"]
