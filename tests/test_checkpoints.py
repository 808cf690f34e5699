"""A LaVIN of checkpoints on the disk: every family and kind of file, both towers, a base in 4 bits."""

import pytest
import torch
from safetensors.torch import load_file
from test_folders import logits
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
)

from lavin import LavinForConditionalGeneration


TEXTS = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gpt2": GPT2Config,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["whole", "sharded", "bin"])
def test_text_checkpoints_of_every_family_from_disk(pair, tmp_path, text, tied, kind):
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    sizes |= {"n_embd": 32} if text == "gpt2" else {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    sizes |= {} if text == "gpt2" else {"num_key_value_heads": 1}
    plain = AutoModelForCausalLM.from_config(TEXTS[text](tie_word_embeddings=tied, **sizes)).eval()
    plain.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "sharded" else "1GB")
    if kind == "bin":
        tensors = {key: value for key, value in plain.state_dict().items() if not (tied and key == "lm_head.weight")}
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        (tmp_path / "model.safetensors").unlink()
    model = LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", tmp_path)
    assert model.config.image_token_id == 64
    assert torch.equal(logits(model), logits(plain))
    assert model.lm_head.weight.shape == plain.lm_head.weight.shape


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vision_checkpoints_from_disk(pair, tmp_path, kind, whole):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = {"image_size": 28, "patch_size": 14, **sizes}
    config = {"clip": CLIPConfig, "siglip": SiglipConfig}[kind](vision_config=vision, text_config=sizes)
    torch.manual_seed(1)
    source = AutoModel.from_config(config if whole else config.vision_config)
    source.save_pretrained(tmp_path)
    model = LavinForConditionalGeneration.from_vision_text_pretrained(tmp_path, pair / "text")
    tower = source.vision_model if whole else source
    assert all(torch.equal(value, model.model.vision_tower.state_dict()[key.removeprefix("vision_model.")])
               if key.removeprefix("vision_model.") in model.model.vision_tower.state_dict()
               else torch.equal(value, model.model.vision_tower.state_dict()[f"vision_model.{key}"])
               for key, value in tower.state_dict().items())  # fmt: skip


def test_four_bit_base_saves_whole_and_light(pair, tmp_path):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes' inference on a CPU wants widths of 64 and more
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "text")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = LavinForConditionalGeneration.from_vision_text_pretrained(
        pair / "vision", tmp_path / "text", mma={}, quantization_config=nf4, dtype=torch.bfloat16
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "light")
    light = AutoModel.from_pretrained(tmp_path / "light", quantization_config=nf4, dtype=torch.bfloat16)
    assert torch.equal(logits(light), wanted)
    assert {value.dtype for value in load_file(tmp_path / "light/mma/adapter_model.safetensors").values()} == {
        torch.float32
    }
    model.get_base_model().save_pretrained(tmp_path / "full", full=True)
    assert not [key for key in load_file(tmp_path / "full" / "model.safetensors") if "base_layer" in key]
    # Read as packed for a CPU's kernels and unpacked again: the last bits of bfloat16 differ.
    again = logits(AutoModel.from_pretrained(tmp_path / "full"))
    assert (again - wanted).abs().max() < 0.01
