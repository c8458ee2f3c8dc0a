"""The parts of a causal language model, located by structure rather than by the type of model.

Most types share a structure: embeddings, one list of decoder layers, a final norm. These are
located in the tree of modules by the conventions of transformers (`get_decoder`,
`get_input_embeddings`, `get_output_embeddings`). `EXCEPTIONS` lists the types for which that is
not enough, and `REFUSED` those whose layers do not pass on a single stream.
"""

import hashlib
import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ghostlib.common import GHOSTED, checked, short_repr
from ghostlib.models.configuration import check_agreement, follow, kinds
from ghostlib.models.placement import loaded_parameters


class Structure(NamedTuple):
    """Paths of the modules of a model that this package uses.

    Attributes:
        layers: the list of decoder layers.
        receiver: the module that receives the stream after the last layer: the final norm, or the
            head of a model without one; "" if there is no such module.
        layout: the axes of the state passed from layer to layer, one letter each: batch, tokens,
            parallel streams (n), channels.
        streams: the setting with the number of parallel streams, or "" for one stream.
    """

    layers: str
    receiver: str
    layout: str = "btc"
    streams: str = ""


EXCEPTIONS: dict[str, Structure] = {
    # Its one norm is applied before the first layer as well as after the last.
    "nanochat": Structure("model.layers", ""),
    # Hyper-connections: the parallel streams of a token, concatenated, are the stream.
    "deepseek_v4": Structure("model.layers", "model.hc_head", "btnc", "hc_mult"),
    "hy_v4": Structure("model.layers", "model.hc_head", "btnc", "hc_mult"),
    # The first argument of its last module is the outputs of blocks of layers, not the stream.
    "inkling2_text": Structure("model.layers", ""),
    "qwen4_exp_text": Structure("model.layers", "model.hyper_connection_mixer", "btc", "hc_count"),
    # The computation after its last layer is inlined in the forward pass of the model.
    "gemma3n": Structure("model.language_model.layers", "", "nbtc", "altup_num_inputs"),
    "gemma3n_text": Structure("model.layers", "", "nbtc", "altup_num_inputs"),
}
"""Types that depart from the conventions."""

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
"""Types whose layers cannot be removed one by one, and the reasons."""

_STRUCTURES: WeakKeyDictionary[nn.Module, Structure] = WeakKeyDictionary()


def model_type(model: PreTrainedModel) -> str:
    """The type of ``model``, or of the dense model it was recovered from."""
    return str(model.config.model_type).removeprefix(GHOSTED)


def structure(model: PreTrainedModel) -> Structure:
    """The `Structure` of ``model``, located once.

    Raises:
        ValueError: as `check_model`.
    """
    if not isinstance(model, nn.Module) or model not in _STRUCTURES:
        check_model(model)
        _STRUCTURES[model] = EXCEPTIONS.get(model_type(model)) or _find(model)
    return _STRUCTURES[model]


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a causal language model of transformers with a single stream.

    Raises:
        ValueError: it is another object, wrapped, or of a type in `REFUSED`; the message says what
            to pass instead.
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
            f"the model is a {kind} of PEFT, whose adapters are not part of its layers: pass "
            "model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a causal language model of transformers is needed, got {short_repr(model)}: load one "
            "with load_model or AutoModelForCausalLM.from_pretrained"
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
        decoder = model  # not known to transformers
    lists = _layer_lists(decoder)
    if not lists:
        raise ValueError(
            f"no list of decoder layers was found in {type(model).__name__}: a causal language "
            "model of transformers is needed"
        )
    # Towers for images or sound are deeper in the tree.
    layers = max(lists, key=lambda p: (-p.count("."), _size(decoder.get_submodule(p))))
    parts = decoder.get_submodule(layers).modules()
    if any(vars(part).get("is_decoder") is False for part in parts):
        raise ValueError(
            f"{type(model).__name__} is an encoder, which reads the tokens that follow: a causal "
            "language model is needed (for a decoder of this type, set is_decoder=True in its "
            "configuration)"
        )
    path = _join(_path(model, decoder), layers)
    return Structure(path, _find_receiver(model, path))


def _layer_lists(module: nn.Module) -> list[str]:
    """Paths of the outermost lists of modules with parameters."""
    paths: list[str] = []
    for path, part in module.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in paths)
        if isinstance(part, nn.ModuleList) and _size(part) and not inside:
            paths.append(path)
    return paths


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _path(model: nn.Module, module: nn.Module) -> str:
    paths: dict[nn.Module, str] = {part: path for path, part in model.named_modules()}
    return paths[module]


def _join(*parts: str) -> str:
    return ".".join(filter(None, parts))


_FINAL_NORM = re.compile(r"(final_)?(layer_?)?norm|ln_f|norm_f")
_EMBEDDING_NORM = re.compile(r".*embeddings?(_layer_?norm)?$|layer_?norm_emb.*")


