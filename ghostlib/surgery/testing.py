"""Checks that a repaired model gives the same results in every way that transformers decodes.

They are for new repairs and architectures what scikit-learn's estimator checks are for estimators:
on a tiny model, every way must be right or be refused in one line.
"""

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ghostlib.common import Registry, checked
from ghostlib.models.architectures import cached, check_model
from ghostlib.models.placement import input_device
from ghostlib.models.streams import evaluating

_TOLERANCE = 1e-3  # relative to the largest logit, in float32
_QUANTISED_TOLERANCE = 0.25  # relative to the norm of the logits, with keys and values of 8 bits
_NEW_TOKENS = 12
_PROMPT_LENGTHS = (3, 14, 1, 9)


@dataclass(frozen=True)
class Subject:
    """A model under check.

    Attributes:
        model: in evaluation mode.
        partner: another model of the same vocabulary, for assisted generation.
        prompts: token ids, each (tokens,), of different lengths.
    """

    model: PreTrainedModel
    partner: PreTrainedModel
    prompts: list[Tensor]

    @property
    def ids(self) -> Tensor:
        """Token ids (2, tokens) without padding."""
        longest = max(self.prompts, key=len)
        return torch.stack([longest, longest.flip(0)])

    @torch.no_grad()
    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, tokens, vocabulary) of one pass without a cache."""
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
        out = self.model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        logits: Tensor = out.logits
        return logits

    def generate(self, *args: Any, model: PreTrainedModel | None = None, **options: Any) -> Any:
        """Output of `generate` by greedy search, without an end-of-sequence token."""
        settings = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        outputs = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
        return (model or self.model).generate(*args, **(settings | outputs | options))

    def check_generation(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> None:
        """Generate, and compare the logits of every step with one pass over the result."""
        mask = torch.ones_like(ids) if mask is None else mask  # generate would guess it
        out = self.generate(ids, attention_mask=mask, **options)
        longer = torch.nn.functional.pad(mask, (0, len(out.logits)), value=1)
        expected = self.logits(out.sequences, longer)[:, ids.shape[1] - 1 : -1]
        _assert_close(torch.stack(out.logits, 1), expected)


def _assert_close(logits: Tensor, expected: Tensor) -> None:
    assert logits.shape == expected.shape, f"{tuple(logits.shape)}, not {tuple(expected.shape)}"
    scale = float(expected.abs().max())
    error = float((logits.to(expected) - expected).abs().max())
    assert error <= _TOLERANCE * scale, f"logits are off by {error:.3g}, the largest is {scale:.3g}"


def _static(subject: Subject) -> None:
    for _ in range(2):  # the second generation begins with the emptied cache of the first
        subject.check_generation(subject.ids, cache_implementation="static")


def _offloaded(subject: Subject) -> None:
    if input_device(subject.model).type != "cuda":
        raise NotImplementedError("transformers offloads caches from CUDA alone")
    subject.check_generation(subject.ids, cache_implementation="offloaded")


def _quantised(subject: Subject) -> None:
    try:
        from transformers.cache_utils import QuantizedCache

        cache = QuantizedCache("fp8", config=subject.model.config)
    except (ImportError, TypeError, ValueError) as error:
        raise NotImplementedError(str(error)) from None
    ids = subject.ids
    pieces = ids.split([ids.shape[1] - 4, 1, 1, 1, 1], 1)
    with torch.no_grad():
        parts = [subject.model(piece, **cached(subject.model, cache)).logits for piece in pieces]
    expected = subject.logits(ids)
    distance = float((torch.cat(parts, 1) - expected).norm() / expected.norm())
    assert distance < _QUANTISED_TOLERANCE, f"logits are {distance:.0%} off"


@torch.no_grad()
def _pieces(subject: Subject) -> None:
    ids, model = subject.ids, subject.model
    for cuts in ([5], [1, 2, 3, 9], list(range(1, ids.shape[1]))):
        cache = DynamicCache(config=model.config)
        pieces = ids.tensor_split(cuts, dim=1)
        parts = [model(piece, **cached(model, cache)).logits for piece in pieces]
        _assert_close(torch.cat(parts, 1), subject.logits(ids))


def _resumed(subject: Subject) -> None:
    first = subject.generate(subject.ids)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    longer = torch.cat([first.sequences, subject.ids], 1)
    subject.check_generation(longer, **cached(subject.model, cache))


@torch.no_grad()
def _interleaved(subject: Subject) -> None:
    model, sequences = subject.model, [row[None] for row in subject.ids]
    steps, caches = list(sequences), [DynamicCache(config=model.config) for _ in sequences]
    for _ in range(6):
        for k, cache in enumerate(caches):
            logits = model(steps[k], **cached(model, cache)).logits[:, -1:]
            _assert_close(logits, subject.logits(sequences[k])[:, -1:])
            steps[k] = logits.argmax(-1)
            sequences[k] = torch.cat([sequences[k], steps[k]], 1)


def _beams(subject: Subject) -> None:
    ids, mask = _padded(subject.prompts)
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        settings = {"attention_mask": mask, "output_logits": False, **options}
        with_cache = subject.generate(ids, use_cache=True, **settings).sequences
        without = subject.generate(ids, use_cache=False, **settings).sequences
        assert torch.equal(with_cache, without), "other tokens than without cache"


def _assisting(subject: Subject) -> None:
    ids, partner = subject.ids[:1], subject.partner
    settings = {"model": partner, "attention_mask": torch.ones_like(ids)}
    assisted = subject.generate(ids, assistant_model=subject.model, **settings).sequences
    alone = subject.generate(ids, use_cache=False, **settings).sequences
    assert torch.equal(assisted, alone), "other tokens than the model alone"


def _chunked(subject: Subject) -> None:
    ids, mask = _padded(subject.prompts)
    subject.check_generation(subject.ids, prefill_chunk_size=3)
    subject.check_generation(ids, mask, prefill_chunk_size=3)


def _left_padding(subject: Subject) -> None:
    ids, mask = _padded(subject.prompts)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        together = subject.generate(ids, attention_mask=mask, **options).sequences
        for row, prompt in zip(together, subject.prompts, strict=True):
            alone = subject.logits(torch.cat([prompt, row[ids.shape[1] :]])[None])
            expected = alone[0, len(prompt) - 1 : -1].argmax(-1)
            assert torch.equal(row[ids.shape[1] :], expected), "other tokens than a row alone"


def _inputs_embeds(subject: Subject) -> None:
    ids = subject.ids
    embedded = subject.model.get_input_embeddings()(ids)
    out = subject.generate(inputs_embeds=embedded)
    expected = subject.logits(torch.cat([ids, out.sequences], 1))
    _assert_close(torch.stack(out.logits, 1), expected[:, ids.shape[1] - 1 : -1])


def _threads(subject: Subject) -> None:
    prompts = [prompt[None] for prompt in subject.prompts]
    alone = list(map(subject.generate, prompts))
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(subject.generate, prompts))
    for one, expected in zip(together, alone, strict=True):
        _assert_close(torch.stack(one.logits, 1), torch.stack(expected.logits, 1))
        assert torch.equal(one.sequences, expected.sequences), "other tokens than alone"


def _saved(subject: Subject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(Path(folder) / "model")
        _assert_same(subject, AutoModelForCausalLM.from_pretrained(Path(folder) / "model"))


def _resized(subject: Subject) -> None:
    other, words = copy.deepcopy(subject.model), subject.model.config.vocab_size
    other.resize_token_embeddings(words + 8, mean_resizing=False)
    with torch.no_grad():
        _assert_close(other(subject.ids).logits[..., :words], subject.logits(subject.ids))


def _checkpointed(subject: Subject) -> None:
    ids, gradients = subject.ids, []
    for checkpointing in (False, True):
        other = copy.deepcopy(subject.model).train()
        if checkpointing:
            other.gradient_checkpointing_enable()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same dropout
            other(ids, labels=ids).loss.backward()
        named = other.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys(), "gradients of other weights"
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, rtol=1e-4, atol=1e-6), name


def _compiled(subject: Subject) -> None:
    torch.compiler.reset()
    compiled: Any = torch.compile(subject.model, backend="eager")
    with torch.no_grad():
        _assert_close(compiled(subject.ids).logits, subject.logits(subject.ids))


def _assert_same(subject: Subject, other: PreTrainedModel) -> None:
    """Assert that ``other`` gives the results of the model."""
    copied = Subject(other.eval(), subject.partner, subject.prompts)
    _assert_close(copied.logits(subject.ids), subject.logits(subject.ids))
    copied.check_generation(subject.ids)


def _padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of prompts of different lengths, padded on the left."""
    length = max(map(len, prompts))
    padded = [torch.nn.functional.pad(ids, (length - len(ids), 0)) for ids in prompts]
    masks = [torch.arange(length, device=ids.device) >= length - len(ids) for ids in prompts]
    return torch.stack(padded), torch.stack(masks).long()


