"""Zero-shot scores through the harness, against log-likelihoods computed by hand."""

import json
import logging
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ghostlib as gl
from ghostlib.evaluation import tasks as module
from ghostlib.evaluation.items import Item, read_items
from ghostlib.evaluation.tasks import EMBEDDED, PAPER_TASKS, check_names, check_tasks, zero_shot
from ghostlib.text.assets import AssetError
from ghostlib.text.documents import squeeze

SHARED = Path(__file__).parents[3] / "shared" / "data"
TOKENIZER = tiny_tokenizer(bos=True)
WORDS = ["the", "theory", "of", "a", "thing", "größer", "東京", "or", "not", "then", "it", "–"]


def questions(count: int, seed: int = 0) -> list[Item]:
    """Questions of two to four choices, as tasks like ARC have them."""
    rng = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    items: list[Item] = []
    for _ in range(count):
        choices = [text(1, 4) for _ in range(rng.randint(2, 4))]
        gold = rng.randrange(len(choices))
        items.append({"query": text(1, 8), "choices": choices, "gold": gold})
    return items


def write(path: Path, items: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n\n")
    return path


def by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[Item]
) -> tuple[list[int], list[int]]:
    """Whether each item is answered right, by log-likelihood, also per character."""
    right, right_norm = [], []
    for item in items:
        scores = []
        start = len(tokenizer(item["query"])["input_ids"])
        for choice in item["choices"]:
            ids = tokenizer(f"{item['query']} {choice}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)
            steps = range(start, ids.shape[1])
            scores.append(sum(float(logs[0, i - 1, ids[0, i]]) for i in steps))
        norm = [s / len(c) for s, c in zip(scores, item["choices"], strict=True)]
        right.append(int(np.argmax(scores) == item["gold"]))
        right_norm.append(int(np.argmax(norm) == item["gold"]))
    return right, right_norm


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=300)


@pytest.mark.thorough
@pytest.mark.parametrize("recovered", [False, True])
def test_scores_are_those_of_the_log_likelihoods(
    model: PreTrainedModel, tmp_path: Path, recovered: bool
) -> None:
    if recovered:
        calib = torch.randint(3, 279, (4, 24), generator=torch.Generator().manual_seed(0))
        model = gl.recover(model, calib, [2, 3], operator="ghost")
    items = questions(30)
    scores = zero_shot(model, TOKENIZER, write(tmp_path / "quiz.jsonl", items), batch_size=5)
    score = scores["quiz"]
    right, right_norm = by_hand(model, TOKENIZER, items)
    assert list(scores) == ["quiz"] and score.task == "quiz"
    assert score.correct == right and score.correct_norm == right_norm
    assert right != right_norm and 0 < sum(right) < 30  # the items tell the two scores apart
    assert score.acc == pytest.approx(np.mean(right))
    assert score.acc_norm == pytest.approx(np.mean(right_norm))
    assert score.acc_se == pytest.approx(np.std(right, ddof=1) / np.sqrt(30))
    assert score.acc_norm_se == pytest.approx(np.std(right_norm, ddof=1) / np.sqrt(30))


def test_model_tokenizer_logs_and_random_states_are_not_changed(
    model: PreTrainedModel, tmp_path: Path, capfd: Any, caplog: Any, monkeypatch: Any
) -> None:
    descriptions: list[str] = []
    describe = "torch.utils.collect_env.get_pretty_env_info"
    monkeypatch.setattr(describe, lambda: descriptions.append("pip list"))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    path = write(tmp_path / "quiz.jsonl", questions(4))
    level = logging.getLogger("lm_eval").level
    torch.manual_seed(5), np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5), np.random.seed(5)
    with caplog.at_level(logging.INFO):
        zero_shot(model, tokenizer, path)
    assert (torch.rand(1), np.random.rand()) == expected
    assert model.training and tokenizer.pad_token is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith("lm_eval")]
    assert logging.getLogger("lm_eval").level == level
    assert not descriptions, "of the machine, which take a second per task"


def test_dropout_is_off_while_a_model_in_training_mode_is_scored(tmp_path: Path) -> None:
    model = tiny_model("gpt2", vocab_size=300, resid_pdrop=0.5, embd_pdrop=0.5)
    path = write(tmp_path / "quiz.jsonl", questions(12))
    expected = zero_shot(model.eval(), TOKENIZER, path)
    model.train()
    model.transformer.h[0].eval()  # a part that is frozen stays so
    assert zero_shot(model, TOKENIZER, path) == expected
    assert model.training and not model.transformer.h[0].training


