"""A stock checkpoint with a repair in it, in the programs that people load models with.

Run by ``make test-interop``, which installs the extra ``interop``. ghostlib cannot be imported in
the processes that load the folder.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, tiny_windows

import ghostlib as gl

pytestmark = pytest.mark.interop

PROMPT = "the theory of the thing"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refitted model, saved with its tokenizer as any other model is."""
    tokenizer = tiny_tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "head_dim": 4}
    model = tiny_model("llama", **sizes)
    recovered = gl.recover(model, tiny_windows(12, 24), [2, 3], "refit")
    return gl.save(recovered, tmp_path_factory.mktemp("stock") / "model", tokenizer)


def elsewhere(script: str, *arguments: object) -> str:
    """The output of a script in a process that cannot import ghostlib."""
    guarded = 'import sys\nsys.modules["ghostlib"] = None\n' + script
    command = [sys.executable, "-c", guarded, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected_tokens(folder: Path) -> list[int]:
    model, tokenizer = gl.load_model(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out: torch.Tensor = model.generate(ids, max_new_tokens=8, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def test_pipeline(stock: Path) -> None:
    script = """
from transformers import pipeline
generate = pipeline("text-generation", sys.argv[1], max_new_tokens=8, do_sample=False)
out = generate(sys.argv[2], return_tensors=True)[0]["generated_token_ids"]
print(type(generate.model).__name__, out[-8:])
"""
    assert f"LlamaForCausalLM {expected_tokens(stock)}" in elsewhere(script, stock, PROMPT)


def test_lm_eval(stock: Path, tmp_path: Path) -> None:
    rows = [
        {"query": "the theory", "choices": ["of the thing", "xyz"], "gold": 0},
        {"query": "the thing", "choices": ["of", "theory of"], "gold": 1},
    ]
    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(
        f"""task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
    )
    script = """
from lm_eval.__main__ import cli_evaluate
sys.argv = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={sys.argv[1]}", "--tasks",
            "local", "--include_path", sys.argv[2], "--device", "cpu", "--output_path", sys.argv[3]]
cli_evaluate()
"""
    elsewhere(script, stock, tmp_path, tmp_path / "out")
    (written,) = (tmp_path / "out").rglob("results*.json")
    measured = json.loads(written.read_text())["results"]["local"]["acc,none"]
    model, tokenizer = gl.load_model(stock)
    items = tmp_path / "ours.jsonl"
    items.write_text(data.read_text())
    assert gl.zero_shot(model, tokenizer, str(items))["ours"].acc == measured


def test_lora(stock: Path) -> None:
    script = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tuned = get_peft_model(model, LoraConfig(target_modules=["down_proj", "q_proj"], r=2))
optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
ids = torch.arange(3, 30)[None]
for _ in range(3):
    loss = tuned(ids, labels=ids).loss
    loss.backward(); optimiser.step(); optimiser.zero_grad()
    print(float(loss))
"""
    first, _, last = map(float, elsewhere(script, stock).split())
    assert last < first


def test_ctranslate2(stock: Path, tmp_path: Path) -> None:
    script = """
import ctranslate2
from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer
TransformersConverter(sys.argv[1]).convert(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = tokenizer.convert_ids_to_tokens(tokenizer(sys.argv[2]).input_ids)
generator = ctranslate2.Generator(sys.argv[3], device="cpu", compute_type="float32")
out = generator.generate_batch([tokens], max_length=8, sampling_topk=1,
                               include_prompt_in_result=False, end_token=[])
print(out[0].sequences_ids[0])
"""
    out = elsewhere(script, stock, PROMPT, tmp_path / "converted")
    assert str(expected_tokens(stock)) in out