CHECKS: Registry[Callable[[Subject], None]] = Registry("check")
"""Checks by name; each raises `AssertionError` if the model is wrong."""
CHECKS["dynamic cache"] = lambda subject: subject.check_generation(subject.ids)
CHECKS["static cache"] = _static
CHECKS["offloaded cache"] = _offloaded
CHECKS["quantised cache"] = _quantised
CHECKS["pieces of any length"] = _pieces
CHECKS["resumed cache"] = _resumed
CHECKS["interleaved sequences"] = _interleaved
CHECKS["assisted generation"] = lambda subject: subject.check_generation(
    subject.ids[:1], assistant_model=subject.partner
)
CHECKS["prompt lookup"] = lambda subject: subject.check_generation(
    subject.ids[:1].repeat(1, 3), prompt_lookup_num_tokens=2
)
CHECKS["beams"] = _beams
CHECKS["as an assistant"] = _assisting
CHECKS["chunked prefill"] = _chunked
CHECKS["left padding"] = _left_padding
CHECKS["input embeddings"] = _inputs_embeds
CHECKS["threads"] = _threads
CHECKS["deep copy"] = lambda subject: _assert_same(subject, copy.deepcopy(subject.model))
CHECKS["pickle"] = lambda subject: _assert_same(subject, pickle.loads(pickle.dumps(subject.model)))
CHECKS["saved and loaded"] = _saved
CHECKS["resized embeddings"] = _resized
CHECKS["gradient checkpointing"] = _checkpointed
CHECKS["compiled"] = _compiled


