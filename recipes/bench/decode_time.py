"""
Time of one decoding step, cached, beside the plain base language model: with the adapter attached, folded for both
modalities (`fold`), and folded into a plain language model (`merge_modality`).

All decode greedily through `generate` after the same prompts, half of them with an image; plain language models get
the same input embeddings. What counts is the median time between two steps, so the prefill does not.
"""

import statistics

import torch

from ..machine import machine
from .models import Size, adapted_lavin, embed, frozen_lavin, language_model, make_batch
from .timing import clock, interleave, summary


NAME = "decode_time"
ROUNDS = 15
BATCH_SIZES = (1, 16)
GOALS = [
    ("mma", "base", "at most 1.05"),
    ("folded", "base", "at most 1.00"),
    ("merged", "base", "at most 1.00"),
]


class Clock:
    """A stopping criterion that never stops: it notes when each step ends."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(clock())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def step(self) -> float:
        """Median seconds of a step after the prefill."""
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:], strict=False))


def decode_step(model, new_tokens: int, **inputs) -> float:
    """Seconds of one decoding step: the median of so many, after the prefill."""
    clock = Clock()
    model.generate(max_new_tokens=new_tokens + 1, do_sample=False, pad_token_id=0, stopping_criteria=[clock], **inputs)
    return clock.step()


def make_rivals(size: Size, batch_size: int, seed: int = 0) -> dict:
    """One function per rival, which generates and returns the seconds of one decoding step."""
    size = Size(**{**vars(size), "batch_size": batch_size})
    frozen = frozen_lavin(size, seed).eval()
    base, mma = language_model(frozen).eval(), adapted_lavin(size, frozen).eval()
    merged, folded = mma.merge_modality("image"), adapted_lavin(size, frozen).eval().get_base_model().fold()
    batch = make_batch(size, frozen.config, seed)
    # A prompt of even length: padding is not what is measured.
    prompt = batch["input_ids"][:, : size.prompt_tokens].clamp(min=3)
    batch = {**batch, "input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    with torch.no_grad():
        embeds = embed(frozen, batch)

    def decode(model, **inputs):
        return decode_step(model, size.new_tokens, attention_mask=batch["attention_mask"], **inputs)

    images = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    return {
        "base": lambda number: decode(base, inputs_embeds=embeds),
        "mma": lambda number: decode(mma, **images),
        "folded": lambda number: decode(folded, **images),
        "merged": lambda number: decode(merged, inputs_embeds=embeds),
    }


def run(size: Size, rounds: int, seed: int = 0, **kwargs) -> dict:
    """
    Measures it at each batch size.

    Returns:
        `dict`: `results` with seconds and ratios, and what they were measured with.
    """
    results = {}
    for batch_size in BATCH_SIZES:
        seconds = interleave(make_rivals(size, batch_size, seed), rounds)
        results[f"batch {batch_size}"] = summary(seconds, GOALS)
    return {
        "title": "Decoding step, cached (greedy `generate`)",
        "name": NAME,
        "machine": machine(),
        "rounds": rounds,
        "size": vars(size),
        "notes": [
            f"language model {size.hidden_size} x {size.layers}, vocabulary {size.vocab_size}; float32; half the rows "
            f"with an image; {size.prompt_tokens} tokens in the cache, {size.new_tokens} steps a round",
        ],
        "results": results,
    }