def test_a_likelihood_that_is_no_number_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    path = write(tmp_path / "quiz.jsonl", questions(2))
    with pytest.raises(ValueError, match=r"'quiz', item 0: a log-likelihood is not .* in float32"):
        zero_shot(model, TOKENIZER, path)


def test_limit_and_several_tasks(model: PreTrainedModel, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", questions(9, i)) for i, name in enumerate("ab")]
    every, few = zero_shot(model, TOKENIZER, paths), zero_shot(model, TOKENIZER, paths, limit=4)
    assert list(every) == ["a", "b"]
    for name in "ab":
        assert every[name].correct[:4] == few[name].correct and len(few[name].correct) == 4
        assert every[name].items != few[name].items
    assert every["a"].items != every["b"].items
    again = zero_shot(model, TOKENIZER, str(paths[0]), limit=4, batch_size=1)
    assert again["a"] == few["a"]
    one = zero_shot(model, TOKENIZER, paths[0], limit=1)["a"]
    assert one.correct == few["a"].correct[:1] and one.acc_se is None
    with pytest.raises(ValueError, match="two tasks are called 'a': name each once"):
        zero_shot(model, TOKENIZER, [*paths, paths[0]])
    with pytest.raises(ValueError, match="no task to score: use wiki-description or wiki-topic"):
        zero_shot(model, TOKENIZER, [])


@pytest.mark.thorough
def test_the_harness_own_tasks_by_name(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ARC as the harness defines it, on rows in the form of its dataset."""
    items = questions(12)
    rows = [
        {
            "id": str(number),
            "question": item["query"],
            "choices": {"text": item["choices"], "label": list("ABCD"[: len(item["choices"])])},
            "answerKey": "ABCD"[item["gold"]],
        }
        for number, item in enumerate(items)
    ]
    dataset = datasets.Dataset.from_list(rows)
    loaded = []

    def load_dataset(path: str, name: str, **options: Any) -> datasets.DatasetDict:
        loaded.append((path, name))
        assert "trust_remote_code" not in options
        return datasets.DatasetDict(train=dataset, validation=dataset, test=dataset)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    score = zero_shot(model, TOKENIZER, "arc_easy")["arc_easy"]
    prompts: list[Item] = [
        {**item, "query": f"Question: {item['query']}\nAnswer:"} for item in items
    ]
    assert (score.correct, score.correct_norm) == by_hand(model, TOKENIZER, prompts)
    assert loaded == [("allenai/ai2_arc", "ARC-Easy")]
    assert set(PAPER_TASKS) <= set(module._manager(True).all_tasks)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short index of tasks whose data is out of reach."""
    load = Mock(side_effect=OSError("no route\nand a long story"))
    stub = SimpleNamespace(all_tasks=["arc_easy", "boolq", "piqa"], load=load)
    monkeypatch.setattr(module, "_manager", lambda everything: stub)


@pytest.mark.usefixtures("index")
def test_errors_in_one_line_that_say_what_to_do(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown task 'arc_esy'; near are arc_easy.*\.jsonl"):
        zero_shot(model, TOKENIZER, "arc_esy")
    with pytest.raises(ValueError, match="near are wiki-topic"):
        zero_shot(model, TOKENIZER, "wikitopic")
    with pytest.raises(ValueError, match="near are wiki-description, wiki-topic, arc_easy, arc_c"):
        zero_shot(model, TOKENIZER, "?")
    message = r"task 'arc_easy' could not be read.*: without network use wiki-descr"
    with pytest.raises(ConnectionError, match=message) as caught:
        zero_shot(model, TOKENIZER, "arc_easy")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no such task file: .*gone\.jsonl"):
        zero_shot(model, TOKENIZER, tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="'gsm8k' has no accuracy: zero_shot is for multiple-ch"):
        module._score("gsm8k", {"results": {"gsm8k": {"exact_match,none": 0.5}}})


@pytest.mark.usefixtures("index")
def test_names_are_checked_without_reading_any_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_names(["wiki-topic", "arc_easy", write(tmp_path / "quiz.jsonl", questions(2))])
    with pytest.raises(ValueError, match="unknown task 'arc_esy'"):
        check_names(["arc_esy"])
    with pytest.raises(ValueError, match="line 1: a list, not an object"):
        check_names([write(tmp_path / "bad.jsonl", [[1]])])
    with pytest.raises(FileNotFoundError, match="no such task file"):
        check_names([tmp_path / "gone.jsonl"])
    with pytest.raises(ConnectionError, match="could not be read"):
        check_tasks(["arc_easy"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    check_names(["wiki-topic"])
    for check in (check_names, check_tasks):
        with pytest.raises(ModuleNotFoundError, match="pip install"):
            check(["arc_easy"])


def test_a_task_without_acc_norm() -> None:
    samples = [
        {"doc_id": i, "acc": float(i == 1), "doc_hash": str(i), "filtered_resps": [(-1.0, True)]}
        for i in (1, 0)
    ]
    results = {"boolq": {"acc,none": 0.5, "acc_stderr,none": 0.5}}
    score = module._score("boolq", {"results": results, "samples": {"boolq": samples}})
    assert score.correct == [0, 1]  # in the task's order
    assert (score.acc_norm, score.acc_norm_se, score.correct_norm) == (None, None, None)


def test_an_embedded_task_without_its_corpus(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Mock(side_effect=AssetError("no corpus"))
    monkeypatch.setattr("ghostlib.evaluation.items.asset", missing)
    with pytest.raises(AssetError, match="no corpus"):
        zero_shot(model, TOKENIZER, "wiki-topic")


def test_without_the_harness(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ghostlib\[eval\]'"):
        zero_shot(model, TOKENIZER)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "a list, not an object with query, choices and gold"),
        ('{"query": "q", "gold": 0}', r"no key 'choices' \(it has: query, gold\)"),
        ('{"query": " ", "choices": ["a", "b"], "gold": 0}', "query must be a text"),
        ('{"query": 7, "choices": ["a", "b"], "gold": 0}', "query must be a text"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "choices must be two or more texts"),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', "choices must be two or more texts"),
        ('{"query": "q", "choices": "ab", "gold": 0}', "choices must be two or more texts"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold = 2 is no index .* 0 … 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": -1}', "gold = -1 is no index into 2"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "gold = true is no index"),
        ('{"query": "q", "choices": ["a", "b"], "gold": "a"}', 'gold = "a" is no index'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_text(f'{{"query": "a\u2028b", "choices": ["a", "b"], "gold": 1}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"quiz\.jsonl, line 3: .*{message}"):
        read_items(path)
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"quiz\.jsonl has no items: give one"):
        read_items(path)


# ---- embedded ----


@pytest.mark.embedded
@pytest.mark.parametrize("name", list(EMBEDDED))
def test_embedded_tasks_are_fair(name: str) -> None:
    items = EMBEDDED[name]()
    assert items == EMBEDDED[name]() and len(items) >= 200
    assert len({item["query"] for item in items}) == len(items)
    counts = np.bincount([item["gold"] for item in items], minlength=4)
    assert counts.min() > 0.18 * len(items)  # no place is right much more often than another
    for item in items:
        assert len(set(item["choices"])) == 4 and item["query"] == item["query"].strip()


@pytest.mark.embedded
@pytest.mark.parametrize("name", list(EMBEDDED))
def test_no_item_is_from_text_that_calibration_sees(name: str) -> None:
    splits = [gl.documents("wiki", split=split) for split in ("train", "test")]
    train, test = (" ".join(map(squeeze, texts)) for texts in splits)
    for item in EMBEDDED[name]():
        shown = item["query"].split("\n\n")[0]
        assert shown in test and shown not in train


@pytest.mark.embedded
def test_descriptions_cannot_be_copied_from_the_text() -> None:
    for item in EMBEDDED["wiki-description"]():
        words = set(re.findall(r"\w{4,}", item["query"].lower()))
        for choice in item["choices"]:
            assert not words & set(re.findall(r"\w{4,}", choice.lower())) - {"from", "with", "into"}


@pytest.mark.embedded
def test_topics_are_right_and_wrong_equally_often() -> None:
    items = EMBEDDED["wiki-topic"]()
    right = [item["choices"][item["gold"]] for item in items]
    offered = [choice for item in items for choice in item["choices"]]
    for topic in set(offered):
        assert offered.count(topic) == 4 * right.count(topic) == 4 * len(items) // 11


@pytest.mark.embedded
def test_embedded_model_and_hand_count(embedded: Any) -> None:
    model, tokenizer = embedded
    score = zero_shot(model, tokenizer, "wiki-description", limit=5)["wiki-description"]
    items = EMBEDDED["wiki-description"]()[:5]
    assert (score.correct, score.correct_norm) == by_hand(model, tokenizer, items)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared evaluation data is not here")
@pytest.mark.parametrize(("name", "count"), [("arc_easy", 500), ("boolq", 300), ("copa", 100)])
def test_public_task_files(name: str, count: int, model: PreTrainedModel) -> None:
    assert len(read_items(SHARED / f"{name}.jsonl")) == count
    score = zero_shot(model, TOKENIZER, SHARED / "copa.jsonl", limit=5)["copa"]
    assert len(score.correct) == 5
