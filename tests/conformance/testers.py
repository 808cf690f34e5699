"""Tiny LaVIN and tiny LLaVA for the common suites: the same towers, the same texts, each its own image tokens."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from lavin import LavinConfig, LavinForConditionalGeneration, LavinModel


TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 96,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 32,
}
IMAGE_TOKEN = 0  # within the vocabulary: the suites look up every id in the embedding


class Tester:
    """What the common suites ask of a model's tester."""

    vocab_size, hidden_size, pad_token_id = TEXT["vocab_size"], TEXT["hidden_size"], TEXT["pad_token_id"]
    num_hidden_layers, num_attention_heads = TEXT["num_hidden_layers"], TEXT["num_attention_heads"]
    text_config, vision_config = TEXT, VISION
    batch_size, num_channels, image_size = 3, 3, VISION["image_size"]
    is_training = True
    num_image_tokens: int
    config_class = base_model_class = causal_lm_class = None

    def __init__(self, parent=None):
        self.parent = parent
        self.seq_length = self.encoder_seq_length = self.num_image_tokens + 7

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = torch.randint(1, TEXT["pad_token_id"], (self.batch_size, self.seq_length))
        input_ids[:, : self.num_image_tokens] = config.image_token_id
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size, self.num_channels, self.image_size, self.image_size),
        }
        return config, inputs


class LavinTester(Tester):
    config_class, base_model_class, causal_lm_class = LavinConfig, LavinModel, LavinForConditionalGeneration
    num_image_tokens = 2  # one for each of two taps

    def get_config(self):
        text, vision = LlamaConfig(**TEXT), CLIPVisionConfig(**VISION)
        return LavinConfig(
            vision_config=vision,
            text_config=text,
            projector_hidden_size=8,
            vision_feature_layers=[1, 2],
            image_token_id=IMAGE_TOKEN,
        )


class LlavaTester(Tester):
    config_class, base_model_class, causal_lm_class = LlavaConfig, LlavaModel, LlavaForConditionalGeneration
    num_image_tokens = (VISION["image_size"] // VISION["patch_size"]) ** 2

    def get_config(self):
        text, vision = {"model_type": "llama", **TEXT}, {"model_type": "clip_vision_model", **VISION}
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            image_seq_length=self.num_image_tokens,
            vision_feature_layer=-1,
        )
