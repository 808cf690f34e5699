"""
Trains the quickstart's two tiny towers from nothing, apart from each other: they have never met before the quickstart.

    python -m lavin.recipes.quickstart.pretrain --output DIR

writes `DIR/vision` and `DIR/text`, two ordinary Hugging Face folders with float16 weights. The pair in the package
(`tiny/`) was made by these functions with these settings, in 581 and 264 CPU seconds of one core. (Another run gives
other weights of the same kind: the trainer of `tokenizers` numbers its tokens differently every time.)
"""

import argparse
import time
from pathlib import Path

import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .pretrain_text import score_text, train_text, train_tokenizer
from .pretrain_vision import MEAN, STD, train_tower


def round_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Rounds every weight to float16 and back, so that what is scored is what is stored."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


def pretrain_vision(output: Path, seed: int, **steps):
    """Trains the vision tower and writes it with LaVIN's preprocessing."""
    start = time.process_time()
    tower, scores = train_tower(seed=seed, **steps)
    tower.half().save_pretrained(output)
    size = {"height": tower.config.image_size, "width": tower.config.image_size}
    CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=MEAN, image_std=STD).save_pretrained(output)
    print(f"vision tower: {time.process_time() - start:.0f} CPU s, {scores}")


def pretrain_text(output: Path, seed: int, **steps):
    """Trains tokenizer and language model and writes both."""
    start = time.process_time()
    tokenizer = train_tokenizer(seed=seed)
    model, scores = train_text(tokenizer, seed=seed, **steps)
    rounded = score_text(round_weights(model), tokenizer)
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"language model: {time.process_time() - start:.0f} CPU s, {scores}, as float16 {rounded}")


def main(arguments: list[str] | None = None):
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Trains the quickstart's tiny vision tower and language model.")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets vision/ and text/")
    parser.add_argument("--only", choices=["vision", "text"], help="train one of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="two are hardly faster for matrices this small")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs: learns nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.only != "text":
        pretrain_vision(options.output / "vision", options.seed, **({"steps": 2, "pool": 64} if options.quick else {}))
    if options.only != "vision":
        few = {"steps": 2, "more_steps": 2, "lesson_steps": 2}
        pretrain_text(options.output / "text", options.seed, **(few if options.quick else {}))


if __name__ == "__main__":
    main()
