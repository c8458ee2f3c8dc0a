"""Names of models, corpora and tasks that are chosen to do harm: they name, and nothing else."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model, tiny_tokenizer, tiny_windows
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import ghostlib as gl
from ghostlib.cli import main
from ghostlib.common import Registry
from ghostlib.experiments.run import run_experiment
from ghostlib.experiments.tables import report

pytestmark = pytest.mark.thorough

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model("llama", vocab_size=len(TOKENIZER))
NAMES = {
    "element": "<script>alert(1)<script>",
    "quotes": "a'\"`b",
    "lines": "a\nb\r\n# c",
    "terminal": "\x1b[31mred\x07",
    "up": "..",
    "marks": "| a | ](x) ```",
    "wide": "東京 größer",
}
LONG = "x" * 10_000
ALL = [*NAMES.values(), "../../x", LONG, "\x1b]0;title\x07"]


def is_plain(text: str) -> bool:
    """Whether a terminal shows it as it is."""
    return all(line.isprintable() for line in text.split("\n"))


@pytest.fixture
def text() -> str:
    rng = random.Random(0)
    words = ["the", "theory", "of", "thing", "then"]
    return "\n\n".join(" ".join(rng.choices(words, k=40)) for _ in range(30))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_hostile_name_names_files_and_no_more(name: str, text: str, tmp_path: Path) -> None:
    corpus, quiz = tmp_path / f"{name}.txt", tmp_path / f"{name}.jsonl"
    corpus.write_text(text)
    items = [{"query": "the", "choices": ["theory", "thing"], "gold": i % 2} for i in range(4)]
    quiz.write_text("\n".join(map(json.dumps, items)))
    sizes: dict[str, Any] = {"windows": 2, "length": 16, "test_windows": 2, "test_length": 16}
    chosen: dict[str, Any] = {"layers": ["2"], "operators": "pruned", "tasks": str(quiz)}
    plan = gl.Specification(calibration=str(corpus), perplexity=str(corpus), **chosen, **sizes)
    out = tmp_path / "out" / f"{name}.out"
    results = run_experiment(plan, out, model=MODEL, tokenizer=TOKENIZER)
    assert is_plain(report(results))
    assert gl.read_results(out).records.keys() == results.records.keys()
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    assert found == {corpus.name, quiz.name, "out", f"out/{out.name}"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_hostile_name_does_nothing_on_a_page(name: str, tmp_path: Path) -> None:
    recovered = gl.recover(MODEL, tiny_windows(), [2, 3], "refit")
    facts = {"base_model": name, "text": name, "perplexity": {name: 1.0}, name: name}
    folder = gl.save(recovered, tmp_path / f"{name}-model", TOKENIZER, facts=facts)
    card = (folder / "README.md").read_text()
    front, body = card.split("---\n", 2)[1:]
    prose = body.split("```python")[0]
    assert "<script>" not in prose and is_plain(body)
    assert len([line for line in prose.splitlines() if line.startswith("#")]) == 1
    (line,) = [line for line in body.splitlines() if line.startswith("model = ")]
    compile(line, "README.md", "exec")
    import yaml

    assert yaml.safe_load(front)["base_model"] == name
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(MODEL)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ALL)
def test_an_error_about_a_hostile_name_is_one_plain_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in (
        ["recover", name, "out"],
        ["recover", "tiny", "out", "--operator", name],
        ["recover", "tiny", "out", "--criterion", name],
        ["recover", "tiny", "out", "--layers", name],
        ["recover", "tiny", "out", "--corpus", name],
        ["experiment", "out", "--calibration", name],
        ["experiment", "out", "--layers", name],
        ["experiment", "out", "--shard", name],
        ["inspect", name],
        [name],
    ):
        assert main(line) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("ghostlib: ") and shown.err.count("\n") == 1
        assert is_plain(shown.err.strip()) and len(shown.err) < 1000 and not shown.out
    assert not list(tmp_path.iterdir())


@given(st.text(max_size=50))
@settings(max_examples=200)
def test_any_name_is_known_or_refused_in_one_line(name: str) -> None:
    for registry in (gl.OPERATORS, gl.CRITERIA, gl.CORPORA):
        assert isinstance(registry, Registry)
        if name in registry:
            continue
        with pytest.raises(ValueError, match="unknown") as caught:
            registry[name]
        assert is_plain(str(caught.value)) and "\n" not in str(caught.value)
