"""
Memory of a recipe's segments, measured: two steps of AdamW with what each segment trains, on random weights.

    python -m lavin.recipes.segments.memory recipes/infmllm/infmllm-7b.yaml

measures the stages of InfMLLM on models of the paper's proportions, an eighth as wide and a quarter as deep
(`--width 1` is as wide; on a GPU where there is one). Linux only without a GPU: it reads /proc.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from lavin import LavinConfig, LavinForConditionalGeneration
from lavin.trainable_lavin import set_trainable, trained_names

from ..machine import forget_peak, resident
from ..train.base import by_part
from .recipe import read_recipe


def infmllm_config(width: float = 1 / 8, depth: float = 1 / 4) -> LavinConfig:
    """InfMLLM's shapes (EVA-CLIP-g's width, depth and MLP; Vicuna-7B's), so many times as wide and as deep."""
    vision = CLIPVisionConfig(
        hidden_size=int(1408 * width), intermediate_size=int(6144 * width), num_hidden_layers=round(39 * depth),
        num_attention_heads=8, patch_size=14, image_size=224,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=int(4096 * width), intermediate_size=int(11008 * width), num_hidden_layers=round(32 * depth),
        num_attention_heads=32, vocab_size=int(32000 * width),
    )  # fmt: skip
    return LavinConfig(vision_config=vision, text_config=text, projector_type="pool", pool_size=8)


def measure(config: LavinConfig, patterns: list[str], rows: int = 2, tokens: int = 32, device: str = "cpu") -> dict:
    """
    Trains two steps on made-up rows, each with an image. On a CPU the peak is what the process takes more than before,
    which means something where large blocks go back to the system as soon as they are freed ([`measure_recipe`]).

    Args:
        config ([`LavinConfig`]): Of a model that gets random weights, in float32.
        patterns (`list[str]`): As of `trainable`.
        rows, tokens (`int`): Rows of a step, and tokens of text in each. On a GPU they are computed in bfloat16.

    Returns:
        `dict`: `trained` (words), bytes of `weights`, `gradients` and `optimiser`, and `peak`, the largest that was
        taken at a time, activations included.
    """
    on_gpu = device != "cpu"
    before = 0 if on_gpu else resident() * 1e6
    with torch.device(device):
        model = LavinForConditionalGeneration(config).train()
    names = trained_names(model, patterns)
    set_trainable(model, names)
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=1e-5)
    images = torch.full((rows, config.num_image_tokens), config.image_token_id)
    ids = torch.cat([images, torch.randint(3, 60, (rows, tokens))], dim=1).to(device)
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    pixels = torch.rand(rows, *config.image_shape, device=device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    autocast = torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()
    for _ in range(2):
        with autocast:
            loss = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident(peak=True) * 1e6 - before
    states = [value for state in optimiser.state.values() for value in state.values() if value.dim()]
    return {
        "trained": by_part([(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad]),
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": sum(p.grad.numel() * p.grad.element_size() for p in chosen),
        "optimiser": sum(value.numel() * value.element_size() for value in states),
        "peak": int(peak),
    }


def measure_recipe(recipe: str, width: float = 1 / 8, depth: float = 1 / 4, device: str | None = None) -> list[dict]:
    """[`measure`] of each segment with `trainable`, in a process of their own, on InfMLLM's proportions."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    asked = {one.name: one.values["model_init_kwargs"].get("trainable") for one in read_recipe(recipe)[1]}
    patterns = {name: parts for name, parts in asked.items() if parts is not None}
    given = {"width": width, "depth": depth, "device": device, "patterns": patterns}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # large blocks go back as soon as they are freed
    command = [sys.executable, "-m", "lavin.recipes.segments.memory", "--given", json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The steps failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description="Measures the memory of a recipe's segments.")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml")
    parser.add_argument("--width", type=float, default=1 / 8, help="times InfMLLM's widths (0.125)")
    parser.add_argument("--depth", type=float, default=1 / 4, help="times InfMLLM's depths (0.25)")
    parser.add_argument("--given", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.given:
        given = json.loads(options.given)
        config, found = infmllm_config(given["width"], given["depth"]), []
        for segment, patterns in given["patterns"].items():
            found.append({"segment": segment, **measure(config, patterns, device=given["device"])})
            gc.collect()
        print(json.dumps(found))
        return
    if options.recipe is None:
        parser.error("name a RECIPE.yaml")
    print("| segment | trained | weights | gradients | AdamW | peak, with activations |\n|---|---|---|---|---|---|")
    for one in measure_recipe(options.recipe, options.width, options.depth):
        size = " | ".join(f"{one[key] / 1e6:,.0f} MB" for key in ("weights", "gradients", "optimiser", "peak"))
        print(f"| {one['segment']} | {one['trained']} | {size} |")


if __name__ == "__main__":
    main()
