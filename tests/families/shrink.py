"""Tiny random models of every family of the installed transformers, made from its default configuration by rule."""

import dataclasses
import re

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)


WIDTH, HEADS, HEAD, VOCAB, LENGTH, WINDOW = 32, 4, 8, 96, 128, 8

# What a whole number becomes, by the name of its field; the first that matches. None keeps it.
RULES = [
    (r"(pad|bos|eos|sep|cls|mask|unk|decoder_start)_token_id", None),
    (r".*vocab_size.*|vocab", VOCAB),
    (r"(num_)?(hidden_|decoder_|encoder_)?layers?|n_layers?|num_blocks|depth", "layers"),
    (r".*(num_key_value_heads|n_kv_heads|num_kv_heads|num_key_value_head|n_head_kv)", "kv"),
    (r".*(attention_heads|n_heads?|num_heads|num_attention_head)|heads", HEADS),
    (r".*(n_groups?|ngroups|topk_group|n_group)", 1),
    (r".*(head_dim|headdim|d_head|head_size|rotary_dim)", HEAD),
    (r".*(intermediate_size|ffn_dim|n_inner|ffn_hidden_size|d_ff|dim_ff|dff|inner_dim|hidden_dim)", 48),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|width|embed_proj_dim)|dim", WIDTH),
    (r".*(experts_per_tok|experts_per_token|moe_top_?k|top_?k_experts|num_selected_experts|moe_topk)|moe_k|top_k", 2),
    (r".*(num_|n_)(local_|routed_|shared_)?experts?|moe_num_experts", 4),
    (r".*lora_rank", 16),
    (r".*(max_position_embeddings|n_positions|n_ctx|seq_length|max_seq_len|max_seq_length|max_length)", LENGTH),
    (r".*(sliding_window|window_size|chunk_size|window)(_size)?", WINDOW),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r".*d_state|.*state_size|.*ssm_state.*", HEAD),
]
# What no rule can guess.
TEXT_HINTS = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {"hidden_size": WIDTH, "num_attention_heads": HEADS, "encoder_hash_byte_group_vocab": VOCAB},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots3_note_text": {
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": HEAD,
        "qk_rope_head_dim": HEAD,
        "v_head_dim": HEAD,
        "head_dim": HEAD,
    },
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 2 * HEAD},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": VOCAB,
        "hc_lowrank": HEAD,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0, "num_heads": 2},
    "zamba": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "mamba", "hybrid", "hybrid"],
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},
}
TOWER_HINTS = {}
# What stands before the blocks' attention, where LaVIN asks for it (`target_modules`).
TEXT_TARGETS = {
    "dbrx": "norm_attn_norm.attn",
    "nemotron_h": "mixer",
    "recurrent_gemma": "temporal_block",
    "zamba": "(mamba|mamba_decoder.mamba)",
    "zamba2": "(mamba|mamba_decoder.mamba)",
}
PATTERNS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_layers")
DEPTH = RULES[2][0]


def read(config, name: str):
    """A field's value; None where a heterogeneous configuration has no single one."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def fields_of(config: PreTrainedConfig) -> dict:
    return {f.name: read(config, f.name) for f in dataclasses.fields(type(config)) if f.init}


def rows_of_layers(config: PreTrainedConfig, given: dict, depth: int | None) -> tuple[dict, int]:
    """What is listed for each layer, cut down to a few layers that have every kind; and their number."""

    def is_pattern(value):
        listed = depth and isinstance(value, list | tuple) and len(value) == depth and value != list(range(depth))
        return listed and all(isinstance(x, str | int | bool) for x in value)

    fields = {name: list(value) for name, value in given.items() if is_pattern(value)}
    computed = {name: list(read(config, name)) for name in PATTERNS if is_pattern(read(config, name))}
    if fields:
        rows = list(zip(*fields.values(), strict=True))
        order = list(dict.fromkeys(rows))
        order = order * 2 if len(order) == 1 else order
        return {name: [row[i] for row in order] for i, name in enumerate(fields)}, len(order)
    if computed:
        rows = list(zip(*computed.values(), strict=True))
        first = {row: i for i, row in reversed(list(enumerate(rows)))}
        return {}, max(2, max(first.values()) + 1)
    return {}, 2


def shrunken(config_class: type, hints: dict | None = None, fill: bool = False) -> PreTrainedConfig:
    """
    A tiny configuration: the defaults, with small numbers in place of large ones.

    Args:
        config_class (`type`): of a family.
        hints (`dict`, *optional*): values that no rule finds.
        fill (`bool`): whether numbers that are not given by default are given too.
    """
    default, hints = config_class(), dict(hints or {})
    given = fields_of(default)
    depth = next((v for k, v in given.items() if re.fullmatch(DEPTH, k) and isinstance(v, int)), None)
    values, layers = rows_of_layers(default, given, depth)
    layers = hints.get("num_hidden_layers", len(next((v for k, v in hints.items() if k in PATTERNS), [])) or layers)
    heads = next((v for k, v in given.items() if re.fullmatch(RULES[4][0], k) and isinstance(v, int)), None)
    for name, value in given.items():
        if name in values:
            continue
        if isinstance(value, PreTrainedConfig):
            values[name] = shrunken(type(value), fill=fill)
        elif isinstance(value, float) and re.search("drop", name):
            values[name] = 0.0
        elif name in ("image_size", "patch_size") and isinstance(value, list | tuple):
            values[name] = [dict(RULES)[name]] * len(value)
        elif value == 1.0 and isinstance(value, float) and re.search("multiplier|scale|scaling", name):
            values[name] = 0.75  # so that a factor that is left out shows
        elif (isinstance(value, int) and not isinstance(value, bool) and value > 0) or (fill and value is None):
            small = next((small for pattern, small in RULES if re.fullmatch(pattern, name)), None)
            if small == "layers":
                small = layers
            elif small == "kv":
                small = HEADS if value in (heads, None) else min(value, 2)
            if small is not None:
                values[name] = small
    values.update((k, v) for k, v in SPECIALS.items() if k in given)
    values.update(hints)
    return config_class(**values)


SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True}


def tiny(config_class: type, hints: dict | None = None, build=AutoModelForCausalLM.from_config) -> PreTrainedConfig:
    """
    The first tiny configuration from which transformers builds a model.

    Raises:
        `Exception`: transformers' own, where it builds none.
    """
    first = None
    for fill in (False, True):
        try:
            config = shrunken(config_class, hints, fill)
            with torch.device("meta"):
                build(config)
            return config
        except Exception as error:
            first = first or error
    raise first


def text_families() -> list[str]:
    """Every family that transformers has a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tower_families(names=MODEL_MAPPING_NAMES) -> list[str]:
    """
    Of these families every one that is a vision tower by its configuration: one encoder (what is made of several is
    found by its parts) of images in patches or of a known size, or one that transformers classifies images with.
    """
    known = {*MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *MODEL_FOR_BACKBONE_MAPPING_NAMES}
    found = []
    for name in names:
        config = CONFIG_MAPPING[name]
        has = {field.name for field in dataclasses.fields(config)}
        whole = not config.sub_configs or {"image_size", "hidden_size"} <= has
        sees = has & {"image_size", "patch_size"} and name not in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES
        if whole and "vocab_size" not in has and (sees or name in known):
            found.append(name)
    return sorted(found)


@torch.no_grad()
def randomised(model, seed: int = 0):
    """Large weights, so that every part of a model matters to its output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.2)
            else:
                parameter.add_(noise * 0.1)
    return model.eval()