@checked
def check_repaired_model(
    model: PreTrainedModel,
    partner: PreTrainedModel | None = None,
    *,
    checks: Iterable[str] | None = None,
) -> dict[str, str]:
    """Assert that a repaired model gives the same results however it decodes, is copied or saved.

    The reference is one forward pass over whole sequences without a cache.

    Args:
        model: a repaired model in float32, preferably tiny; it is not changed.
        partner: a model of the same vocabulary, to assist and be assisted; the model itself by
            default.
        checks: names from `CHECKS`; all by default.

    Returns:
        ``{check: "right"}``, or ``"refused: "`` with the message.

    Raises:
        AssertionError: a check fails; the message names it.
        ValueError: an unknown check, or not a causal language model.

    >>> from ghostlib.surgery.testing import CHECKS
    >>> list(CHECKS)[:3]
    ['dynamic cache', 'static cache', 'offloaded cache']
    """
    partner = partner or model
    for each in (model, partner):
        check_model(each)
    chosen = {name: CHECKS[name] for name in (CHECKS if checks is None else checks)}
    generator = torch.Generator().manual_seed(0)
    device, V = input_device(model), model.config.vocab_size
    prompts = [torch.randint(1, V, (n,), generator=generator).to(device) for n in _PROMPT_LENGTHS]
    subject = Subject(model, partner, prompts)
    results: dict[str, str] = {}
    with evaluating(model), evaluating(partner):
        for name, check in chosen.items():
            try:
                check(subject)
                results[name] = "right"
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            except (ValueError, NotImplementedError) as error:
                assert "\n" not in str(error), f"{name}: refused in several lines: {error}"
                results[name] = f"refused: {error}"
    return results
