"""Previous tokens in generation: with and without cache, in batches, padded, and by beams."""

import copy
import pickle

import pytest
import torch
from conftest import LAYERS, VOCABULARY, tiny_model, tiny_windows
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import ghostlib as gl
from ghostlib.models.architectures import cached
from ghostlib.surgery.previous import RememberingCache
from ghostlib.surgery.testing import check_repaired_model

SEVERAL = [0, 2, 3, LAYERS - 1]  # after the embeddings, between layers, before the final norm
NAME = "three-branch-relative"


def repaired(kind: str = "llama") -> PreTrainedModel:
    model = tiny_model(kind)
    return gl.recover(model, tiny_windows(6, 40), SEVERAL, NAME, relative_ridge=1e-3)


def generate(model: PreTrainedModel, ids: Tensor, **options) -> Tensor:
    defaults = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, **(defaults | options))


def padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Ids and attention mask of prompts of different lengths, padded with a real word."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), 7)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        real = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[k, real], mask[k, real] = row, 1
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Positions of tokens, padding left out."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def prompts() -> list[Tensor]:
    return [row[:n] for row, n in zip(tiny_windows(4, 14), (3, 14, 1, 9), strict=True)]


def test_the_previous_token_matters() -> None:
    model, ids = repaired(), tiny_windows(1, 6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], **cached(model, cache))
        right = model(ids[:, 5:], **cached(model, copy.deepcopy(cache))).logits
        for token in cache.last_tokens.values():
            token.zero_()
        wrong = model(ids[:, 5:], **cached(model, cache)).logits
    assert (right - wrong).abs().max() > 0.1


def test_what_padding_holds_does_not_matter() -> None:
    model = repaired()
    for side in ("left", "right"):
        ids, mask = padded(prompts(), side)
        other = torch.where(mask.bool(), ids, VOCABULARY - 1)
        with torch.no_grad():
            logits = [model(i, attention_mask=mask).logits[mask.bool()] for i in (ids, other)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_mask_as_long_as_a_static_cache_is_read_from_its_beginning() -> None:
    model = repaired()
    ids, mask = padded(prompts())
    expected = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    longer = torch.nn.functional.pad(mask, (0, 32 - mask.shape[1]))
    pieces = zip(ids.split([5, 6, 3], 1), positions(mask).split([5, 6, 3], 1), strict=True)
    parts = [
        model(piece, attention_mask=longer, position_ids=p, **cached(model, cache)).logits
        for piece, p in pieces
    ]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], rtol=1e-3, atol=1e-3)


def test_right_padding_is_skipped_by_the_next_token() -> None:
    """The mask marks the last real token, and positions continue from there."""
    model, rows = repaired(), prompts()[:2]
    ids, mask = padded(rows, "right")
    following = torch.tensor([[11], [12]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, **cached(model, cache))
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        inputs = {"attention_mask": longer, "position_ids": mask.sum(1, keepdim=True)}
        out = model(following, **inputs, **cached(model, cache)).logits
        for row, new, logits in zip(rows, following, out, strict=True):
            alone = model(torch.cat([row, new])[None]).logits[0, -1]
            torch.testing.assert_close(logits[0], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["beams", "several beams", "samples"],
)
def test_beams_and_samples_take_their_memory_along(options: dict) -> None:
    model = repaired()
    ids, mask = padded(prompts())
    generated = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        generated.append(generate(model, ids, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*generated)


def test_generations_do_not_leak_into_each_other() -> None:
    checks = [
        "dynamic cache",
        "interleaved sequences",
        "left padding",
        "saved and loaded",
        "deep copy",
    ]
    assert check_repaired_model(repaired(), checks=checks) == dict.fromkeys(checks, "right")


def test_a_cache_can_be_copied_repeated_selected_and_emptied() -> None:
    model, ids = repaired(), tiny_windows(2, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
        model(ids[:, :-1], **cached(model, cache))
        copied = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
        first = model(ids[:, -1:], **cached(model, cache)).logits
        copied.batch_repeat_interleave(2)
        copied.batch_select_indices(torch.tensor([3, 0]))
        second = model(ids[:, -1:].flip(0), **cached(model, copied)).logits.flip(0)
        cache.reset()
        third = model(ids, **cached(model, cache)).logits[:, -1:]
        for logits in (first, second, third):
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert isinstance(cache, RememberingCache) and isinstance(cache, DynamicCache)
    assert len(cache.layers) == LAYERS - len(SEVERAL) and type(cache).__mro__[2] is DynamicCache


def test_one_token_is_counted_in_the_cache() -> None:
    stateless = gl.recover(tiny_model("llama"), tiny_windows(), SEVERAL, "two-branch-relative")
    model = repaired()
    more = gl.cache_bytes(model, 9, batch_size=2) - gl.cache_bytes(stateless, 9, batch_size=2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny_windows(2, 9), **cached(model, cache))
    assert more == sum(t.numel() * t.element_size() for t in cache.last_tokens.values())
    assert gl.cache_bytes(model, 0) == 0


def test_what_cannot_be_exact_is_refused() -> None:
    model, ids = repaired(), tiny_windows(2, 8)
    with pytest.raises(RuntimeError, match="call the language model itself"):
        model.model(ids)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **cached(model, cache))
    with pytest.raises(ValueError, match="keeps one token and cannot go back"):
        cache.crop(-1)
    foreign = DynamicCache(config=model.config)
    with torch.no_grad():
        gl.prune(tiny_model("llama"), SEVERAL)(ids, **cached(model, foreign))
    with pytest.raises(ValueError, match="filled by another model; begin with an empty one"):
        model(ids[:, :1], **cached(model, foreign))
    with pytest.raises(ValueError, match="must cover the 9 tokens of cache and input, got 1"):
        model(ids[:, :1], **cached(model, cache), attention_mask=torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"attention_mask \(batch, tokens\), got \(2, 1, 8, 8\)"):
        model(ids, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match="mean packed sequences"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    with pytest.raises(ValueError, match=r"cannot go back|cache that can be cropped"):
        generate(model, ids[:1].repeat(1, 3), prompt_lookup_num_tokens=2)


def test_tuples_hidden_states_and_gradients() -> None:
    model, ids = repaired(), tiny_windows(2, 8)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
        outputs = model(ids, None, return_dict=False)
    assert torch.equal(outputs[0], expected.logits)
    model(ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if ".boundary." in name]
    assert len(gradients) == 3 and all(g is not None and g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    dense = tiny_model("llama").to(dtype)
    model = gl.recover(dense, tiny_windows(6, 40), SEVERAL, NAME, relative_ridge=1e-3)
    ids = tiny_windows(1, 12)
    assert {p.dtype for p in model.parameters()} == {dtype}
    cache, pieces = DynamicCache(config=model.config), ids.tensor_split([4, 5], dim=1)
    with torch.no_grad():
        expected = model(ids).logits
        logits = torch.cat([model(piece, **cached(model, cache)).logits for piece in pieces], 1)
    assert logits.dtype == dtype and torch.isfinite(expected).all()
    assert (logits - expected).float().norm() < 0.1 * expected.float().norm()
