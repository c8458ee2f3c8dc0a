"""Architectures: where each one keeps its decoder layers, and what else must be known of it.

This is the only module that does. A supported architecture is one line in `ARCHITECTURES`; the
contract it must fulfil is one test (``tests/test_models.py``).
"""

from typing import NamedTuple

from ghostlib.registry import Registry


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
