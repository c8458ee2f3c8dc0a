"""Any bytes in texts and configurations give windows, a model, or one clear error."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model, tiny_tokenizer, tiny_windows
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import ghostlib as gl

TOKENIZER = tiny_tokenizer()
FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
SUFFIXES = (".txt", ".raw", ".jsonl", ".parquet")


def clear(error: BaseException) -> bool:
    message = str(error)
    return message.isprintable() and 0 < len(message) < 1000


@FEW
@given(st.binary(max_size=400), st.sampled_from(SUFFIXES), st.sampled_from(["train", "all"]))
@example(b"", ".txt", "train")
@example(b"\xff\xfe", ".txt", "all")
@example(b'{"text": 1}', ".jsonl", "all")
@example(b'{"text": "' + b"the thing " * 30 + b'"}\n', ".jsonl", "all")
@example(b"PAR1" + b"\0" * 50 + b"PAR1", ".parquet", "all")
def test_any_bytes_of_a_corpus(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str, split: str
) -> None:
    path = tmp_path_factory.mktemp("corpus") / f"a{suffix}"
    path.write_bytes(data)
    try:
        windows = gl.token_windows(path, TOKENIZER, split=split, length=8, count=None)
    except ValueError as error:
        assert clear(error), str(error)
    else:
        assert windows.shape[1] == 8 and len(windows) > 0
        assert int(windows.min()) >= 0 and int(windows.max()) < len(TOKENIZER)
    shutil.rmtree(path.parent)


@FEW
@given(st.text(max_size=200))
def test_any_text_gives_windows_that_say_it(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    try:
        windows = gl.token_windows(path, TOKENIZER, split="all", length=2, count=None)
    except ValueError as error:
        assert clear(error), str(error)
    else:
        said = TOKENIZER.decode(windows.flatten(), clean_up_tokenization_spaces=False)
        assert text.startswith(said.rstrip("\ufffd"))  # a character may be cut
    shutil.rmtree(path.parent)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("saved") / "model"
    gl.recover(tiny_model("llama"), tiny_windows(), [2, 3]).save_pretrained(folder)
    yield folder


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.thorough
@settings(FEW, max_examples=40)
@given(json_values)
def test_any_list_of_operators_in_a_configuration(saved: Path, ghost: Any) -> None:
    """The true one loads; every other is refused in one line."""
    path = saved / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"ghost": ghost}))
    try:
        with pytest.raises(ValueError) as caught:
            AutoModelForCausalLM.from_pretrained(saved)
        assert "ghost" in str(caught.value) and "\n" not in str(caught.value)
    finally:
        path.write_text(before)


@pytest.mark.thorough
@settings(FEW, max_examples=40)
@given(st.data())
def test_any_field_of_an_operator_in_a_configuration(saved: Path, data: st.DataObject) -> None:
    path = saved / "config.json"
    before = path.read_text()
    settings_ = json.loads(before)
    (entry,) = settings_["ghost"]
    name = data.draw(st.sampled_from(["module", "receiver", "width", "bias", "rank", "features"]))
    value = data.draw(json_values)
    entry[name] = value
    path.write_text(json.dumps(settings_))
    try:
        AutoModelForCausalLM.from_pretrained(saved)
    except (ValueError, RuntimeError, OSError) as error:
        assert "\n" not in str(error).strip(), str(error)
    finally:
        path.write_text(before)
