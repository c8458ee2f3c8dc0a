"""Padding, chat templates and pipelines: a batch is continued as each prompt alone."""

import copy

import pytest
from conftest import LAYERS, VOCABULARY, tiny_model, tiny_windows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline

import ghostlib as gl
from ghostlib.evaluation.generation import Message

QUESTIONS = ["What is the capital of France?", "Name a fruit."]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


WORDS = ["<pad>", "<begin>", "<end>", "<unk>", "<other>", "user", "assistant"]
WORDS += [f"w{i}" for i in range(len(WORDS), VOCABULARY)]


def words_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """One token a word, a word for every id of the tiny models; pads on the right."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", padding_side="right", **tokens
    )


@pytest.fixture
def prompts() -> list[str]:
    """Three prompts of 3, 14 and 9 words."""
    rows = zip(tiny_windows(3, 14).tolist(), (3, 14, 9), strict=True)
    return [" ".join(WORDS[i] for i in row[:length]) for row, length in rows]


@pytest.mark.thorough
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("repaired", [False, True], ids=["dense", "recovered"])
def test_a_padded_batch_is_continued_as_one_by_one(
    any_tiny: PreTrainedModel, prompts: list[str], repaired: bool, use_cache: bool
) -> None:
    model = any_tiny
    if repaired:
        removed = [0, 2, 3, LAYERS - 1]
        model = gl.recover(model, tiny_windows(), removed, relative_ridge=1e-3)
    model.generation_config.use_cache = use_cache
    special = [{"pad_token": "<pad>"}, {"pad_token": "<other>"}, {"eos_token": "<end>"}]
    for tokens in special if use_cache else special[:1]:  # padding is independent of the cache
        tokenizer = words_tokenizer(**tokens)
        together = gl.generate(model, tokenizer, prompts, max_new_tokens=6)
        alone = [gl.generate(model, tokenizer, p, max_new_tokens=6)[0] for p in prompts]
        assert together == alone and any(together)


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(prompts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"neither a padding nor an end token: set tokenizer\."):
        gl.generate(tiny_model("llama"), words_tokenizer(), prompts)


def test_bad_prompts_are_named() -> None:
    model, tokenizer = tiny_model("llama"), words_tokenizer(pad_token="<pad>")
    message: Message = {"role": "user", "content": "w50"}
    for wrong in ([[message]], ["w50", [message]]):
        with pytest.raises(ValueError, match=r"need chat=True|prompts must be text or a list"):
            gl.generate(model, tokenizer, wrong)  # type: ignore[arg-type]


def test_a_model_in_training_mode_generates_without_dropout(prompts: list[str]) -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    tokenizer = words_tokenizer(pad_token="<pad>")
    expected = gl.generate(model.eval(), tokenizer, prompts)
    model.train()
    model.transformer.h[0].eval()  # a part that is frozen stays so
    assert [gl.generate(model, tokenizer, prompts) for _ in range(2)] == [expected] * 2
    assert model.training and not model.transformer.h[0].training


def test_the_generation_config_of_a_checkpoint_is_overridden(prompts: list[str]) -> None:
    model, tokenizer = tiny_model("llama"), words_tokenizer(pad_token="<pad>")
    expected = gl.generate(model, tokenizer, prompts)
    for name, value in (("num_beams", 3), ("repetition_penalty", 1.8), ("no_repeat_ngram_size", 1)):
        setattr(model.generation_config, name, value)
    assert gl.generate(model, tokenizer, prompts) == expected


def test_prompts_go_into_the_chat_template() -> None:
    model, tokenizer = tiny_model("llama"), words_tokenizer(pad_token="<pad>", bos_token="<begin>")
    tokenizer.chat_template = TEMPLATE
    turns: list[Message] = [
        {"role": "user", "content": "w50 w60"},
        {"role": "assistant", "content": "w70"},
        {"role": "user", "content": "w80"},
    ]
    texts = ["user w50 w60 assistant w70 user w80 assistant", "user w90 assistant"]
    expected = gl.generate(model, tokenizer, texts, max_new_tokens=5)
    chats: list[list[Message]] = [turns, [{"role": "user", "content": "w90"}]]
    assert gl.generate(model, tokenizer, chats, chat=True, max_new_tokens=5) == expected
    assert gl.generate(model, tokenizer, turns, chat=True, max_new_tokens=5) == expected[:1]
    assert gl.generate(model, tokenizer, "w90", chat=True, max_new_tokens=5) == expected[1:]
    assert gl.generate(model, tokenizer, ["w90"], chat=True, max_new_tokens=5) == expected[1:]


@pytest.fixture(scope="module")
def recovered(embedded, wiki) -> PreTrainedModel:
    return gl.recover(embedded[0], wiki, range(12, 19))


@pytest.mark.embedded
def test_generation_of_prompts_with_different_lengths(embedded) -> None:
    model, tokenizer = embedded
    prompts = ["Water boils at", "The capital of France is the city of"]
    together = gl.generate(model, tokenizer, prompts, max_new_tokens=6)
    alone = [gl.generate(model, tokenizer, p, max_new_tokens=6)[0] for p in prompts]
    assert together == alone
    assert "Paris" in together[1]


@pytest.mark.embedded
def test_a_tokenizer_without_padding_gets_its_end_token(embedded) -> None:
    model, tokenizer = embedded
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert len(gl.generate(model, bare, ["One", "Two and three"], max_new_tokens=2)) == 2
    assert bare.pad_token is None  # the caller's tokenizer is left as it was


@pytest.mark.embedded
def test_an_instruct_model_answers(embedded, recovered: PreTrainedModel) -> None:
    model, tokenizer = embedded
    answers = gl.generate(model, tokenizer, QUESTIONS, chat=True, max_new_tokens=8)
    assert "Paris" in answers[0]
    assert gl.generate(model, tokenizer, QUESTIONS[0], max_new_tokens=8)[0] != answers[0]
    together = gl.generate(recovered, tokenizer, QUESTIONS, chat=True, max_new_tokens=4)
    assert together == [
        gl.generate(recovered, tokenizer, q, chat=True, max_new_tokens=4)[0] for q in QUESTIONS
    ]


@pytest.mark.embedded
def test_a_pipeline_takes_batches_and_chats(embedded, recovered: PreTrainedModel) -> None:
    tokenizer = copy.deepcopy(embedded[1])  # pipelines set its padding side
    options = {"max_new_tokens": 4, "do_sample": False, "batch_size": 2}
    prompts = ["Water boils at", "The capital of France is the city of"]
    expected = gl.generate(recovered, tokenizer, prompts, max_new_tokens=4)
    answers = gl.generate(recovered, tokenizer, QUESTIONS, chat=True, max_new_tokens=4)
    speaker = pipeline("text-generation", model=recovered, tokenizer=tokenizer)
    outputs = speaker(prompts, return_full_text=False, **options)
    assert [output[0]["generated_text"] for output in outputs] == expected
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    replies = [output[0]["generated_text"][-1] for output in speaker(chats, **options)]
    assert replies == [{"role": "assistant", "content": answer} for answer in answers]
