"""Tiny random models of several kinds, and the embedded model loaded once."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GHOSTLIB_PROGRESS", "0")
# Before torch is imported: workers of `pytest -n` share the cores, and their threads do not spin.
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))),
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import ghostlib as gl
from ghostlib.models.architectures import decoder_layers, receiver

# A machine that is busy is no fault of the code.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

LAYERS, WIDTH, VOCABULARY = 6, 16, 97

_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_SPECIFIC: dict[str, dict[str, Any]] = {
    "gemma2": dict(sliding_window=8),
    "gemma3_text": dict(
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
    ),
    "qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=3),
    "mistral": dict(sliding_window=8),
    "opt": dict(ffn_dim=24, word_embed_proj_dim=WIDTH),
    "gpt2": dict(n_inner=24),
}


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of ``model_type``: 6 layers, width 16, 97 words, weights of order one.

    Weights are larger than a fresh initialisation's, so that every layer matters.
    """
    torch.manual_seed(seed)
    settings = _SIZES | _SPECIFIC.get(model_type, {}) | changes
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    return model.eval()


def tiny_windows(count: int = 4, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids (count, length), special ids left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


def tiny_tokenizer(merges: int = 20, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 259 + ``merges`` tokens; with ``bos`` it adds one, as Llama's."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259 + merges,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(["the theory of the thing – Größe, größer: 東京 東京"] * 3, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def assert_same_moments(found: gl.Moments, expected: gl.Moments) -> None:
    """Equal up to the rounding of float64 sums."""
    for name, values in expected.tensors().items():
        scale = float(values.abs().max())
        torch.testing.assert_close(
            found.tensors()[name], values, rtol=1e-13, atol=1e-13 * scale, msg=name
        )
    assert found.counts() == pytest.approx(expected.counts(), rel=1e-13)
    for name in ("regressor", "blocks", "bias", "boundary", "model"):
        assert getattr(found, name) == getattr(expected, name), name


def saved_and_loaded(model: PreTrainedModel, ids: torch.Tensor, folder: Path) -> PreTrainedModel:
    """``model`` saved to ``folder`` and read back, after its logits were found to be the same."""
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(folder / "model")
    again = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
    return again


# Pre-norm and post-norm, LayerNorm and RMSNorm, Linear and Conv1D, sliding windows, soft caps.
KINDS = ("gemma2", "gpt2", "llama", "olmo2")
# Norms of queries, parallel branches, learned positions, fused projections: in `make test-all`.
# A sample of all types goes through the contract in tests/models/test_contract.py.
MORE_KINDS = ("gemma3_text", "gpt_neox", "opt", "phi3")


def _kind(name: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.every_type] * (name in MORE_KINDS))


@pytest.fixture(params=map(_kind, (*KINDS, *MORE_KINDS)))
def any_tiny(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One tiny model of each kind in turn."""
    return tiny_model(request.param)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make test` asks for everything; without it the tests take a minute."""
    parser.addoption("--thorough", action="store_true", help="also what is marked thorough or slow")


# Tracing for coverage costs half as much again. What is quick is traced, and of the rest the tests
# in these files, which alone reach some of the lines.
TRACED = ("test_abilities", "test_cli", "test_distributed", "test_inspect", "test_installers")
TRACED += ("test_plan", "test_recipe", "test_run", "test_saving", "test_testing")


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what asks for the embedded model; what takes many minutes only runs when asked for."""
    for item in items:
        if "embedded" in getattr(item, "fixturenames", ()):
            item.add_marker("embedded")
        long = any(map(item.get_closest_marker, ("thorough", "slow", "embedded")))
        if long and item.path.stem not in TRACED:
            item.add_marker("no_cover")
    asked = config.option.markexpr + " thorough slow" * config.option.thorough
    for marker in ("every_type", "first_hour", "interop", "browser", "thorough", "slow"):
        if marker not in asked:
            tail = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=tail)
            items[:] = [item for item in items if item not in tail]


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The matrices given to `torch.linalg.eigh` since the test began."""
    matrices: list[torch.Tensor] = []
    eigh = torch.linalg.eigh

    def counted(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        matrices.append(A)
        return eigh(A)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    return matrices


@pytest.fixture(scope="session")
def embedded() -> tuple[PreTrainedModel, object]:
    """The embedded model and its tokenizer; tests must leave both as they are."""
    return gl.load_model()


@pytest.fixture(scope="session")
def wiki(embedded) -> torch.Tensor:
    """Calibration windows (4, 512) of the embedded Wikipedia text."""
    return gl.token_windows("wiki", embedded[1], length=512, count=4)


def stored_streams(model, ids, **inputs) -> list[torch.Tensor]:
    """Every stream (batch, tokens, width), index 0 … LAYERS, from one whole forward pass."""
    streams: dict[int, torch.Tensor] = {}
    handles = [
        receiver(model, i).register_forward_pre_hook(
            lambda module, args, i=i: streams.__setitem__(i, args[0].clone())
        )
        for i in range(len(decoder_layers(model)) + 1)
    ]
    with torch.no_grad():
        model(ids, use_cache=False, **inputs)
    for handle in handles:
        handle.remove()
    return [streams[i] for i in sorted(streams)]


@pytest.fixture
def fresh_figure() -> Iterator[None]:
    """A figure of its own in the suite's style, and none left behind."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    gl.plotting.use_style()
    plt.figure()
    yield
    plt.close("all")
