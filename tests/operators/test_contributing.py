"""The example in CONTRIBUTING of adding an operator, executed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import saved_and_loaded, stored_streams, tiny_model, tiny_windows

import ghostlib as gl
from ghostlib.models.architectures import receiver
from ghostlib.operators.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("error:::ghostlib")
GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
BEFORE = set(FAMILIES)


def example() -> str:
    section = GUIDE.read_text(encoding="utf-8").partition("## Add an operator\n")[2]
    code = re.search(r"^```python\n(.*?)^```$", section.partition("\n## ")[0], re.M | re.S)
    assert code is not None
    return code[1]


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The namespace of the example; its family is removed again afterwards."""
    names: dict[str, Any] = {}
    exec(compile(example(), str(GUIDE), "exec"), names)
    (added,) = set(FAMILIES) - set(BEFORE)
    monkeypatch.setitem(FAMILIES, added, FAMILIES.pop(added))
    return names | {"added": added}


def test_an_operator_is_added_in_under_fifteen_lines(namespace: dict[str, Any]) -> None:
    code = [line for line in example().splitlines() if line.strip()]
    assert len(code) < 15
    name = namespace["added"]
    assert FAMILIES[name].name == name
    (test,) = (value for key, value in namespace.items() if key.startswith("test_"))
    test()


def test_the_added_operator_repairs_a_model(namespace: dict[str, Any], tmp_path: Path) -> None:
    name, model, ids = namespace["added"], tiny_model("llama"), tiny_windows()
    recovered = saved_and_loaded(gl.recover(model, ids, [2, 3], name), ids, tmp_path)
    assert recovered.config.recovery["repairs"][0]["operator"] == name
    streams = stored_streams(model, ids)
    boundary: Any = receiver(recovered, 2)
    with torch.no_grad():
        repaired = boundary.boundary(streams[2])
    shift = (streams[4] - streams[2]).flatten(0, 1).mean(0)
    torch.testing.assert_close(repaired, streams[2] + shift, rtol=1e-5, atol=1e-5)
    one_after_another = gl.recover(model, ids, [1, 3], name, fit="sequential")
    assert len(one_after_another.config.recovery["repairs"]) == 2
