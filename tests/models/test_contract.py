"""Every causal type of transformers keeps the contract, or is refused with a reason."""

import contract
import pytest

pytestmark = pytest.mark.thorough

# One of each kind: plain, positions, experts, state spaces, towers, parallel streams, tables per
# layer, an exception, a refusal. All of them: `make test-all`.
SAMPLE = {"bert", "deepseek_v4", "falcon", "gemma3", "gemma4_text", "gpt_oss"}
SAMPLE |= {"jamba", "llama", "mixtral", "qwen3_next", "xlm"}


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.every_type])
        for name in contract.TYPES
    ],
)
def test_contract(model_type: str) -> None:
    verdict = contract.check(model_type)
    expected = contract.documented()
    assert not expected or verdict.outcome == expected[model_type], verdict


def test_the_document_names_every_type() -> None:
    expected = contract.documented()
    assert not expected or sorted(expected) == sorted(contract.TYPES)
    assert set(contract.TYPES) >= SAMPLE
