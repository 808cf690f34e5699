"""Whether LaVIN can be right with an architecture, against what its own causal language model gives."""

import time

import pytest
import torch
import transformers
from conftest import SHAPE, VISION_SHAPE, difference
from torch.nn.functional import linear
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from lavin import LavinConfig, LavinForConditionalGeneration
from lavin.fit_lavin import architecture, check_text, check_vision
from lavin.recipes.cli import main


RIGHT = {
    "Bloom": {},
    "Cohere": {"logit_scale": 1.0},
    "DeepseekV3": {
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        **{"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        **{"first_k_dense_replace": 1, "moe_intermediate_size": 16},
    },
    "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "FalconH1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "GPT2": {},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "GPTNeoX": {},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": None},
    "Gemma3Text": {"head_dim": 8},
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Granite": {},
    "Jamba": {"mamba_d_state": 4, "num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2},
    "Mixtral": {"num_local_experts": 4},
    "Mpt": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Olmo2": {},
    "Phi3": {},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8},
    "Qwen3Next": {
        **{"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8},
        **{
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    },
    "StableLm": {},
    "Starcoder2": {},
    "XGLM": {"ffn_dim": 48},
}
OTHERWISE = {
    "Cohere": ({"logit_scale": 0.5}, "more than one linear map"),
    "FalconH1": ({**RIGHT["FalconH1"], "lm_head_multiplier": 0.5}, "more than one linear map"),
    "Gemma2": ({"head_dim": 8, "final_logit_softcapping": 1.0}, "more than one linear map"),
    "Gemma3Text": ({"head_dim": 8, "final_logit_softcapping": 1.0}, "more than one linear map"),
    "Granite": ({"logits_scaling": 4.0}, "more than one linear map"),
    "GPTJ": ({"rotary_dim": 4}, "has a bias"),
    "CodeGen": ({"rotary_dim": 4}, "has a bias"),
    "Phi": ({}, "has a bias"),
    "ModernBertDecoder": ({"decoder_bias": False}, "more than one linear map"),
    "Bert": ({"is_decoder": True}, "has a bias"),
    "OPT": ({"ffn_dim": 48, "word_embed_proj_dim": 16}, "a width of 16"),
    "Bart": ({}, "not built on BartModel"),
    "Mamba": ({"state_size": 4}, "past_key_values|in place of keys and values"),  # by the version of transformers
    "Rwkv": ({"attention_hidden_size": 32}, "past_key_values"),
    "Gemma3nText": ({"num_kv_shared_layers": 0}, "read the ids"),
}


def config_of(family: str, extra: dict):
    return getattr(transformers, f"{family}Config")(**{**SHAPE, "num_hidden_layers": 2, **extra})


def own_model(config):
    torch.manual_seed(0)
    own = architecture(AutoModelForCausalLM, config)(config).eval()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(std=0.2)
    return own


@torch.no_grad()
def error_of_lavin(own) -> float:
    """How far one linear map on what the base makes of embedded ids is from the architecture's own logits."""
    ids = torch.randint(3, 60, (2, 7))
    base = architecture(AutoModel, own.config)(own.config).eval()
    base.load_state_dict(own.base_model.state_dict())
    states = base(inputs_embeds=base.get_input_embeddings()(ids)).last_hidden_state
    return difference(own(ids).logits, linear(states, own.get_output_embeddings().weight))


@pytest.mark.parametrize("family", RIGHT)
def test_an_architecture_that_is_taken_is_right(family, tmp_path):
    """Written by its own class and read as a LaVIN: no tensor differs, and no bit of the logits."""
    config = config_of(family, RIGHT[family])
    check_text(config)
    own = own_model(config)
    assert error_of_lavin(own) < 1e-5
    own.save_pretrained(tmp_path / "text")
    CLIPVisionModel(CLIPVisionConfig(**VISION_SHAPE)).save_pretrained(tmp_path / "vision")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    model = LavinForConditionalGeneration.from_vision_text_pretrained(tmp_path / "vision", tmp_path / "text").eval()
    same_tensors(own.base_model, model.model.language_model)
    assert torch.equal(own.get_output_embeddings().weight, model.lm_head.weight)
    ids = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", OTHERWISE)
def test_an_architecture_that_does_more_is_refused(family):
    extra, reason = OTHERWISE[family]
    config = config_of(family, extra)
    with pytest.raises(
        ValueError, match=rf"no language model for a LaVIN \(its type is {config.model_type}\).*{reason}"
    ):
        check_text(config)
    if reason == "more than one linear map":  # and rightly so
        assert error_of_lavin(own_model(config)) > 1e-3


def test_a_quantised_language_model_is_refused():
    config = config_of("Llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(ValueError, match="is quantised already; name the one it was made from"):
        check_text(config)


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and not [name for name in a if not torch.equal(a[name], b[name])]


def test_a_pair_is_refused_before_anything_is_written(tmp_path, capsys):
    config = config_of("FalconH1", OTHERWISE["FalconH1"][0])
    own_model(config).save_pretrained(tmp_path / "text")
    CLIPVisionModel(CLIPVisionConfig(**VISION_SHAPE)).save_pretrained(tmp_path / "vision")
    pair = tmp_path / "vision", tmp_path / "text"
    with pytest.raises(ValueError, match="FalconH1ForCausalLM does more than one linear map"):
        LavinForConditionalGeneration.from_vision_text_pretrained(*pair)
    # A folder that was written before: its base's numbers were wrong all the time.
    folder = tmp_path / "lavin"
    config = LavinConfig(vision_config=CLIPVisionConfig(**VISION_SHAPE), text_config=config)
    LavinForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(ValueError, match="FalconH1ForCausalLM does more than one linear map"):
        LavinForConditionalGeneration.from_pretrained(folder)
    arguments = ["init", "--vision", str(pair[0]), "--text", str(pair[1]), "--output", str(tmp_path / "new")]
    assert main(arguments) == 2
    assert "does more than one linear map" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_large_architecture_takes_a_moment():
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256
    )
    start = time.process_time()
    check_text(config)
    assert time.process_time() - start < 5


UNFIT_TOWERS = {
    "ViTMAE": ({}, "draws random numbers"),
    "PixtralVision": ({}, "of two images"),
    "Siglip2Vision": ({}, "no `image_size`|has no tower"),
    "ResNet": ({}, "no `image_size`"),
    "ConvNext": ({}, "no `hidden_size`"),
    "Swin": ({"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}, "one stack|blocks give"),
    "VideoMAE": (
        {"image_size": 32, "num_hidden_layers": 1, "hidden_size": 12, "num_attention_heads": 1},
        "pixels alone",
    ),
}


@pytest.mark.parametrize("family", UNFIT_TOWERS)
def test_a_tower_that_cannot_be_read_is_refused(family):
    extra, reason = UNFIT_TOWERS[family]
    config = getattr(transformers, f"{family}Config")(**extra)
    with pytest.raises(ValueError, match=rf"no vision tower for a LaVIN \(its type is .*({reason})"):
        check_vision(config)
