"""The contract of every causal type of transformers, checked on a tiny random model of each.

``python tests/models/contract.py`` writes the table in docs/models.md.
"""

import copy
import multiprocessing
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import ghostlib as gl
from ghostlib.models.architectures import decoder_layers, hidden_size, structure
from ghostlib.models.layers import down_projection, embeddings, writers
from ghostlib.models.streams import record, refusal
from ghostlib.models.tiny import LAYERS, tiny_config, tiny_model

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
# In order of preference; types that compute the kind of a layer from its number need later ones.
CHOICES = ([2, 3], [1, 2], [0, 1], [3, 4], [2], [1], [LAYERS - 2, LAYERS - 1], [LAYERS - 1], [1, 3])


OUTCOMES = ("pass", "refused", "not built", "fails")
UNBUILT = {
    "gemma3n": "its tower for images needs the package timm; its text model is `gemma3n_text`",
    "gemma4_assistant": "drafts tokens from the hidden states of another model",
    "gemma4_unified_assistant": "drafts tokens from the hidden states of another model",
    "musicgen": "transformers makes no causal model of its composite configuration",
    "musicgen_melody": "transformers makes no causal model of its composite configuration",
}
"""Reasons why transformers builds no causal model from the configuration of a type."""


class Verdict(NamedTuple):
    """Result for one type.

    ``outcome`` is one of `OUTCOMES`; ``why`` the reason if it is not ``"pass"``; ``notes`` what a
    passing type lacks, or what transformers itself does not support; ``settings`` the `SETTINGS`
    with which it passes as well.
    """

    outcome: str
    why: str = ""
    notes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model in which every layer matters."""
    return tiny_model(CONFIG_MAPPING[model_type](), **changes)


def windows(count: int = 4, length: int = 24) -> Tensor:
    """Random token ids without special ids."""
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


def check(model_type: str) -> Verdict:
    """Check the contract of one type.

    Raises:
        AssertionError: it is accepted, and breaks the contract.
    """
    try:
        config = CONFIG_MAPPING[model_type]()
        with torch.device("meta"):
            structure(AutoModelForCausalLM.from_config(tiny_config(config)))
    except ValueError as error:
        if "cannot be removed" in str(error):
            return Verdict("refused", str(error))
    except Exception:
        pass  # reported below
    try:
        dense = build(model_type)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Verdict("not built", UNBUILT.get(model_type, reason))
    return Verdict("pass", "", tuple(_contract(dense)), _check_settings(model_type))


def _other_tying(config: PretrainedConfig) -> dict[str, Any]:
    tied = getattr(config, "tie_word_embeddings", None)
    return {} if tied is None else {"tie_word_embeddings": not tied}


def _other_biases(config: PretrainedConfig) -> dict[str, Any]:
    names = [n for n, v in config.to_dict().items() if n.endswith("bias") and type(v) is bool]
    return {name: not getattr(config, name) for name in names}


def _sliding_window(config: PretrainedConfig) -> dict[str, Any]:
    if getattr(config, "use_sliding_window", None) is False:  # the last layers have one
        return {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}
    no_window = config.to_dict().get("sliding_window", 8) is None
    return {"sliding_window": 8} if no_window else {}


SETTINGS: dict[str, Callable[[PretrainedConfig], dict[str, Any]]] = {
    "embeddings tied, or not where they are": _other_tying,
    "biases left out, or put in where there are none": _other_biases,
    "a sliding window": _sliding_window,
}
"""Further settings: configuration of a type → its changes; none if it has no such setting."""


def _check_settings(model_type: str) -> tuple[str, ...]:
    """Assert the core of the contract with every further setting that transformers builds."""
    passed = []
    for name, changes_of in SETTINGS.items():
        changes = changes_of(CONFIG_MAPPING[model_type]().get_text_config(decoder=True))
        if not changes:
            continue
        try:
            dense = build(model_type, **changes)
        except Exception:
            continue
        ids = windows(2, 12)
        list(check_streams(dense, ids))
        removed = first_removable(dense)
        check_pruned(dense, removed, ids)
        check_saved(gl.recover(dense, ids, removed, "ghost", relative_ridge=1e-3), ids)
        passed.append(name)
    return tuple(passed)


def first_removable(model: PreTrainedModel) -> list[int]:
    removed = next((choice for choice in CHOICES if not refusal(model, choice)), None)
    assert removed is not None, "no choice of layers can be removed"
    return removed


def _contract(dense: PreTrainedModel) -> Iterator[str]:
    """Assert the contract; yield notes."""
    ids = windows()
    logits, settings = dense(ids).logits.detach().clone(), dense.config.to_dict()
    yield from check_streams(dense, ids)
    removed = first_removable(dense)
    if removed != CHOICES[0]:
        why = refusal(dense, CHOICES[0])
        assert "cannot be removed" in why
        yield f"removes {gl.spell(removed)}, not {gl.spell(CHOICES[0])}"
    check_pruned(dense, removed, ids)
    yield from check_cost(gl.prune(dense, removed), ids)
    yield from check_selection(dense, ids)
    models = {"ghost": gl.recover(dense, ids, removed, "ghost", relative_ridge=1e-3)}
    for family, requirement in FOLDED.items():
        if refused_before_gap(requirement, dense, removed):
            yield f"no {family}"
        else:
            models[family] = gl.recover(dense, ids, removed, family)
    for name, model in models.items():
        yield from check_generation(dense, model, ids, name)
        check_saved(model, ids)
    assert torch.equal(dense(ids).logits, logits), "the dense model has changed"
    assert dense.config.to_dict() == settings, "the dense model's configuration has changed"


def refused_before_gap(
    requirement: Callable[[PreTrainedModel, int], Any], model: PreTrainedModel, removed: list[int]
) -> bool:
    """Whether a repair before the gap does not fit the model; the error must suggest another."""
    if removed[0] == 0:  # no layer before the gap
        return True
    try:
        requirement(model, removed[0] - 1)
    except ValueError as error:
        assert "use " in str(error), f"an error without a suggestion: {error}"
        return True
    return False


def _scalable(model: PreTrainedModel, index: int) -> None:
    embeddings(model)
    for layer in range(index + 1):
        writers(model, layer)


FOLDED: dict[str, Callable[[PreTrainedModel, int], Any]] = {
    "refit": down_projection,
    "magnitude": _scalable,
}


def check_streams(dense: PreTrainedModel, ids: Tensor) -> Iterator[str]:
    """Streams equal those of plain hooks, and the hidden states that transformers reports."""
    expected: dict[int, Tensor] = {}

    def hook(index: int, module: Any, args: tuple, kwargs: dict) -> None:
        assert index not in expected, f"layer {index} is passed twice"
        state = args[0] if args else kwargs["hidden_states"]
        if state.ndim == 4 and state.shape[:2] != ids.shape:  # parallel streams are the first axis
            state = torch.cat(list(state), -1)
        expected[index] = state.reshape(*ids.shape, -1).clone()

    layers = decoder_layers(dense)
    with torch.no_grad(), ExitStack() as stack:
        for index, layer in enumerate(layers):
            handle = layer.register_forward_pre_hook(partial(hook, index), with_kwargs=True)
            stack.enter_context(handle)
        reported = getattr(dense(ids, output_hidden_states=True), "hidden_states", None)
    streams = record(dense, ids, expected)
    assert all(torch.equal(streams[i], expected[i]) for i in expected)
    assert all(stream.shape == (*ids.shape, hidden_size(dense)) for stream in streams.values())
    skipped = len(layers) - len(expected)
    if skipped:
        yield f"{skipped} layer is passed by images alone"
    elif not all(map(torch.equal, reported or (), streams.values())) and len(reported) > len(
        layers
    ):
        yield "hidden_states of transformers are other streams"


# Tables with a part for each layer, of which the pruned model has a smaller copy.
TABLES = tuple(
    f"{holder}.{name}.weight"
    for holder in ("model", "model.language_model")
    for name in ("embed_tokens_per_layer", "per_layer_model_projection")
)


def check_pruned(dense: PreTrainedModel, removed: list[int], ids: Tensor) -> None:
    """Pruning bypasses layers and nothing else; ``identity`` is the same, bit for bit."""
    pruned = gl.prune(dense, removed)
    bypassed = copy.deepcopy(dense)
    for index in removed:
        bypass(decoder_layers(bypassed)[index])
    logits = pruned(ids, use_cache=False).logits
    expected = bypassed(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    identity = gl.recover(dense, ids, removed, "identity")
    assert torch.equal(pruned(ids).logits, identity(ids).logits)
    removed_ids = {id(p) for i in removed for p in decoder_layers(dense)[i].parameters()}
    dense_ids, pruned_ids = (
        {id(p) for name, p in model.named_parameters() if name not in TABLES}
        for model in (dense, pruned)
    )
    assert pruned_ids - removed_ids == dense_ids - removed_ids
    assert gl.count_parameters(pruned) == pruned.num_parameters()


def check_cost(pruned: PreTrainedModel, ids: Tensor) -> Iterator[str]:
    """Operations counted without weights are those that PyTorch counts in a pass."""
    try:
        counted = gl.flops(pruned, ids.shape[1], batch_size=len(ids), logits=ids.shape[1]).total
    except ValueError:
        yield "operations not counted without values"
        return
    pruned.set_attn_implementation("eager")
    pruned.set_experts_implementation("eager")  # fused kernels are not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pruned(ids)
    share = counted / counter.get_total_flops()
    if share != 1:
        yield f"{share:.2f} times the operations of a pass are counted"


def bypass(layer: Any) -> None:
    """Let ``layer`` return its input in place of its first output."""
    forward = layer.forward

    def transparent(*args: Any, **kwargs: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        out = forward(*args, **kwargs)
        return type(out)((stream, *out[1:])) if isinstance(out, tuple | list) else stream

    layer.forward = transparent


def check_selection(dense: PreTrainedModel, ids: Tensor) -> Iterator[str]:
    """Every criterion selects removable layers, or reports that it finds none."""
    failing = []
    for criterion in gl.CRITERIA:
        try:
            assert not refusal(dense, gl.select_layers(dense, ids[:1, :12], 1, criterion))
        except ValueError as error:
            assert "finds no" in str(error), f"{criterion}: {error}"
            failing.append(criterion)
    if failing:
        yield "criteria of single layers find none" if len(failing) > 1 else failing[0]


def check_generation(
    dense: PreTrainedModel, model: PreTrainedModel, ids: Tensor, name: str
) -> Iterator[str]:
    """The cache and padding on the left do not change generation, unless they do in ``dense``."""
    for mode, agrees in {"cached": cached_agrees, "left-padded": padded_agrees}.items():
        if not agrees(model, ids):
            assert not agrees(dense, ids), f"{name}: {mode} generation differs, and dense does not"
            yield f"{mode} generation differs in transformers too"


def cached_agrees(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether generation gives the same tokens with and without the cache."""
    options: Any = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    try:
        with_cache, without = (
            model.generate(ids[:, :8], use_cache=cache, **options) for cache in (True, False)
        )
    except Exception:
        return False
    return torch.equal(with_cache, without)


