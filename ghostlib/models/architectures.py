"""Where a causal language model keeps its parts, found by structure; no model is known by its name.

Published models agree on far more than their names: one list of decoder layers, a norm behind it,
embeddings before it. Those are found in the tree of modules, by the conventions of transformers
(`get_decoder`, `get_input_embeddings`, `get_output_embeddings`). `EXCEPTIONS` lists the types for
which that is not enough, and `REFUSED` those whose layers do not pass on one stream.
"""

import hashlib
import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ghostlib.common import GHOSTED, checked, told
from ghostlib.models.configuration import check_agreement, follow, kinds
from ghostlib.models.placement import loaded_parameters


class Structure(NamedTuple):
    """Where a model keeps what this package touches, as paths of modules.

    Attributes:
        layers: the list of decoder layers.
        receiver: what receives the stream after the last of them: the final norm, or the head where
            there is none.
        layout: the axes of what passes from layer to layer, one letter each: batch, tokens,
            streams side by side (n), channels.
        streams: the setting that says how many streams there are, or "" for one.
    """

    layers: str
    receiver: str
    layout: str = "btc"
    streams: str = ""


EXCEPTIONS: dict[str, Structure] = {
    # Its one norm stands before the first layer as well as behind the last.
    "nanochat": Structure("model.layers", ""),
    # Hyper-connections: the streams of a token are the stream, as wide as all of them.
    "deepseek_v4": Structure("model.layers", "model.hc_head", "btnc", "hc_mult"),
    "hy_v4": Structure("model.layers", "model.hc_head", "btnc", "hc_mult"),
    # Its last module takes what blocks of layers have returned first, and the stream beside it.
    "inkling2_text": Structure("model.layers", ""),
    "qwen4_exp_text": Structure("model.layers", "model.hyper_connection_mixer", "btc", "hc_count"),
    # What follows its last layer is spelt out in the pass of its model.
    "gemma3n": Structure("model.language_model.layers", "", "nbtc", "altup_num_inputs"),
    "gemma3n_text": Structure("model.layers", "", "nbtc", "altup_num_inputs"),
}
"""Types whose parts are not where the conventions put them; one line each."""

_LOOPS = "passes its stream through the same layers several times"
REFUSED: dict[str, str] = {
    "blt": "reads bytes in patches, through three stacks of layers of different lengths",
    "cpmant": "puts prompt tokens of its own before the stream",
    "dory": _LOOPS,
    "gemma4_assistant": "continues the hidden states of another model",
    "gemma4_unified_assistant": "continues the hidden states of another model",
    "hrm_text": _LOOPS,
    "inkling2_loop_text": _LOOPS,
    "prophetnet": "carries a stream for each token it predicts ahead",
    "reformer": "carries two streams, from which it computes the layers before backwards",
    "xlm": "keeps attention and MLP of a layer in separate lists",
    "xlnet": "carries its stream by tokens first, and a second one for what it predicts",
    "zaya": "carries a second stream, of its routers, from layer to layer",
}
"""Types that cannot be pruned layer by layer, and why."""

_STRUCTURES: WeakKeyDictionary[nn.Module, Structure] = WeakKeyDictionary()


def model_type(model: PreTrainedModel) -> str:
    """The type of ``model``, or of the dense model it was recovered from."""
    return str(model.config.model_type).removeprefix(GHOSTED)


def structure(model: PreTrainedModel) -> Structure:
    """Where ``model`` keeps its parts, found once.

    Raises:
        ValueError: something else than a causal language model of transformers, or one whose
            layers do not pass on one stream; the message says what it is.
    """
    try:
        known = _STRUCTURES.get(model)
    except TypeError:  # no module, and not even something weakly referenced
        known = None
    if known is None:
        check_model(model)
        known = EXCEPTIONS.get(model_type(model)) or _find(model)
        _STRUCTURES[model] = known
    return known


