"""The token before, in generation: with and without cache, in batches, padded, and by beams."""

import copy
import inspect
import pickle

import pytest
import torch
from conftest import LAYERS, VOCABULARY, tiny_model, tiny_windows
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

import ghostlib as gl
from ghostlib.surgery.previous import RememberingCache

SEVERAL = [0, 2, 3, LAYERS - 1]  # behind the embeddings, between layers, before the final norm
NAME = "three-branch-relative"


def repaired(kind: str = "llama") -> PreTrainedModel:
    model = tiny_model(kind)
    return gl.recover(model, tiny_windows(6, 40), SEVERAL, NAME, relative_ridge=1e-3)


def into(cache: DynamicCache) -> dict[str, DynamicCache]:
    """A cache, by the name that transformers 5 has given it of late or the one before."""
    names = inspect.signature(LlamaForCausalLM.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def continued(model: PreTrainedModel, ids: Tensor, **options) -> Tensor:
    defaults = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, **(defaults | options))


def padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Ids and attention mask of prompts of different lengths, padded with a real word."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), 7)
    mask = torch.zeros_like(ids)
    for row, (i, m) in zip(rows, zip(ids, mask, strict=True), strict=True):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        i[where], m[where] = row, 1
    return ids, mask


def prompts() -> list[Tensor]:
    return [row[:n] for row, n in zip(tiny_windows(4, 14), (3, 14, 1, 9), strict=True)]


@torch.no_grad()
def token_by_token(model: PreTrainedModel, ids: Tensor, cuts: list[int]) -> Tensor:
    """Logits of all tokens, fed in pieces that begin at ``cuts``."""
    cache, parts = DynamicCache(config=model.config), []
    for piece in ids.tensor_split(cuts, dim=1):
        parts.append(model(piece, **into(cache), use_cache=True).logits)
    return torch.cat(parts, 1)


def test_the_token_before_matters() -> None:
    """Without its memory a boundary goes wrong."""
    model, ids = repaired(), tiny_windows(1, 6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], **into(cache))
        right = model(ids[:, 5:], **into(copy.deepcopy(cache))).logits
        for token in cache.last_tokens.values():
            token.zero_()
        wrong = model(ids[:, 5:], **into(cache)).logits
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
    whole = model(ids, attention_mask=mask, position_ids=places(mask)).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    longer = torch.nn.functional.pad(mask, (0, 32 - mask.shape[1]))
    pieces = zip(ids.split([5, 6, 3], 1), places(mask).split([5, 6, 3], 1), strict=True)
    parts = [
        model(piece, attention_mask=longer, position_ids=where, **into(cache)).logits
        for piece, where in pieces
    ]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-3, atol=1e-3)


def places(mask: Tensor) -> Tensor:
    """Positions of tokens, padding left out."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def test_right_padding_is_skipped_by_the_next_token() -> None:
    """The mask says which token was the last real one, and positions go on from there."""
    model, rows = repaired(), prompts()[:2]
    ids, mask = padded(rows, "right")
    following = torch.tensor([[11], [12]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, **into(cache))
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        places = mask.sum(1, keepdim=True)
        out = model(following, attention_mask=longer, **into(cache), position_ids=places).logits
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
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        how = {"attention_mask": mask, "use_cache": use_cache, **options}
        found.append(continued(model, ids, **how))
    assert torch.equal(*found)


def test_generations_do_not_leak_into_each_other(tmp_path) -> None:
    model, (one, other) = repaired(), tiny_windows(2, 8)[:, None]
    expected = [continued(model, ids) for ids in (one, other)]
    continued(model, torch.cat([one, other]))
    assert torch.equal(continued(model, one), expected[0])
    # two generations in turn, each with its cache
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    texts = [one, other]
    steps = [one, other]
    with torch.no_grad():
        for _ in range(12):
            for k in range(2):
                logits = model(steps[k], **into(caches[k])).logits
                steps[k] = logits[:, -1:].argmax(-1)
                texts[k] = torch.cat([texts[k], steps[k]], 1)
    assert torch.equal(texts[0], expected[0]) and torch.equal(texts[1], expected[1])
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(continued(again, one), expected[0])
    assert torch.equal(continued(copy.deepcopy(model), one), expected[0])


def test_a_cache_can_be_copied_repeated_selected_and_emptied() -> None:
    model, ids = repaired(), tiny_windows(2, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
        model(ids[:, :-1], **into(cache))
        spare = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
        first = model(ids[:, -1:], **into(cache)).logits
        spare.batch_repeat_interleave(2)
        spare.batch_select_indices(torch.tensor([3, 0]))
        second = model(ids[:, -1:].flip(0), **into(spare)).logits.flip(0)
        for logits in (first, second):
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        cache.reset()
        torch.testing.assert_close(
            model(ids, **into(cache)).logits[:, -1:], expected, rtol=1e-3, atol=1e-3
        )
    assert isinstance(cache, RememberingCache) and isinstance(cache, DynamicCache)
    assert len(cache.layers) == LAYERS - len(SEVERAL) and type(cache).__mro__[2] is DynamicCache


def test_one_token_is_counted_in_the_cache() -> None:
    stateless = gl.recover(tiny_model("llama"), tiny_windows(), SEVERAL, "two-branch-relative")
    model = repaired()
    more = gl.cache_bytes(model, 9, batch_size=2) - gl.cache_bytes(stateless, 9, batch_size=2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny_windows(2, 9), **into(cache))
    held = cache.last_tokens.values()
    assert more == sum(t.numel() * t.element_size() for t in held)
    assert gl.cache_bytes(model, 0) == 0


def test_what_cannot_be_exact_is_refused() -> None:
    model, ids = repaired(), tiny_windows(2, 8)
    with pytest.raises(RuntimeError, match="call the language model itself"):
        model.model(ids)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **into(cache))
    with pytest.raises(ValueError, match="keeps one token and cannot go back"):
        cache.crop(-1)
    foreign = DynamicCache(config=model.config)
    with torch.no_grad():
        gl.prune(tiny_model("llama"), SEVERAL)(ids, **into(foreign))
    with pytest.raises(ValueError, match="filled by another model; begin with an empty one"):
        model(ids[:, :1], **into(foreign))
    with pytest.raises(ValueError, match="must cover the 9 tokens of cache and input, got 1"):
        mask = torch.ones(2, 1)
        model(ids[:, :1], **into(cache), attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask \(batch, tokens\), got \(2, 1, 8, 8\)"):
        model(ids, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match="mean packed sequences"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    with pytest.raises(ValueError, match=r"cannot go back|cache that can be cropped"):
        continued(model, ids[:1].repeat(1, 3), prompt_lookup_num_tokens=2)


def test_tuples_hidden_states_and_gradients() -> None:
    model, ids = repaired(), tiny_windows(2, 8)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
        found = model(ids, None, return_dict=False)
    assert torch.equal(found[0], expected.logits)
    model(ids, labels=ids).loss.backward()
    moved = [p.grad for name, p in model.named_parameters() if ".boundary." in name]
    assert len(moved) == 3 and all(g is not None and g.any() for g in moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    dense = tiny_model("llama").to(dtype)
    model = gl.recover(dense, tiny_windows(6, 40), SEVERAL, NAME, relative_ridge=1e-3)
    ids = tiny_windows(1, 12)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        whole = model(ids).logits
    pieces = token_by_token(model, ids, [4, 5])
    assert pieces.dtype == dtype and torch.isfinite(whole).all()
    assert (pieces - whole).float().norm() < 0.1 * whole.float().norm()
