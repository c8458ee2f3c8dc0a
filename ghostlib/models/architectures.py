"""Models: the parts of one, found where `ghostlib.models.architectures` says they are."""

import hashlib
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ghostlib.common import GHOSTED, Registry
from ghostlib.models.placement import loaded_parameters


class Architecture(NamedTuple):
    """Where a causal LM keeps what this package touches.

    Attributes:
        layers: the decoder layers. norm: the norm after the last of them.
        embeddings: what the stream begins with.
        writers: inside a layer, the modules whose output is added to the stream; the MLP's last.
        norm_offset: what a norm adds to its weight before it multiplies (Gemma: 1).
        norm_before: every sub-layer reads the stream through a norm, which takes its scale away.
        norm_centres: a norm takes the mean over channels away as well (LayerNorm).
    """

    layers: str
    norm: str
    embeddings: tuple[str, ...]
    writers: tuple[str, ...]
    norm_offset: float = 0.0
    norm_before: bool = True
    norm_centres: bool = False


_LLAMA_LIKE = Architecture(
    "model.layers",
    "model.norm",
    ("model.embed_tokens",),
    ("self_attn.o_proj", "mlp.down_proj"),
)
# What attention and MLP return is normalised before it is added.
_NORM_AFTER = _LLAMA_LIKE._replace(
    writers=("post_attention_layernorm", "post_feedforward_layernorm")
)

ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture",
    llama=_LLAMA_LIKE,
    mistral=_LLAMA_LIKE,
    qwen2=_LLAMA_LIKE,
    qwen3=_LLAMA_LIKE,
    gemma2=_NORM_AFTER._replace(norm_offset=1.0),
    gemma3_text=_NORM_AFTER._replace(norm_offset=1.0),
    olmo2=_NORM_AFTER._replace(norm_before=False),
    phi3=_LLAMA_LIKE,
    gpt_neox=Architecture(
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        ("gpt_neox.embed_in",),
        ("attention.dense", "mlp.dense_4h_to_h"),
        norm_centres=True,
    ),
    opt=Architecture(
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        ("self_attn.out_proj", "fc2"),
        norm_centres=True,
    ),
    gpt2=Architecture(
        "transformer.h",
        "transformer.ln_f",
        ("transformer.wte", "transformer.wpe"),
        ("attn.c_proj", "mlp.c_proj"),
        norm_centres=True,
    ),
)


def architecture(model: PreTrainedModel) -> Architecture:
    """The layout of ``model``.

    Raises:
        ValueError: an architecture without an entry in `ARCHITECTURES`.
    """
    return ARCHITECTURES[model.config.model_type.removeprefix(GHOSTED)]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in the order the residual stream passes them."""
    return attrgetter(architecture(model).layers)(model)


def num_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers."""
    return len(decoder_layers(model))


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the residual stream."""
    return model.config.hidden_size


def receiver(model: PreTrainedModel, index: int) -> nn.Module:
    """The module whose first argument is the stream at ``index``: a layer, or the final norm.

    Index ``l`` below the number of layers is decoder layer ``l``; the number of layers itself is
    the final norm.

    Raises:
        ValueError: the final norm is asked for and the model has none (OPT with post-norm).
    """
    layers = decoder_layers(model)
    if index < len(layers):
        return layers[index]
    norm = attrgetter(architecture(model).norm)(model)
    if norm is None:
        raise ValueError(
            f"{type(model).__name__} has no final norm to receive the stream after its last layer: "
            f"keep layer {len(layers) - 1}"
        )
    return norm


def mlp_output(model: PreTrainedModel, index: int) -> nn.Module:
    """The projection whose output is what layer ``index``'s MLP adds to the stream.

    Raises:
        ValueError: the architecture normalises that output, or the whole stream, before it goes on.
    """
    module = attrgetter(architecture(model).writers[-1])(decoder_layers(model)[index])
    if not isinstance(module, nn.Linear | Conv1D) or not _norm_before(model):
        raise ValueError(
            f"{model.config.model_type} normalises what its MLP returns before the next layer "
            "reads it: nothing can be folded into the MLP's last matrix; use a stream operator"
        )
    return module


def intermediate_size(model: PreTrainedModel, index: int) -> int:
    """Width of what the down-projection of layer ``index`` reads; errors as `mlp_output`."""
    module: Any = mlp_output(model, index)
    return int(module.weight.shape[1 if isinstance(module, nn.Linear) else 0])


def has_bias(model: PreTrainedModel, index: int) -> bool:
    """Whether the down-projection of layer ``index`` has a bias; errors as `mlp_output`."""
    return mlp_output(model, index).bias is not None


def embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose outputs make up the stream that enters the first layer.

    Raises:
        ValueError: the architecture's layers do not normalise what they read, so that a stream of
            another scale would change what they compute.
    """
    if not _norm_before(model):
        raise ValueError(
            f"{model.config.model_type} reads its stream without a norm: scaling it would change "
            "every layer; use an operator at the gap, such as scalar or ghost"
        )
    return [attrgetter(path)(model) for path in architecture(model).embeddings]


