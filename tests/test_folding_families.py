"""
`fold` and `merge_modality` of odd attentions, and of MLPs: the same logits, or a refusal. (The attentions of all
families: `tests/test_families.py`.)
"""

import pytest
import torch
from conftest import SHAPE, VISION_SHAPE, batch, difference, fill
from peft import get_peft_model
from transformers import CONFIG_MAPPING, CLIPVisionConfig

from lavin import LavinConfig, LavinForConditionalGeneration, MMAConfig


NUMBERS = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_experts"), 4),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts", "rotary_dim"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **{"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "n_positions": 128, "is_decoder": True},
}
# Further maps read the input of their attention; its output is added to it inside; and some of the others.
QUICK = ("laguna", "afmoe", "minimax", "hrm_text", "bert", "jetmoe", "falcon")
WITH_MLP = ("llama", "qwen3", "olmo2", "phi3", "stablelm", "gpt2", "gpt_neox", "mixtral", "qwen2_moe", "falcon")


def tiny(family: str, **mma):
    """A LaVIN of a family, or a skip where these few rules do not make one."""
    try:
        known = CONFIG_MAPPING[family]().to_dict()
        text = CONFIG_MAPPING[family](**{k: v for k, v in {**SHAPE, **NUMBERS}.items() if k in known})
        vision = CLIPVisionConfig(**VISION_SHAPE)
        config = LavinConfig(
            vision_config=vision, text_config=text, projector_hidden_size=8, vision_feature_layers=[2, 4]
        )
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in LavinForConditionalGeneration(config).parameters())
        assert size < 3e6
        torch.manual_seed(0)
        model = LavinForConditionalGeneration(config).eval()
        peft = fill(get_peft_model(model, MMAConfig(**mma), adapter_name="mma")).eval()
        with torch.no_grad():
            model(**batch(model.config, (1, 0)))
    except Exception as error:
        pytest.skip(f"not built: {' '.join(str(error).split())[:100]}")
    return peft, model


CASES = [(name, False) for name in QUICK] + [(name, True) for name in WITH_MLP]


@pytest.mark.parametrize("family, mlp", CASES)
def test_folded_or_refused(family, mlp):
    peft, model = tiny(family, text_mlp=mlp)
    cases = [batch(model.config, images, side="left") for images in ((1, 0, 2), (0, 0), (1, 1))]
    with torch.no_grad():
        expected = [model(**inputs).logits for inputs in cases]
        ids, mask = cases[1]["input_ids"], cases[1]["attention_mask"].bool()
        embeds = model.get_input_embeddings()(ids)
        for number, modality in enumerate(("text", "image")):
            attached = model(inputs_embeds=embeds, attention_mask=mask.long(), modality_ids=torch.full((2,), number))
            try:
                plain = peft.merge_modality(modality)
            except ValueError as error:
                assert "keep the adapter attached" in str(error).lower()
            else:
                merged = plain(inputs_embeds=embeds, attention_mask=mask.long()).logits
                assert difference(merged[mask], attached.logits[mask]) < 1e-4
        assert all(torch.equal(model(**inputs).logits, logits) for inputs, logits in zip(cases, expected, strict=True))
        names = list(model.state_dict())
        try:
            model.fold()
        except ValueError as error:
            assert "Keep the adapter attached" in str(error) and (mlp or family not in QUICK[:4])
            assert list(model.state_dict()) == names and torch.equal(model(**cases[0]).logits, expected[0])
            return
        for inputs, logits in zip(cases, expected, strict=True):
            kept = inputs["attention_mask"].bool()
            assert difference(model(**inputs).logits[kept], logits[kept]) < 1e-4