def _find_receiver(model: PreTrainedModel, layers: str) -> str:
    """Path of the module that receives the stream after the last layer.

    A norm next to the list of layers or to one of its parents, unless it belongs to the embeddings;
    otherwise the head, the child of the model that contains the output embeddings.
    """
    parent = layers
    while parent:
        parent = parent.rpartition(".")[0]
        if parent == "" and "." in layers:  # the top level holds the decoder and the head
            break
        norms = [
            name
            for name, child in model.get_submodule(parent).named_children()
            if re.search("norm", type(child).__name__, re.I) and not _EMBEDDING_NORM.match(name)
        ]
        if norms:
            final = [name for name in norms if _FINAL_NORM.fullmatch(name)]
            return _join(parent, (final or norms)[-1])
    return _path(model, model.get_output_embeddings()).split(".")[0]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in the order the residual stream passes them."""
    path = structure(model).layers  # raises for other objects
    layers: nn.ModuleList = model.get_submodule(path)
    return layers


def num_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers."""
    return len(decoder_layers(model))


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the residual stream; the total width of parallel streams."""
    config, streams = text_config(model), structure(model).streams
    # Remote code may have another name for it.
    width = getattr(config, "hidden_size", None) or model.get_input_embeddings().weight.shape[1]
    return int(width * (getattr(config, streams) if streams else 1))


def vocabulary(model: PreTrainedModel) -> int:
    """Number of token ids."""
    size = getattr(text_config(model), "vocab_size", None)
    return int(size or model.get_input_embeddings().weight.shape[0])


def looks_back(model: PreTrainedModel) -> bool:
    """Whether layers read more than the stream, so that a layer cannot run alone.

    Keys and values of earlier layers, indices of tokens to attend to, or outputs of earlier blocks.
    """
    config = text_config(model)
    shared = getattr(config, "num_kv_shared_layers", 0) or "shared" in (
        getattr(config, "indexer_types", None) or ()
    )
    return bool(shared or getattr(config, "n_layers_per_attn_res_block", 0))


def to_stream(state: Tensor, layout: str) -> Tensor:
    """The state that layers pass on, with axes ``layout``, as (batch, tokens, width)."""
    if layout == "btc":
        return state
    return state.movedim((layout.index("b"), layout.index("t")), (0, 1)).flatten(2)


def to_state(stream: Tensor, like: Tensor, layout: str) -> Tensor:
    """The inverse of `to_stream`, in the shape of ``like`` except for batch and tokens."""
    if layout == "btc":
        return stream
    axes = layout.index("b"), layout.index("t")
    rest = like.movedim(axes, (0, 1)).shape[2:]
    unflattened: Tensor = stream.unflatten(2, rest)
    return unflattened.movedim((0, 1), axes)


def check_index(model: PreTrainedModel, index: int) -> None:
    """Raise `ValueError` unless ``index`` lies between 0 and the number of layers."""
    last = num_layers(model)
    if not 0 <= index <= last:
        raise ValueError(f"index must lie between 0 and the number of layers {last}, got {index}")


@checked
def receiver(model: PreTrainedModel, index: int) -> nn.Module:
    """The module whose first argument is the stream at ``index``.

    Index ``l`` below the number of layers is decoder layer ``l``; the number of layers itself is
    the final norm, or the head of a model without one.

    Raises:
        ValueError: as `check_index`, or no module receives the stream after the last layer as its
            only input.
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
    """Reduce ``model``, a copy of ``original``, to the layers ``kept``, see `follow`.

    `check_layers` checks that the updated configuration describes the reduced model.
    """
    _STRUCTURES[model] = structure(original)
    follow(model, structure(original).layers, kept)


def check_layers(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """Raise unless the configuration of ``model`` describes it, after `keep_layers`.

    Raises:
        ValueError: as `check_agreement`.
    """
    depth, passed = num_layers(model), _PASSED.setdefault(original, set())
    if depth not in passed:
        check_agreement(model, structure(model).layers, original)
        if same_layers(original):  # then it does not matter which of them are removed
            passed.add(depth)


def same_layers(model: PreTrainedModel) -> bool:
    """Whether the layers differ in their numbers and weights alone, so that any can be removed."""
    return not any(layer_kinds(model))


def layer_kinds(model: PreTrainedModel) -> list[int]:
    """For each layer, the index of the first that equals it in all but its number and weights."""
    if model not in _KINDS:
        _KINDS[model] = kinds(model, structure(model).layers)
    return _KINDS[model]


_KINDS: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
# Depths for which `check_layers` has passed, of models whose layers are all of one kind.
_PASSED: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


def uncached(model: PreTrainedModel) -> dict[str, bool]:
    """Keyword arguments with which ``model`` makes no cache; none if it has no such option."""
    parameters = inspect.signature(model.forward).parameters
    keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if "use_cache" in parameters or keywords else {}


def cached(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """Keyword arguments with which ``model`` extends ``cache``."""
    # The argument has two names among the releases of transformers 5.
    parameters = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}


@checked
def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters, each in its own dtype; a tied weight counts once.

    Raises:
        ValueError: as `check_model`.
    """
    check_model(model)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def fingerprint(model: PreTrainedModel) -> str:
    """A short identifier of a model and its weights.

    It consists of the model type, its size, and a hash of the first values of every layer's
    parameters in float32, so that a copy on another device, offloaded or not, has the same one.
    """
    digest = hashlib.sha256()
    for layer in decoder_layers(model):
        for parameter in loaded_parameters(layer):
            digest.update(parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
    kind = model.config.model_type
    return f"{kind}-{num_layers(model)}x{hidden_size(model)}-{digest.hexdigest()[:12]}"


def check_origin(what: str, origin: str | None, model: PreTrainedModel) -> None:
    """Refuse, by `ValueError`, statistics of a model with another fingerprint."""
    if origin != (own := fingerprint(model)):
        raise ValueError(f"{what} collected on model {origin}, not on {own}: calibrate again")