def check_model(model: Any) -> None:
    """Refuse what is no causal language model of transformers, and say what to pass instead.

    Raises:
        ValueError: it is none, or wrapped in something else.
    """
    kind = type(model).__name__
    if kind == "OptimizedModule":
        raise ValueError(
            "the model is compiled: pass the one given to torch.compile, and compile the result"
        )
    if kind in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise ValueError(
            f"the model is wrapped in {kind}: pass model.module; calibrate_distributed spreads a "
            "calibration over processes"
        )
    if any(base.__name__ == "FSDPModule" for base in type(model).__mro__):
        raise ValueError(
            f"the weights of this {kind} are spread over processes by fully_shard: load it "
            "without, and with device_map where one device is too small"
        )
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"the model is a {kind} of PEFT, whose adapters are no part of its layers: pass "
            "model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a causal language model of transformers is needed, got {told(model)}: load one with "
            "load_model or AutoModelForCausalLM.from_pretrained"
        )
    name = model_type(model)
    config = text_config(model)
    if reason := REFUSED.get(name):
        raise ValueError(f"{name} {reason}: its layers cannot be removed")
    if getattr(config, "rescale_every", 0) > 0:
        raise ValueError(
            f"{name} halves its stream every {config.rescale_every} layers, in its weights: its "
            "layers cannot be removed before it is loaded with rescale_every=0, as the same "
            "function"
        )
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        encoder = model.get_encoder()
        if encoder is not None and encoder is not model and _layer_lists(encoder):
            raise ValueError(
                f"{kind} is an encoder-decoder: a causal language model is needed, such as a Llama"
            )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{kind} has no language-model head: load it with AutoModelForCausalLM.from_pretrained"
        )


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of the text decoder: the model's own, or a part of it."""
    config: PretrainedConfig = model.config.get_text_config(decoder=True)
    return config


def _find(model: PreTrainedModel) -> Structure:
    decoder = model.get_decoder()
    if not isinstance(decoder, nn.Module) or not _layer_lists(decoder):
        decoder = model  # transformers does not know
    prefix = _path(model, decoder)
    lists = _layer_lists(decoder)
    if not lists:
        raise ValueError(
            f"no list of decoder layers was found in {type(model).__name__}: a causal language "
            "model of transformers is needed"
        )
    # Towers for images or sound are further down.
    layers = max(lists, key=lambda p: (-p.count("."), _weight(decoder.get_submodule(p))))
    parts = decoder.get_submodule(layers).modules()
    if any(vars(part).get("is_decoder") is False for part in parts):
        raise ValueError(
            f"{type(model).__name__} is an encoder, which reads the tokens that follow: a causal "
            "language model is needed (for a decoder of this type, set is_decoder=True in its "
            "configuration)"
        )
    return Structure(_join(prefix, layers), _behind(model, _join(prefix, layers)))


def _layer_lists(module: nn.Module) -> list[str]:
    """Paths of the outermost lists of modules that hold parameters."""
    found: list[str] = []
    for path, part in module.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(part, nn.ModuleList) and len(part) and _weight(part) and not inside:
            found.append(path)
    return found


