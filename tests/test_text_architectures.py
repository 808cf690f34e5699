"""What transformers reads off a model's class, and what its class does in `generate`, come from the language model."""

import pytest
import torch
from families.shrink import randomised
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionConfig,
    DogeConfig,
    GPTNeoXJapaneseConfig,
    LlamaConfig,
    MiniMaxConfig,
    Phi3Config,
    Qwen3_5TextConfig,
)

from lavin import LavinConfig, LavinForConditionalGeneration, MMAConfig


VOCAB, IMAGE = 64, 28
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 2.0, 5.0, 4.0],
    "original_max_position_embeddings": 12,
}
HYBRID = {
    **SHAPE,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
TEXTS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "hybrid": lambda: Qwen3_5TextConfig(**HYBRID),
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "doge": lambda: DogeConfig(**SHAPE),
    "minimax": lambda: MiniMaxConfig(**SHAPE, num_local_experts=2, layer_types=["full_attention", "linear_attention"]),
    "longrope": lambda: Phi3Config(**SHAPE, original_max_position_embeddings=12, rope_parameters=LONG_ROPE),
}


def pair(name: str):
    """The language model alone, and a LaVIN of it."""
    text = TEXTS[name]()
    torch.manual_seed(0)
    base = randomised(AutoModelForCausalLM.from_config(text))
    config = LavinConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(image_size=IMAGE, patch_size=14, **VISION),
        vision_feature_layers=[1, 2],
        projector_hidden_size=8,
    )
    lavin = LavinForConditionalGeneration(config).eval()
    lavin.model.language_model.load_state_dict(base.base_model.state_dict())
    lavin.lm_head.load_state_dict(base.get_output_embeddings().state_dict())
    for model in (base, lavin):
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return base, lavin


def prompt(length: int = 9, rows: int = 2) -> dict:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, -3:] = ids[:, 1:4]  # something to look up
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", TEXTS)
def test_flags(name):
    base, lavin = pair(name)
    for model in (lavin, lavin.model):
        for flag in ("_is_stateful", "_can_compile_fullgraph", "supports_gradient_checkpointing", "_supports_sdpa"):
            assert getattr(model, flag) == getattr(base, flag), flag
        assert base._no_split_modules <= model._no_split_modules
    assert lavin._supports_default_dynamic_cache() == base._supports_default_dynamic_cache()


def test_flags_of_both_towers():
    """Flash attention where both can; checkpointing as the language model; another LaVIN's are its own."""
    _, lavin = pair("llama")
    config = lavin.config.to_dict()
    assert lavin._supports_flash_attn and lavin._supports_flex_attn
    alone = GPTNeoXJapaneseConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = LavinForConditionalGeneration(LavinConfig(text_config=alone, vision_config=config["vision_config"]))
    assert not model._supports_flash_attn and not model.supports_gradient_checkpointing
    with pytest.raises(ValueError, match="does not support (gradient|activation) checkpointing"):
        model.gradient_checkpointing_enable()
    assert lavin.supports_gradient_checkpointing


@pytest.mark.parametrize("arguments", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_a_hybrid_refuses_drafts(arguments):
    """Before anything is generated: the state of linear attention cannot go back to before a wrong draft."""
    base, lavin = pair("hybrid")
    if "assistant_model" in arguments:
        arguments = {"assistant_model": base}
    for model in (base, lavin):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(**prompt(rows=1), max_new_tokens=4, **arguments)


@pytest.mark.parametrize("name", ["llama", "hybrid", "bloom", "doge"])
def test_static_cache(name):
    """Its masks are made by the language model's own class, where that has a way of its own."""
    base, lavin = pair(name)
    try:
        expected = base.generate(**prompt(), max_new_tokens=5, do_sample=False, cache_implementation="static")
    except ValueError as error:
        pytest.skip(f"the base itself, in this transformers: {error}")
    got = lavin.generate(**prompt(), max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}])
def test_a_cache_of_its_own_class(arguments):
    base, lavin = pair("minimax")
    expected = base.generate(**prompt(), max_new_tokens=5, do_sample=False, **arguments)
    assert torch.equal(lavin.generate(**prompt(), max_new_tokens=5, do_sample=False, **arguments), expected)


@pytest.mark.parametrize("length", [9, 12, 13, 20])
def test_long_rope_switches_as_in_the_base(length):
    """Beyond 12 tokens all positions turn otherwise: keys of a cache that was filled before would be wrong."""
    base, lavin = pair("longrope")
    # Old transformers lose the cache there and read the last token alone.
    expected = base.generate(**prompt(length), max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(lavin.generate(**prompt(length), max_new_tokens=8, do_sample=False), expected)


def test_long_rope_with_images_and_a_kept_cache():
    """As step by step over the whole sequence, without a cache; also where a first turn's cache comes along."""
    _, lavin = pair("longrope")
    pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))
    inputs = prompt(10)
    inputs["input_ids"][:, 1:3] = lavin.config.image_token_id
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            logits = lavin(input_ids=ids, pixel_values=pixels, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(lavin.generate(**inputs, pixel_values=pixels, max_new_tokens=8, do_sample=False), ids)

    first = lavin.generate(**inputs, pixel_values=pixels, max_new_tokens=2, return_dict_in_generate=True)
    again = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    kept = first["cache"] if "cache" in first else first["past_key_values"]
    name = "cache" if "cache" in first else "past_key_values"
    more = lavin.generate(**again, pixel_values=pixels, max_new_tokens=6, do_sample=False, **{name: kept})
    assert torch.equal(more, ids)


def test_a_hybrid_is_adapted_in_every_block():
    """By default: linear attention where that stands in attention's place."""
    _, lavin = pair("hybrid")
    lavin.add_adapter(MMAConfig(), "mma")
    adapted = [layer.key for layer in lavin.model.routing.layers]
    assert adapted == ["language_model.layers.0.linear_attn", "language_model.layers.1.self_attn"]
