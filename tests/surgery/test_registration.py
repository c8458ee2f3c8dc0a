"""`import ghostlib` is cheap, and transformers can then load recovered models."""

import subprocess
import sys
from pathlib import Path

import fresh
import pytest
from conftest import tiny_model, tiny_windows

import ghostlib as gl


def test_every_public_name_is_found_where_type_checkers_see_it():
    assert sorted(gl._origins()) == sorted(gl.__all__) == sorted(dir(gl))
    for name in gl.__all__:
        assert getattr(gl, name) is not None
    with pytest.raises(AttributeError, match="module 'ghostlib' has no attribute 'ghots'"):
        gl.ghots  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, ghostlib; print({'torch', 'transformers', 'pandas'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n"


# Half of the time of importing transformers, and nothing of transformers.
BEFORE = (
    "import torch.distributed.tensor, torch._dynamo, sys; assert 'transformers' not in sys.modules"
)


@pytest.mark.thorough
def test_transformers_reads_a_recovered_model_whoever_is_imported_first(tmp_path: Path) -> None:
    gl.recover(tiny_model("llama"), tiny_windows(), [2, 3]).save_pretrained(tmp_path)
    orders = [
        "import ghostlib; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import ghostlib",
        "import ghostlib, transformers.models.auto.modeling_auto;"
        "from transformers import AutoConfig, AutoModelForCausalLM",
    ]
    code = (
        "import sys\nexec(sys.argv[1])\nassert 'ghostlib.surgery.ghosted' not in sys.modules\n"
        "print(AutoConfig.from_pretrained(sys.argv[2]).model_type,"
        "type(AutoModelForCausalLM.from_pretrained(sys.argv[2])).__name__)"
    )
    ended = fresh.run_all(code, *((order, tmp_path) for order in orders), imports=BEFORE)
    for order, done in zip(orders, ended, strict=True):
        assert done.returncode == 0, f"{order}: {done.stderr}"
        assert done.stdout == "ghosted_llama GhostedLlamaForCausalLM\n", order
