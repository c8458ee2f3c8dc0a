"""`import ghostlib` is cheap, and transformers reads a recovered model after it all the same."""

import subprocess
import sys

import pytest
from conftest import tiny_model, tiny_windows

import ghostlib as gl


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_found_where_type_checkers_see_it():
    assert sorted(gl._origins()) == sorted(gl.__all__) == sorted(dir(gl))
    for name in gl.__all__:
        assert getattr(gl, name) is not None
    with pytest.raises(AttributeError, match="module 'ghostlib' has no attribute 'ghots'"):
        gl.ghots  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, ghostlib; print({'torch', 'transformers', 'pandas'} & sys.modules.keys())"
    assert python(code) == "set()\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("registration") / "model"
    gl.recover(tiny_model("llama"), tiny_windows(), [2, 3]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "imports",
    [
        "import ghostlib; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import ghostlib",
        "import ghostlib, transformers.models.auto.modeling_auto;"
        "from transformers import AutoConfig, AutoModelForCausalLM",
    ],
)
def test_transformers_reads_a_recovered_model_whoever_is_imported_first(saved, imports):
    code = (
        f"{imports}\nimport sys\nassert 'ghostlib.surgery.ghosted' not in sys.modules\n"
        "print(AutoConfig.from_pretrained(sys.argv[1]).model_type,"
        "type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    assert python(code, saved) == "ghosted_llama GhostedLlamaForCausalLM\n"