def _weight(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _path(model: nn.Module, module: nn.Module) -> str:
    paths: dict[nn.Module, str] = {part: path for path, part in model.named_modules()}
    return paths[module]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


_FINAL_NORM = re.compile(r"(final_)?(layer_?)?norm|ln_f|norm_f")
_EMBEDDING_NORM = re.compile(r".*embeddings?(_layer_?norm)?$|layer_?norm_emb.*")


def _behind(model: PreTrainedModel, layers: str) -> str:
    """What receives the stream after the last layer.

    A norm beside the list of layers or in what holds it, unless it belongs to the embeddings; else
    the head, which is the part of the model that the output embeddings are in.
    """
    parent = layers
    while parent:
        parent = parent.rpartition(".")[0]
        if parent == "" and "." in layers:  # the model holds its decoder, and its head beside it
            break
        norms = [
            name
            for name, child in model.get_submodule(parent).named_children()
            if re.search("norm", type(child).__name__, re.I) and not _EMBEDDING_NORM.match(name)
        ]
        if norms:
            final = [name for name in norms if _FINAL_NORM.fullmatch(name)]
            return _join(parent, (final or norms)[-1])
    head = _path(model, model.get_output_embeddings())
    return head.split(".")[0]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in the order the residual stream passes them."""
    path = structure(model).layers
    layers: nn.ModuleList = model.get_submodule(path)
    return layers


def num_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers."""
    return len(decoder_layers(model))


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the residual stream; of all together where there are several side by side."""
    config, streams = text_config(model), structure(model).streams
    # Remote code may call it otherwise.
    width = getattr(config, "hidden_size", None) or model.get_input_embeddings().weight.shape[1]
    return int(width * (getattr(config, streams) if streams else 1))


def vocabulary(model: PreTrainedModel) -> int:
    """Number of token ids."""
    size = getattr(text_config(model), "vocab_size", None)
    return int(size or model.get_input_embeddings().weight.shape[0])


def looks_back(model: PreTrainedModel) -> bool:
    """Whether layers read more of those before them than the stream, so that none runs alone.

    Keys and values, indices of tokens to attend to, or what blocks of layers have returned.
    """
    config = text_config(model)
    shared = getattr(config, "num_kv_shared_layers", 0) or "shared" in (
        getattr(config, "indexer_types", None) or ()
    )
    return bool(shared or getattr(config, "n_layers_per_attn_res_block", 0))


def to_stream(state: Tensor, layout: str) -> Tensor:
    """What passes from layer to layer, in the order ``layout``, as (batch, tokens, width)."""
    if layout == "btc":
        return state
    return state.movedim((layout.index("b"), layout.index("t")), (0, 1)).flatten(2)


def to_state(stream: Tensor, like: Tensor, layout: str) -> Tensor:
    """The reverse of `to_stream`, in the shape of ``like`` but for the batch and the tokens."""
    if layout == "btc":
        return stream
    axes = layout.index("b"), layout.index("t")
    rest = like.movedim(axes, (0, 1)).shape[2:]
    unfolded: Tensor = stream.unflatten(2, rest)
    return unfolded.movedim((0, 1), axes)


def check_index(model: PreTrainedModel, index: int) -> None:
    """Refuse, by `ValueError`, an index that is neither of a layer nor of what comes behind."""
    last = num_layers(model)
    if not 0 <= index <= last:
        raise ValueError(f"index must lie between 0 and the number of layers {last}, got {index}")


@checked
def receiver(model: PreTrainedModel, index: int) -> nn.Module:
    """The module whose first argument is the stream at ``index``.

    Index ``l`` below the number of layers is decoder layer ``l``; the number of layers itself is
    the final norm, or the head of a model without one.

    Raises:
        ValueError: an index that is none, or nothing receives the stream after the last layer and
            nothing else.
    """
    check_index(model, index)
    layers = decoder_layers(model)
    if index < len(layers):
        return layers[index]
    path = structure(model).receiver
    if not path:
        raise ValueError(
            f"{type(model).__name__} has no module that receives the stream after its last layer "
            f"and nothing else: keep layer {len(layers) - 1}"
        )
    last: nn.Module = model.get_submodule(path)
    return last


def keep_layers(model: PreTrainedModel, kept: Sequence[int], original: PreTrainedModel) -> None:
    """Reduce ``model``, a copy of ``original``, to the layers ``kept`` and make everything agree.

    The configuration and every module's number of its layer (its place in the key-value cache)
    follow, see `ghostlib.models.configuration`. Whether a model made from that configuration would
    be the same one is for `check_layers` to find out.
    """
    _STRUCTURES[model] = structure(original)
    follow(model, structure(original).layers, kept)


def check_layers(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """Refuse ``original`` after `keep_layers` where no configuration can say what its layers are.

    Raises:
        ValueError: a model made from the configuration would differ; the message shows where.
    """
    depth, passed = num_layers(model), _PASSED.setdefault(original, set())
    if depth not in passed:
        check_agreement(model, structure(model).layers, original)
        if same_layers(original):  # then it does not matter which of them are gone
            passed.add(depth)


def same_layers(model: PreTrainedModel) -> bool:
    """Whether the layers differ in nothing but their weights, so that any of them can go."""
    return not any(layer_kinds(model))


def layer_kinds(model: PreTrainedModel) -> list[int]:
    """Of each layer, the first that differs from it in nothing but its number and weights."""
    if model not in _KINDS:
        _KINDS[model] = kinds(model, structure(model).layers)
    return _KINDS[model]


_KINDS: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
# Numbers of layers left of a model whose layers are the same that have been found to agree.
_PASSED: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


def uncached(model: PreTrainedModel) -> dict[str, bool]:
    """What to pass to ``model`` so that it makes no cache; some have no such option."""
    known = inspect.signature(model.forward).parameters
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    return {"use_cache": False} if "use_cache" in known or free else {}


def cached(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """What to pass to ``model`` so that it extends ``cache``."""
    # The cache has got another name in the course of transformers 5.
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


@checked
def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters, each in its own dtype; a tied weight counts once.

    Raises:
        ValueError: it is no model.
    """
    check_model(model)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def fingerprint(model: PreTrainedModel) -> str:
    """A short name that tells one model's activations from another's.

    Made of the model type, its size, and a hash of the first bytes of every layer's parameters in
    float32, so that a copy of the model in another place, offloaded or not, has the same one.
    """
    digest = hashlib.sha256()
    for layer in decoder_layers(model):
        for parameter in loaded_parameters(layer):
            digest.update(parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
    kind = model.config.model_type
    return f"{kind}-{num_layers(model)}x{hidden_size(model)}-{digest.hexdigest()[:12]}"


def check_origin(what: str, known: str | None, model: PreTrainedModel) -> None:
    """Refuse, by `ValueError`, statistics of a model with another fingerprint."""
    if known != (own := fingerprint(model)):
        raise ValueError(f"{what} collected on model {known}, not on {own}: calibrate again")