def padded_agrees(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether a sequence padded on the left in a batch has the same logits as alone."""
    batch, mask = ids[:2, :12].clone(), torch.ones(2, 12, dtype=torch.long)
    batch[1, :4], mask[1, :4] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    try:
        with torch.no_grad():
            alone = model(ids[1:2, 4:12]).logits[0]
            try:
                both = model(batch, attention_mask=mask, position_ids=positions).logits[1, 4:]
            except TypeError:  # no position_ids: positions follow the mask, or there are none
                both = model(batch, attention_mask=mask).logits[1, 4:]
    except Exception:
        return False
    return torch.allclose(alone, both, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


def check_saved(model: PreTrainedModel, ids: Tensor) -> None:
    """A saved model loads as an equal one, in float32 and in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        full, half = Path(folder) / "full", Path(folder) / "half"
        model.save_pretrained(full)
        loader: Any = AutoModelForCausalLM
        if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            loader = type(model)  # the text part of a multimodal model, unknown to Auto as well
        assert_same(loader.from_pretrained(full), model, ids)
        bfloat16 = loader.from_pretrained(full, dtype=torch.bfloat16)
        bfloat16.save_pretrained(half)
        assert_same(loader.from_pretrained(half), bfloat16, ids)


def assert_same(one: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> None:
    """The same weights, bit for bit, and the same logits, up to the rounding of a product."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        logits, expected = one(ids).logits, other(ids).logits
    scale = float(expected.abs().max()) * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(logits, expected, rtol=0, atol=16 * scale)


def table(verdicts: dict[str, Verdict]) -> str:
    """The verdicts as Markdown."""
    counts = {o: sum(v.outcome == o for v in verdicts.values()) for o in OUTCOMES}
    further = "; ".join(
        f"{name}: {sum(name in v.settings for v in verdicts.values())}" for name in SETTINGS
    )
    lines = [
        f"transformers {transformers.__version__}: of {len(verdicts)} causal types "
        f"{counts['pass']} pass, {counts['refused']} are refused, {counts['not built']} were not "
        "built.",
        "",
        f"Types that pass with another setting too – {further}.",
        "",
        "| type | outcome | notes |",
        "|---|---|---|",
    ]
    for name, verdict in sorted(
        verdicts.items(), key=lambda kv: (OUTCOMES.index(kv[1].outcome), kv[0])
    ):
        notes = verdict.why or "; ".join(dict.fromkeys(verdict.notes))
        lines.append(f"| `{name}` | {verdict.outcome} | {notes.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def verdict_of(name: str) -> tuple[str, Verdict]:
    """As `check`, with a broken contract as a verdict."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        return name, check(name)
    except Exception as error:
        return name, Verdict("fails", f"{type(error).__name__}: {error}".splitlines()[0])


def documented() -> dict[str, str]:
    """Outcomes by type in docs/models.md; empty for another version of transformers."""
    text = DOCUMENT.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" not in text:
        return {}
    return dict(re.findall(r"^\| `(.+?)` \| (.+?) \|", text, re.MULTILINE))


def main(names: list[str]) -> None:
    """Check ``names``, or all types and write the table."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        verdicts = {}
        for name, verdict in pool.map(verdict_of, names or TYPES):
            verdicts[name] = verdict
            reasons = verdict.why or "; ".join(dict.fromkeys(verdict.notes))
            print(f"{name}: {verdict.outcome}. {reasons}")
    if not names:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table(verdicts)}{END}{after}", encoding="utf-8")


BEGIN, END = "<!-- types: begin -->", "<!-- types: end -->"

if __name__ == "__main__":
    main(sys.argv[1:])
