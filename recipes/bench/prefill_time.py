"""
Time of the prefill of 16 prompts, half of them with an image, left-padded as `generate` wants them, beside the plain
base language model: cache filled, logits of the last position.

`mma` and `base` get the same input embeddings: the cost of the adapter. `mma_images` and `base_images` compute them,
too, through the vision tower, adapted and frozen.
"""

import torch

from ..machine import machine
from .models import Size, adapted_lavin, describe, embed, frozen_lavin, language_model, make_batch
from .timing import interleave, summary


NAME = "prefill_time"
ROUNDS = 15
ROWS = 16
GOALS = [("mma", "base", "at most 1.05"), ("mma_images", "base_images", None)]


def left_padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A right-padded batch with its padding moved to the left, and positions that start at the first token."""
    shifts = (batch["attention_mask"] == 0).sum(dim=1)
    moved = {}
    for name in ("input_ids", "attention_mask"):
        rows = [torch.roll(row, int(shift)) for row, shift in zip(batch[name], shifts, strict=True)]
        moved[name] = torch.stack(rows)
    positions = (moved["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return {**moved, "position_ids": positions, "pixel_values": batch["pixel_values"]}


def make_rivals(size: Size, seed: int = 0) -> dict:
    """One function per rival, which runs one prefill and returns nothing; `logits` of each is what it computes."""
    frozen = frozen_lavin(size, seed).eval()
    base, mma = language_model(frozen).eval(), adapted_lavin(size, frozen).eval()
    # Prompts only: the answer's tokens are not there yet.
    prompts = Size(**{**vars(size), "batch_size": ROWS, "answer_tokens": 2})
    batch = left_padded(make_batch(prompts, frozen.config, seed))
    pixels, ids = batch.pop("pixel_values"), batch.pop("input_ids")
    images = {"input_ids": ids, "pixel_values": pixels}
    modality = (ids == frozen.config.image_token_id).any(dim=1).long()

    @torch.no_grad()
    def prefill(model, **inputs):
        return model(use_cache=True, logits_to_keep=1, **batch, **inputs).logits

    with torch.no_grad():
        embeds = embed(frozen, images)

    @torch.no_grad()
    def base_images():
        return prefill(base, inputs_embeds=embed(frozen, images))

    return {
        "base": lambda: prefill(base, inputs_embeds=embeds),
        "mma": lambda: prefill(mma, inputs_embeds=embeds, modality_ids=modality),
        "base_images": base_images,
        "mma_images": lambda: prefill(mma, **images),
    }


def run(size: Size, rounds: int, seed: int = 0, **kwargs) -> dict:
    """
    Measures it.

    Returns:
        `dict`: `results` with seconds and ratios, and what they were measured with.
    """

    def timed(forward):
        def once(number):
            forward()

        return once

    seconds = interleave({name: timed(forward) for name, forward in make_rivals(size, seed).items()}, rounds)
    return {
        "title": f"Prefill of {ROWS} rows",
        "name": NAME,
        "machine": machine(),
        "rounds": rounds,
        "size": vars(size),
        "notes": [
            f"{describe(size)}, patch {size.patch_size}; float32",
            f"prompts of about {size.prompt_tokens} tokens, left-padded, half of them with an image",
        ],
        "results": {f"{ROWS} rows": summary(seconds, GOALS)},
    }
