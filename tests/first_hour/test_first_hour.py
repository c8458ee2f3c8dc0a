"""Where nothing is prepared: a fresh environment, Binder's image, a machine with 2 GB of memory.

Minutes each; run by ``make test-hour``, which installs the extra ``binder``.
"""

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
import yaml

import notebooks

pytestmark = pytest.mark.first_hour

ROOT = Path(__file__).resolve().parents[2]
SHORT_COURSE = ["00", "04", "11", "12"]
USED = "\nimport time\nprint('used', peak_gigabytes(), time.process_time())"


def output(*command: object) -> str:
    """What a command prints, run at the root of the project."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_pip_section_of_environment_yml_installs_in_a_fresh_environment(tmp_path):
    """As conda does it: the lines in a file, ``pip install -U -r`` beside environment.yml."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (lines,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    (tmp_path / "requirements.txt").write_text("\n".join(lines))
    output(sys.executable, "-m", "venv", "--upgrade-deps", tmp_path / "fresh")
    python, begin = tmp_path / "fresh" / "bin" / "python", time.perf_counter()
    output(python, "-m", "pip", "install", "-q", "-U", "-r", tmp_path / "requirements.txt")
    print(f"{time.perf_counter() - begin:.0f} s, {output('du', '-shx', tmp_path / 'fresh')}")
    output(python, "-m", "pip", "check")
    found = output(python, "-I", "-c", "import ghostlib; print(ghostlib.__file__)")
    assert Path(found.strip()).is_relative_to(ROOT)
    assert output(python, "-m", "jupyterlab", "--version").startswith("4.")


def test_binder_builds_from_its_folder():
    if find_spec("repo2docker") is None:
        pytest.skip("no repo2docker: pip install jupyter-repo2docker, or make test-hour")
    image = output(sys.executable, "-m", "repo2docker", "--no-build", "--debug", ROOT)
    listed = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())["dependencies"]
    (python,) = (entry.partition("=")[2] for entry in listed if entry.startswith("python="))
    assert f"Building conda environment for python={python}\n" in image
    assert '--file "binder/environment.yml"' in image and "\nRUN ./binder/postBuild\n" in image


@pytest.mark.embedded
@pytest.mark.parametrize("number", SHORT_COURSE)
def test_the_short_course_fits_two_gigabytes_and_four_minutes(number, tmp_path):
    """The kernel, in a folder of its own. A machine that is busy cannot say how long."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    nb = notebooks.read(path)
    source = (ROOT / "benchmarks" / "memory.py").read_text() + USED
    nb.cells.append(nbformat.v4.new_code_cell(source))
    nbformat.write(nb, tmp_path / path.name)
    begin = time.perf_counter()
    ran = notebooks.execute(tmp_path / path.name)
    seconds = time.perf_counter() - begin
    peak, work = map(float, ran.cells[-1].outputs[0].text.split()[1:])
    found = f"{path.stem}: {peak:.2f} GB, {seconds:.0f} s, {work:.0f} s of work"
    print(found)
    assert peak <= 2
    if seconds > 240 and work < 0.8 * seconds:
        pytest.skip(f"a busy machine; {found}")
    assert seconds <= 240


def test_the_short_course_has_four_notebooks():
    opened = {path.name[:2]: notebooks.read(path).cells[0] for path in notebooks.suite(ROOT)}
    assert [n for n, cell in opened.items() if "hort course" in cell.source] == SHORT_COURSE
