"""Tiny models: a configuration of any type with small sizes and all kinds of layers.

The structure of a type does not depend on its sizes, so six layers and a few thousand random
parameters are enough to test it.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

LAYERS, WIDTH, VOCABULARY = 6, 32, 97

# Sizes by the name of their setting; the first pattern that matches the full name applies.
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*_token_(id|index)", -1),
    (r".*vocab(ulary)?_size(_per_layer_input)?|n_words|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"vocab_offset", 40),
    (r"(num_hidden|n|num|num_decoder|num_encoder|decoder|encoder)_layers?|num_blocks", LAYERS),
    (
        r"num_layers_per_stack|depth|num_global_layers|conf_num_hidden_layers|n_(in|out)put_layers",
        2,
    ),
    (r"loop_layer_index_start|num_kv_shared_layers|attn_layer_offset|.*layer_period", 2),
    (r"loop_layer_index_end", 4),
    (r".*(num|n)_((de|en)coder_|mamba_|value_)?(attention_)?heads?|.*attention_heads", 4),
    (r".*num_key_value_heads|num_kv_heads|linear_num_key_heads|num_query_groups", 2),
    (r"mamba_(d_head|headdim|head_dim)|index_topk", 16),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_head_dim", 12),
    (r".*head_dim|dim_head|d_kv|kv_channels|attention_head_size|d_head", 8),
    (r"(q|kv|o)_lora_rank|.*(adapter|gated_norm|laurel|loop_gate)_rank|hc_lowrank|d_rel", 8),
    (r"mamba_d_ssm", 64),
    (r"mamba_d_state|(ssm_)?state_size|(mamba_|attention_)?chunk_size|.*chunk_length", 8),
    (r"mamba_dt_rank|time_step_rank|index_block_size", 4),
    (r"n_groups|mamba_n_groups|o_groups", 2),
    (r"n_group|topk_group|num_expert_group|.*shared_experts|num_random_blocks", 1),
    (r".*experts_per_tok(en)?|moe_(topk|k)|index_topk_blocks|cross_attn_k", 2),
    (r"(.*_)?num_(local_)?experts|n_routed_experts|zero_expert_num", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"moe_layer_end_index", LAYERS - 1),
    (
        r"d_inner|.*(intermediate|inner|ffn|ff|mlp|feed_forward)_(size|dim).*|(d_?|dim_)ff|n_inner",
        48,
    ),
    (r".*ffn_hidden_size", 48),
    (r".*hidden_size.*|.*embedding_size|.*embed_dim|(emb_|embedding_)?dim", WIDTH),
    (
        r"n_embd|d_model|lru_width|.*((in|out)put|adapter_(in|out)|proj)_dim|adapter_input_size",
        WIDTH,
    ),
    (r"(.*_)?(sliding|attention|keep)_window(_size)?|window_size", 8),
    (r"local_attention(_window_len)?|max_window_layers|query_pre_attn_scalar|num_centroids", 8),
    (r"(max|n)_position(s|_embeddings)|model_max_length|context_length", 256),
    (r"max_seq_len|n_ctx|original_max_position_embeddings|rel_extent|max_.*_positions", 128),
    (r"image_size|crop_size", 28),
    (r"ngram_vocab_size_base", 50),
    (r"split_ngram_parts|heads_per_ngram|make_ngram_vocab_size_divisible_by", 2),
    (r"block_multiple_of|ffn_round_up_to_multiple_of", 8),
    (r"num_codebooks|num_quantizers", 2),
)
_TEXT = ("text_config", "decoder", "decoder_config", "llm_config")
_ALTERNATING = ["linear_attention", "full_attention"] * (LAYERS // 2)
_NEMOTRON = ["linear_attention", "full_attention", "moe", "mlp", "full_attention", "moe"]
# Settings that a type needs where its defaults are missing or do not fit small sizes.
_NEEDS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "bamba": {"attn_layer_indices": [1, 4]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "deepseek_v4": {
        "head_dim": 8,
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            for kind in ("main", "compress")
        },
    },
    "dory": {"n_recurrent_layers": 2},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2},
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 2},
    "inkling2_text": {"n_layers_per_attn_res_block": 6},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_offset": 1, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"head_dim": 16},
    "mllama_text_model": {"cross_attention_layers": [3]},
    "nemotron_h": {"layers_block_type": _NEMOTRON},
    "olmo_hybrid": {"layer_types": _ALTERNATING},
    "qwen3_5_moe_text": {"layer_types": _ALTERNATING},
    "qwen3_5_text": {"layer_types": _ALTERNATING},
    "qwen3_next": {"layer_types": _ALTERNATING},
    "qwen4_exp_text": {
        "layer_types": _ALTERNATING,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "rwkv": {"rescale_every": 0},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 3,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 3,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [2, 5],
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
    },
}


def tiny_config(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """``config`` with small sizes, and the same kinds of layers, norms, biases and so on.

    Args:
        config: of any causal language model; it is not changed.
        changes: settings of the result, or of its text model if there are several.
    """
    return type(config)(**_shrink(config.to_dict(), changes))


def tiny_model(config: PretrainedConfig, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of `tiny_config`, with random weights large enough for every layer to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(config, **changes)).eval()
        ids = torch.arange(3, 19)[None]
        for scale in (0.25, 0.08):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(std=scale)
                if torch.isfinite(model(input_ids=ids).logits).all():
                    break
    return model


def _shrink(settings: Mapping[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    depths = {settings.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers")}
    small: dict[str, Any] = {}
    wrapper = any(isinstance(settings.get(name), Mapping) for name in _TEXT)
    for name, value in settings.items():
        if isinstance(value, Mapping) and "model_type" in value:
            small[name] = _shrink(value, changes if name in _TEXT else {})
        elif name in ("rope_parameters", "rope_scaling"):
            small[name] = _plain_rope(value)
        elif name == "per_layer_config" and value:
            small[name] = {k: _shrink_layer(v) for k, v in value.items() if int(k) < LAYERS}
        elif name in _UNSET and value is None:
            small[name] = _UNSET[name]
        elif type(value) is int and value >= 0:
            small[name] = _small(name, value)
        elif isinstance(value, list) and len(value) in depths - {None, 0}:
            small[name] = value[:LAYERS]
        else:
            small[name] = value
    if settings.get("qk_rope_head_dim"):  # latent attention: every head has keys of its own
        small |= {"num_key_value_heads": 4, "head_dim": small["qk_rope_head_dim"]}
    for name in ("transformers_version", "architectures", "dtype", "torch_dtype"):
        small.pop(name, None)
    if "is_decoder" in small:
        small["is_decoder"] = True
    small |= _NEEDS.get(settings.get("model_type", ""), {})
    return small if wrapper else small | changes


def _shrink_layer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a single layer."""
    small = {k: _small(k, v) if type(v) is int else v for k, v in settings.items()}
    if "qk_nope_head_dim" in small:
        small |= {"head_dim": 12, "num_key_value_heads": 4}
    return small


# Sizes whose default of None is derived from others.
_UNSET = {"head_dim": 8, "num_key_value_heads": 2}


def _small(name: str, value: int) -> int:
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            if size == -1:
                return value % VOCABULARY
            return value if value < 2 else size
    return value


def _plain_rope(value: Any) -> Any:
    """Rotary settings without lists that depend on the width of a head."""
    if not isinstance(value, Mapping):
        return value
    if any(isinstance(inner, Mapping) for inner in value.values()):
        return {name: _plain_rope(inner) for name, inner in value.items()}
    kept = {k: v for k, v in value.items() if k not in ("rope_type", "type", "factor")}
    kept = {k: v for k, v in kept.items() if not isinstance(v, list) or k == "mrope_section"}
    return {"rope_type": "default", **kept}