def writers(model: PreTrainedModel, index: int) -> list[nn.Module]:
    """The modules of layer ``index`` whose outputs are added to the stream."""
    return [attrgetter(path)(decoder_layers(model)[index]) for path in architecture(model).writers]


def scale_output(model: PreTrainedModel, module: nn.Module, factor: float) -> None:
    """Multiply what ``module`` (a projection, an embedding or a norm) returns, by new weights.

    The old parameters, which other models may share, stay as they are.

    Raises:
        ValueError: its weights are offloaded.
    """
    present(module)
    projects = isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    offset = 0.0 if projects else architecture(model).norm_offset
    for name, parameter in list(module.named_parameters(recurse=False)):
        shift = offset if name == "weight" else 0.0
        setattr(module, name, nn.Parameter((parameter + shift) * factor - shift))


def present(module: nn.Module) -> nn.Module:
    """``module``, if its weights are in memory to be folded into; `ValueError` otherwise."""
    if any(p.device.type == "meta" for p in module.parameters(recurse=False)):
        raise ValueError(
            f"the weights of a {type(module).__name__} are offloaded and cannot be folded into: "
            "load the model without offloading, or use an operator at the gap"
        )
    return module


def _norm_before(model: PreTrainedModel) -> bool:
    """Whether sub-layers read the stream through a norm (some sizes of OPT do not)."""
    return architecture(model).norm_before and getattr(model.config, "do_layer_norm_before", True)


def stream_norm(model: PreTrainedModel) -> str:
    """``"rms"`` or ``"layer"``: the norm through which every sub-layer reads the stream.

    Raises:
        ValueError: sub-layers read the stream itself.
    """
    if not _norm_before(model):
        raise ValueError(
            f"{model.config.model_type} reads its stream without a norm: a repair with n(x) or "
            "n(prev) has no ground here; use one that reads x alone, such as ghost-relative"
        )
    return "layer" if architecture(model).norm_centres else "rms"


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Reduce ``model``, in place, to the decoder layers ``kept`` and make everything agree.

    ``num_hidden_layers``, ``layer_types`` and every ``layer_idx`` (which names the layer's place in
    the key-value cache) follow.

    Raises:
        ValueError: GPT-2 with ``scale_attn_by_inverse_layer_idx``, whose layers compute with their
            index and would change when they move.
    """
    config = model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "this GPT-2 scales attention by its layer index (scale_attn_by_inverse_layer_idx): "
            "its layers cannot be moved without changing what they compute"
        )
    layers = decoder_layers(model)
    layer_types = getattr(config, "layer_types", None)
    parent_path, _, name = architecture(model).layers.rpartition(".")
    setattr(attrgetter(parent_path)(model), name, nn.ModuleList(layers[index] for index in kept))
    config.num_hidden_layers = len(kept)
    if layer_types is not None:
        config.layer_types = [layer_types[index] for index in kept]
    for position, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]


class Attention(NamedTuple):
    """One layer's attention: its module, and what sets the size of its products and its cache.

    ``window`` is the number of tokens a query can see, itself included; None where it sees all.
    """

    module: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None

    def cached(self, tokens: int) -> int:
        """How many of the last ``tokens`` have their keys and values kept for the next token."""
        return tokens if self.window is None else min(tokens, self.window - 1)


def attentions(model: PreTrainedModel) -> list[Attention]:
    """The attention of every decoder layer; it is the child that has a place in the cache."""
    config, found = model.config, []
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    for index, layer in enumerate(decoder_layers(model)):
        module: Any = next(child for child in layer.children() if hasattr(child, "layer_idx"))
        heads = config.num_attention_heads
        # A configuration may hold settings its architecture ignores; the module knows better.
        groups = getattr(module, "num_key_value_groups", 1)
        head_dim = getattr(module, "head_dim", config.hidden_size // heads)
        slides = kinds is None or kinds[index] == "sliding_attention"
        found.append(
            Attention(module, heads, heads // groups, head_dim, window if slides else None)
        )
    return found


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (…, vocabulary) of final hidden states (…, hidden), capped if the model caps them."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


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
