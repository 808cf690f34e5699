"""LaVIN-7B's and 13B's shapes with random weights on a device, their batches, and the FLOPs that they need."""

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from lavin import LavinConfig, LavinForConditionalGeneration, MMAConfig

from .models import Size, make_batch


WIDTHS = {  # hidden size, MLP size, layers, heads, vocabulary
    "7B": (4096, 11008, 32, 32, 32_000),
    "13B": (5120, 13824, 40, 40, 32_000),
    "tiny": (64, 96, 2, 4, 128),
}
TOWERS = {  # the same of the vision tower, then image and patch size
    "ViT-L/14": (1024, 4096, 24, 16, 224, 14),
    "tiny": (32, 48, 4, 2, 28, 14),
}
FLOPS = (
    "FLOPs: 4 x parameters x tokens (2 forward, 2 for the gradient of the input; a frozen weight has none of its own) "
    "over the linear maps of both towers, and the head's at labelled positions; padding, attention scores, adapters "
    "and what checkpointing computes again are not counted"
)


def lavin_config(shape: str) -> LavinConfig:
    """Configuration of `"7B"`, `"13B"` (with CLIP ViT-L/14) or `"tiny"`."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    *text, vocab_size = WIDTHS[shape]
    *vision, image_size, patch_size = TOWERS["tiny" if shape == "tiny" else "ViT-L/14"]
    return LavinConfig(
        text_config=LlamaConfig(**dict(zip(names, text, strict=True)), vocab_size=vocab_size),
        vision_config=CLIPVisionConfig(
            **dict(zip(names, vision, strict=True)), image_size=image_size, patch_size=patch_size
        ),
    )


def empty_model(shape: str) -> LavinForConditionalGeneration:
    """A frozen LaVIN whose weights are on the meta device and whose buffers are real."""
    with init_empty_weights(include_buffers=False):
        return LavinForConditionalGeneration(lavin_config(shape)).requires_grad_(False)


def with_adapter(model: LavinForConditionalGeneration):
    """The published adapter, r=8 in both towers, ready to train."""
    return get_peft_model(model, MMAConfig(), adapter_name="mma")


def build(shape: str, base: str, device: str, seed: int = 0):
    """
    Builds a model on the device weight by weight, so that nothing is ever there twice and no checkpoint is written.

    Args:
        shape (`str`): `"7B"`, `"13B"` or `"tiny"`.
        base (`str`): `"bf16"`, or `"4-bit"` (NF4, double-quantised; the same layers as `load_in_4bit` quantises).
        device (`str`): Where it goes.
        seed (`int`, *optional*, defaults to 0): Of the random weights.

    Returns:
        `PeftModel`: in training mode; what is trained is float32.
    """
    model = empty_model(shape)
    if base == "4-bit":
        from transformers import BitsAndBytesConfig
        from transformers.integrations import replace_with_bnb_linear

        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        kept = ["lm_head", *model._keep_in_fp32_modules]
        model = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=settings)
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            if parameter.dim() > 1:
                value.normal_(std=0.02, generator=generator)
            else:
                value.fill_(1.0 if "norm" in name and key == "weight" else 0.0)
            if type(parameter).__name__ == "Params4bit":  # quantised when it is told its device
                made = type(parameter)(value, requires_grad=False, **parameter.__dict__).to(value.device)
            else:
                made = nn.Parameter(value, requires_grad=False)
            setattr(module, key, made)
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)
    return with_adapter(model).train()


def linear_parameters(module: nn.Module) -> int:
    """Entries of the weights of all linear maps."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def count_flops(shape: str, batches: list[dict[str, torch.Tensor]]) -> float:
    """FLOPs that one pass over the batches needs (`FLOPS` says what counts)."""
    model = empty_model(shape)
    text, head = linear_parameters(model.model.language_model), linear_parameters(model.lm_head)
    vision, config = linear_parameters(model.model.vision_tower), model.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2 + 1
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    labelled = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    images = sum(len(batch["pixel_values"]) for batch in batches)
    return 4.0 * (text * tokens + head * labelled + vision * patches * images)


def make_batches(shape: str, micro_batch: int, steps: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of lognormal lengths (medians: prompt 80, answer 220 tokens), every second row with an image."""
    *_, vocab_size = WIDTHS[shape]
    *_, image_size, _ = TOWERS["tiny" if shape == "tiny" else "ViT-L/14"]
    size = Size(vocab_size=vocab_size, image_size=image_size, batch_size=micro_batch)
    config = lavin_config(shape)
    return [make_batch(size, config, seed=1000 * seed + step) for step in range(steps)]
