"""The rivals' models, with the same weights in the same towers, and batches of a realistic shape."""

import math
from dataclasses import dataclass

import torch
from peft import get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

from lavin import LavinConfig, LavinForConditionalGeneration, MMAConfig


@dataclass
class Size:
    """
    Sizes of a benchmark.

    Attributes:
        hidden_size, layers, vocab_size (`int`): Of the language model, a Llama.
        vision_hidden_size, vision_layers, image_size, patch_size (`int`): Of the vision tower, a CLIP ViT.
        prompt_tokens, answer_tokens (`int`): Their medians over the rows.
        batch_size (`int`): Rows of a training step; every second one has an image.
        new_tokens (`int`): Decoding steps of one round.
    """

    hidden_size: int = 512
    layers: int = 8
    vocab_size: int = 32_000
    vision_hidden_size: int = 256
    vision_layers: int = 24
    image_size: int = 224
    # By parameters times tokens, an image costs about 8% of its row in the language model with 32 (ViT-L/14 beside
    # LLaMA-7B: about 4%), and about 40% with 14.
    patch_size: int = 32
    prompt_tokens: int = 80
    answer_tokens: int = 220
    batch_size: int = 4
    new_tokens: int = 16


DEFAULT = Size()
QUICK = Size(64, 2, 128, 32, 4, 32, 16, 8, 12, 2, 3)


def lavin_config(size: Size) -> LavinConfig:
    """Configuration of a LaVIN of this size; MLP and head widths in LLaMA's and CLIP's proportions."""
    text = LlamaConfig(
        hidden_size=size.hidden_size,
        intermediate_size=math.ceil(size.hidden_size * 8 / 3 / 32) * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=max(size.hidden_size // 64, 2),
        vocab_size=size.vocab_size,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=size.vision_hidden_size,
        intermediate_size=4 * size.vision_hidden_size,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=max(size.vision_hidden_size // 64, 2),
        image_size=size.image_size,
        patch_size=size.patch_size,
    )
    return LavinConfig(vision_config=vision, text_config=text)


def frozen_lavin(size: Size, seed: int = 0) -> LavinForConditionalGeneration:
    """A LaVIN without adapter; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return LavinForConditionalGeneration(lavin_config(size)).requires_grad_(False)


def adapted_lavin(size: Size, frozen: LavinForConditionalGeneration | None = None):
    """
    A LaVIN with MMA in both towers, as PEFT model ready to train. Up maps are set off zero, as in training.

    Args:
        size (`Size`): Its sizes.
        frozen (`LavinForConditionalGeneration`, *optional*): Whose weights it uses, the very same memory: copies lie
            better or worse in it, which alone can make one rival some percent slower.
    """
    model = frozen_lavin(size)
    if frozen is not None:
        model.load_state_dict(frozen.state_dict(), assign=True)
        model.requires_grad_(False)
    model = get_peft_model(model, MMAConfig(), adapter_name="mma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter_up" in name:
                parameter.normal_(std=0.02)
    return model


def describe(size: Size) -> str:
    """The models of this size in a line."""
    return (
        f"language model {size.hidden_size} x {size.layers}, vocabulary {size.vocab_size}; ViT "
        f"{size.vision_hidden_size} x {size.vision_layers}, {size.image_size} px"
    )


def language_model(model: LavinForConditionalGeneration) -> LlamaForCausalLM:
    """A plain causal language model on a frozen LaVIN's weights, the very same memory: nothing of LaVIN is in it."""
    plain = LlamaForCausalLM(model.config.text_config)
    plain.model.load_state_dict(model.model.language_model.state_dict(), assign=True)
    plain.lm_head.load_state_dict(model.lm_head.state_dict(), assign=True)
    return plain.requires_grad_(False)


def make_batch(size: Size, config: LavinConfig, seed: int) -> dict[str, torch.Tensor]:
    """
    A right-padded training batch: lognormal lengths around the medians, every second row with an image, labels on the
    answer.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask`, `labels`, `pixel_values`.
    """
    generator = torch.Generator().manual_seed(seed)

    def length(median: int) -> int:
        return max(2, round(median * math.exp(0.4 * torch.randn((), generator=generator).item())))

    rows = []
    for row in range(size.batch_size):
        prompt, answer = length(size.prompt_tokens), length(size.answer_tokens)
        ids = torch.randint(3, size.vocab_size, (prompt + answer,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        if row % 2 == 0:
            image = torch.full((config.num_image_tokens,), config.image_token_id)
            ids, labels = torch.cat([image, ids]), torch.cat([torch.full_like(image, -100), labels])
        rows.append((ids, labels))

    images = (size.batch_size + 1) // 2
    pixels = torch.randn(images, 3, size.image_size, size.image_size, generator=generator)
    return {**pad_right(rows), "pixel_values": pixels}


def pad_right(rows: list[tuple[torch.Tensor, torch.Tensor]], length: int = 0) -> dict[str, torch.Tensor]:
    """Rows of ids and labels as a right-padded batch, as long as its longest row and at least `length`."""

    def pad(sequences, value):
        batch = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(batch, (0, max(0, length - batch.shape[1])), value=value)

    return {
        "input_ids": pad([ids for ids, _ in rows], 0),
        "attention_mask": pad([torch.ones_like(ids) for ids, _ in rows], 0),
        "labels": pad([labels for _, labels in rows], -100),
    }


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of each row of a batch, without padding."""
    masks = batch["attention_mask"].bool()
    return [(i[m], y[m]) for i, y, m in zip(batch["input_ids"], batch["labels"], masks, strict=True)]


def embed(model: LavinForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Input embeddings of a batch, image tokens in their places, through frozen towers."""
    if not len(batch["pixel_values"]):
        return model.get_input_embeddings()(batch["input_ids"])
    features = model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
    is_image = batch["input_ids"] == model.config.image_token_id
    embeds = model.get_input_embeddings()(batch["input_ids"].masked_fill(is_image, 0))
    return embeds.masked_scatter(is_image.unsqueeze(-1), features.to(embeds))
