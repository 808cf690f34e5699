"""Trains the quickstart's tiny vision tower: a CLIP ViT whose class token learns one thing more per tapped block."""

import math
import random
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from .world import ATTRIBUTES, Drawing, digit_scans, draw, render_scan, split_scans


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # LaVIN's own preprocessing (ImageNet statistics)

# What the class token is asked for after each tapped block: the simplest first, the whole thing at the end.
TAPS = {3: "background", 4: "colour", 5: "size", 6: "count", 7: "thing", 8: "thing"}
NOTHING = "nothing"  # a scan has no colour to name, a drawing no digit
WORDS = {
    **{name: [*ATTRIBUTES[name], NOTHING] for name in ("background", "colour", "size", "count")},
    "thing": ATTRIBUTES["kind"] + ATTRIBUTES["digit"],
}


def vision_config() -> CLIPVisionConfig:
    """The tower's shape: width 128, 8 blocks, 64 pixels in patches of 16 (1.7M parameters)."""
    return CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, image_size=64,
        patch_size=16, projection_dim=128, hidden_act="quick_gelu",
    )  # fmt: skip


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Maps uint8 images `(n, 3, height, width)` to the tower's input."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def to_tensor(images: list) -> torch.Tensor:
    """Stacks PIL images into uint8 `(n, 3, height, width)`."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def sample_drawings(number: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Renders `number` random drawings and returns them with the index of every tap's word."""
    rng = random.Random(f"pretraining drawings {seed}")
    drawings = [Drawing.sample(rng) for _ in range(number)]
    pixels = to_tensor([draw(drawing, rng) for drawing in drawings])
    labels = {
        name: [WORDS[name].index(getattr(d, name if name != "thing" else "kind")) for d in drawings] for name in WORDS
    }
    return pixels, {name: torch.tensor(values) for name, values in labels.items()}


def sample_scans(split: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Renders the real scans of one split and returns them with the index of every tap's word."""
    scans, digits = digit_scans()
    chosen = split_scans()[split]
    pixels = to_tensor([render_scan(scans[index]) for index in chosen])
    labels = {name: torch.full((len(chosen),), len(words) - 1) for name, words in WORDS.items()}
    labels["thing"] = torch.tensor([WORDS["thing"].index(str(digits[index])) for index in chosen])
    return pixels, labels


def augment_scans(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turns, scales, shears, shifts and fades float images of scans a little; one in five stays as it is."""

    def rand(low: float, high: float) -> torch.Tensor:
        return torch.rand(len(pixels), generator=generator) * (high - low) + low

    keep = (rand(0, 1) > 0.2).float()
    angle, zoom, shear = rand(-0.22, 0.22) * keep, 1 + rand(-0.13, 0.15) * keep, rand(-0.2, 0.2) * keep
    theta = torch.stack(
        [
            torch.stack([zoom * angle.cos(), -angle.sin() + shear, rand(-0.14, 0.14) * keep], -1),
            torch.stack(
                [angle.sin(), zoom * (1 + rand(-0.1, 0.1) * keep) * angle.cos(), rand(-0.14, 0.14) * keep], -1
            ),
        ],
        1,
    )
    ink = 255 - pixels.float()
    moved = F.grid_sample(ink, F.affine_grid(theta, list(pixels.shape), align_corners=False), align_corners=False)
    return 255 - moved * (1 - rand(0, 0.3) * keep).view(-1, 1, 1, 1)


def tap_states(tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Returns the class token after each tapped block, `(n, taps, width)`."""
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    return torch.stack([states[tap][:, 0] for tap in TAPS], 1)


def conditioning_loss(states: torch.Tensor) -> torch.Tensor:
    """Pulls the taps' states towards mean 0 and covariance 1, so that one small projector can read them all."""
    flat = states.flatten(0, 1)
    mean = flat.mean(0)
    centred = flat - mean
    covariance = centred.T @ centred / len(flat)
    return mean.square().mean() + (covariance - torch.eye(len(mean))).square().sum() / len(mean)


def train_tower(
    steps: int = 2200, batch_size: int = 96, learning_rate: float = 1e-3, pool: int = 24000, seed: int = 0
) -> tuple[CLIPVisionModel, dict[str, float]]:
    """
    Trains the tower on fresh drawings and on the training scans; it never sees an image of the test split.

    Args:
        steps (`int`, *optional*, defaults to 2200): Optimizer steps.
        batch_size (`int`, *optional*, defaults to 96): Images per step, half drawings, half scans.
        learning_rate (`float`, *optional*, defaults to 1e-3): Peak rate of AdamW (warm-up, flat, linear decay).
        pool (`int`, *optional*, defaults to 24000): Drawings that are rendered in all.
        seed (`int`, *optional*, defaults to 0): Seed of weights and data.

    Returns:
        `tuple`: the tower, and the accuracy of each tap's head on held-out images.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tower = CLIPVisionModel(vision_config())
    heads = nn.ModuleDict(
        {str(tap): nn.Linear(tower.config.hidden_size, len(WORDS[name])) for tap, name in TAPS.items()}
    )
    decay = [p for p in [*tower.parameters(), *heads.parameters()] if p.ndim > 1]
    plain = [p for p in [*tower.parameters(), *heads.parameters()] if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * min(1, (steps - step) / (0.4 * steps))
    )
    drawings, drawing_labels = sample_drawings(pool, seed)
    scans, scan_labels = sample_scans("train")
    start, half = time.time(), batch_size // 2
    for step in range(steps):
        a = torch.randint(len(drawings), (half,), generator=generator)
        b = torch.randint(len(scans), (batch_size - half,), generator=generator)
        pixels = torch.cat([drawings[a].float(), augment_scans(scans[b], generator)])
        pixels = pixels * (1 + 0.06 * torch.randn(len(pixels), 1, 1, 1, generator=generator))
        pixels = pixels + 4 * torch.randn(pixels.shape, generator=generator)
        states = tap_states(tower, normalise(pixels))
        labels = {name: torch.cat([drawing_labels[name][a], scan_labels[name][b]]) for name in WORDS}
        losses = {tap: F.cross_entropy(heads[str(tap)](states[:, i]), labels[name], label_smoothing=0.02)
                  for i, (tap, name) in enumerate(TAPS.items())}  # fmt: skip
        shape = conditioning_loss(states)
        loss = sum(losses.values()) + 0.02 * shape
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            parts = " ".join(f"{tap}:{value.item():.2f}" for tap, value in losses.items())
            print(f"tower {step:5d}  {parts}  shape {shape.item():.2f}  {time.time() - start:.0f} s", flush=True)
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the tower's loss is not finite")
    return tower.eval(), score_tower(tower, heads)


@torch.no_grad()
def score_tower(tower: nn.Module, heads: nn.ModuleDict) -> dict[str, float]:
    """Accuracy of each tap's head: on fresh drawings, and (last taps) on the validation scans."""
    tower.eval()
    scores = {}
    for kind, (pixels, labels) in {"drawings": sample_drawings(600, 12345), "scans": sample_scans("val")}.items():
        states = tap_states(tower, normalise(pixels))
        for i, (tap, name) in enumerate(TAPS.items()):
            right = heads[str(tap)](states[:, i]).argmax(-1) == labels[name]
            scores[f"{kind} {name} (block {tap})"] = round(right.float().mean().item(), 4)
    return scores
