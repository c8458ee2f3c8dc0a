"""Checks that a repaired model decodes alike in every way that transformers offers.

In the spirit of scikit-learn's estimator checks: whoever adds a repair or an architecture runs them
on a tiny model, and each way is right, or refused in one clear line.
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

_TOLERANCE = 1e-3  # of the largest logit, in float32
_QUANTISED = 0.25  # of their norm; what 8 bits for keys and values cost
_TOKENS = 12  # continued
_LENGTHS = (3, 14, 1, 9)  # of prompts


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
        """(2, tokens) of one length."""
        longest = max(self.prompts, key=len)
        return torch.stack([longest, longest.flip(0)])

    @torch.no_grad()
    def whole(self, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Logits (batch, tokens, vocabulary) of one pass without a cache."""
        if mask is not None:
            inputs["attention_mask"] = mask
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        logits: Tensor = self.model(ids, use_cache=False, **inputs).logits
        return logits

    def generate(self, *args: Any, model: PreTrainedModel | None = None, **options: Any) -> Any:
        """What `generate` gives by greedy search, whatever the text."""
        fixed = {"max_new_tokens": _TOKENS, "do_sample": False, "eos_token_id": None}
        shown = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
        return (model or self.model).generate(*args, **(fixed | shown | options))

    def follow(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> None:
        """Generate, and compare the logits of every step with one pass over what came out."""
        mask = torch.ones_like(ids) if mask is None else mask  # generate would guess at it
        out = self.generate(ids, attention_mask=mask, **options)
        longer = torch.nn.functional.pad(mask, (0, len(out.logits)), value=1)
        expected = self.whole(out.sequences, longer)[:, ids.shape[1] - 1 : -1]
        _close(torch.stack(out.logits, 1), expected)


def _close(logits: Tensor, expected: Tensor) -> None:
    assert logits.shape == expected.shape, f"{tuple(logits.shape)}, not {tuple(expected.shape)}"
    scale = float(expected.abs().max())
    off = float((logits.to(expected) - expected).abs().max())
    assert off <= _TOLERANCE * scale, f"logits are off by {off:.3g}, the largest is {scale:.3g}"


CHECKS: Registry[Callable[[Subject], None]] = Registry("check")
"""What is checked, by name; each raises `AssertionError` where the model is wrong."""


def _check(name: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    def add(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS[name] = function
        return function

    return add


# ---------------------------------------------------------------- caches


CHECKS["dynamic cache"] = lambda subject: subject.follow(subject.ids)


@_check("static cache")
def _static(subject: Subject) -> None:
    for _ in range(2):  # the second generation begins with the emptied cache of the first
        subject.follow(subject.ids, cache_implementation="static")


@_check("offloaded cache")
def _offloaded(subject: Subject) -> None:
    if input_device(subject.model).type != "cuda":
        raise NotImplementedError("transformers offloads caches from CUDA alone")
    subject.follow(subject.ids, cache_implementation="offloaded")


@_check("quantised cache")
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
    expected = subject.whole(ids)
    off = float((torch.cat(parts, 1) - expected).norm() / expected.norm())
    assert off < _QUANTISED, f"logits are {off:.0%} off"


@_check("whatever the pieces")
@torch.no_grad()
def _pieces(subject: Subject) -> None:
    ids, model = subject.ids, subject.model
    for cuts in ([5], [1, 2, 3, 9], list(range(1, ids.shape[1]))):
        cache = DynamicCache(config=model.config)
        pieces = ids.tensor_split(cuts, dim=1)
        parts = [model(piece, **cached(model, cache)).logits for piece in pieces]
        _close(torch.cat(parts, 1), subject.whole(ids))


@_check("a cache taken up again")
def _again(subject: Subject) -> None:
    first = subject.generate(subject.ids)
    held = first["cache"] if "cache" in first else first["past_key_values"]
    more = torch.cat([first.sequences, subject.ids], 1)
    subject.follow(more, **cached(subject.model, held))


@_check("sequences in turn")
@torch.no_grad()
def _interleaved(subject: Subject) -> None:
    model, texts = subject.model, [row[None] for row in subject.ids]
    steps, caches = list(texts), [DynamicCache(config=model.config) for _ in texts]
    for _ in range(6):
        for k, cache in enumerate(caches):
            logits = model(steps[k], **cached(model, cache)).logits[:, -1:]
            _close(logits, subject.whole(texts[k])[:, -1:])
            steps[k] = logits.argmax(-1)
            texts[k] = torch.cat([texts[k], steps[k]], 1)


# ---------------------------------------------------------------- ways to decode

CHECKS["assisted by another model"] = lambda subject: subject.follow(
    subject.ids[:1], assistant_model=subject.partner
)
CHECKS["prompt lookup"] = lambda subject: subject.follow(
    subject.ids[:1].repeat(1, 3), prompt_lookup_num_tokens=2
)


@_check("beams")
def _beams(subject: Subject) -> None:
    ids, mask = _padded(subject.prompts)
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        settings = {"attention_mask": mask, "output_logits": False, **options}
        cached = subject.generate(ids, use_cache=True, **settings).sequences
        plain = subject.generate(ids, use_cache=False, **settings).sequences
        assert torch.equal(cached, plain), "other tokens than without cache"


@_check("assisting another model")
def _assisting(subject: Subject) -> None:
    ids, partner = subject.ids[:1], subject.partner
    settings = {"model": partner, "attention_mask": torch.ones_like(ids)}
    assisted = subject.generate(ids, assistant_model=subject.model, **settings).sequences
    alone = subject.generate(ids, use_cache=False, **settings).sequences
    assert torch.equal(assisted, alone), "other tokens than the model alone"


@_check("chunked prefill")
def _chunked(subject: Subject) -> None:
    ids, mask = _padded(subject.prompts)
    subject.follow(subject.ids, prefill_chunk_size=3)
    subject.follow(ids, mask, prefill_chunk_size=3)


@_check("left padding")
def _left_padding(subject: Subject) -> None:
    ids, mask = _padded(subject.prompts)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        together = subject.generate(ids, attention_mask=mask, **options).sequences
        for row, prompt in zip(together, subject.prompts, strict=True):
            alone = subject.whole(torch.cat([prompt, row[ids.shape[1] :]])[None])
            expected = alone[0, len(prompt) - 1 : -1].argmax(-1)
            assert torch.equal(row[ids.shape[1] :], expected), "other tokens than a row alone"


@_check("embeddings for ids")
def _inputs_embeds(subject: Subject) -> None:
    ids = subject.ids
    embedded = subject.model.get_input_embeddings()(ids)
    out = subject.generate(inputs_embeds=embedded)
    expected = subject.whole(torch.cat([ids, out.sequences], 1))
    _close(torch.stack(out.logits, 1), expected[:, ids.shape[1] - 1 : -1])


@_check("threads")
def _threads(subject: Subject) -> None:
    prompts = [prompt[None] for prompt in subject.prompts]
    alone = list(map(subject.generate, prompts))
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(subject.generate, prompts))
    for one, expected in zip(together, alone, strict=True):
        _close(torch.stack(one.logits, 1), torch.stack(expected.logits, 1))
        assert torch.equal(one.sequences, expected.sequences), "other tokens than alone"


# ---------------------------------------------------------------- copies

CHECKS["deep copy"] = lambda subject: _same(subject, copy.deepcopy(subject.model))
CHECKS["pickle"] = lambda subject: _same(subject, pickle.loads(pickle.dumps(subject.model)))


@_check("saved and loaded")
def _saved(subject: Subject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(Path(folder) / "model")
        _same(subject, AutoModelForCausalLM.from_pretrained(Path(folder) / "model"))


@_check("resized embeddings")
def _resized(subject: Subject) -> None:
    other, words = copy.deepcopy(subject.model), subject.model.config.vocab_size
    other.resize_token_embeddings(words + 8, mean_resizing=False)
    with torch.no_grad():
        _close(other(subject.ids).logits[..., :words], subject.whole(subject.ids))


@_check("gradient checkpointing")
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


@_check("compiled")
def _compiled(subject: Subject) -> None:
    torch.compiler.reset()
    compiled: Any = torch.compile(subject.model, backend="eager")
    with torch.no_grad():
        _close(compiled(subject.ids).logits, subject.whole(subject.ids))


def _same(subject: Subject, other: PreTrainedModel) -> None:
    """Assert that ``other`` decodes as the model does."""
    again = Subject(other.eval(), subject.partner, subject.prompts)
    with torch.no_grad():
        _close(other(subject.ids).logits, subject.whole(subject.ids))
    again.follow(subject.ids)


def _padded(rows: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of prompts of different lengths, padded on the left."""
    rows = list(rows)
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, length - len(row) :], mask[k, length - len(row) :] = row, 1
    return ids, mask


@checked
def check_repaired_model(
    model: PreTrainedModel,
    partner: PreTrainedModel | None = None,
    *,
    checks: Iterable[str] | None = None,
) -> dict[str, str]:
    """Assert that a repaired model decodes alike however it is decoded, copied and stored.

    The reference is always one forward pass over whole sequences without a cache.

    Args:
        model: a repaired model in float32, best a tiny one; it is not changed.
        partner: a model of the same vocabulary, to assist and be assisted; the model itself by
            default.
        checks: names from `CHECKS`; all by default.

    Returns:
        ``{check: "right"}``, or the one line by which it was refused.

    Raises:
        AssertionError: it gives something else; the message names the check.
        ValueError: an unknown check, or no model.

    >>> from ghostlib.surgery.testing import CHECKS
    >>> list(CHECKS)[:3]
    ['dynamic cache', 'static cache', 'offloaded cache']
    """
    for each in (model, partner or model):
        check_model(each)
    chosen = {name: CHECKS[name] for name in (CHECKS if checks is None else checks)}
    generator = torch.Generator().manual_seed(0)
    place, words = input_device(model), model.config.vocab_size
    prompts = [torch.randint(1, words, (n,), generator=generator).to(place) for n in _LENGTHS]
    subject = Subject(model, partner or model, prompts)
    answers: dict[str, str] = {}
    with evaluating(model), evaluating(subject.partner):
        for name, check in chosen.items():
            try:
                check(subject)
                answers[name] = "right"
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            except (ValueError, NotImplementedError) as error:
                assert "\n" not in str(error), f"{name}: refused in several lines: {error}"
                answers[name] = f"refused: {error}"
    return answers
