"""
How a training step and a decoding step grow with the length of the rows, their number, the language model's layers and
the images of a row: LaVIN with MMA beside the frozen base, which grows by itself.

A point varies one of the four, the others stay at the middle of their values. Rows are of equal length, images
included, and all have as many images; labels are on the last three quarters. `base` is the language model's forward
and backward and the vision tower's forward, `base_vision` has the vision tower's backward as well, see `step_time`.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from ..machine import machine
from . import step_time
from .decode_time import decode_step
from .models import DEFAULT, Size, adapted_lavin, describe, embed, frozen_lavin, language_model
from .timing import interleave, summary


NAME = "growth"
ROUNDS = 3
AXES = {"length": (128, 256, 512, 1024), "batch": (1, 2, 4, 8), "layers": (2, 4, 8, 16), "images": (0, 1, 2, 4)}
MIDDLE = {"length": 256, "batch": 2, "layers": 4, "images": 1}
QUICK_AXES = {"length": (16, 32), "batch": (1, 2), "layers": (1, 2), "images": (0, 1)}
QUICK_MIDDLE = {"length": 16, "batch": 1, "layers": 1, "images": 1}
STEP_GOALS = [("mma", "base", None), ("mma", "base_vision", None)]
DECODE_GOALS = [("mma", "base", None)]


def even_batch(size: Size, config, length: int, batch: int, images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of one length, each with so many images at its beginning."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, size.vocab_size, (batch, length), generator=generator)
    ids[:, : images * config.num_image_tokens] = config.image_token_id
    labels = ids.clone()
    labels[:, : max(length // 4, images * config.num_image_tokens)] = -100
    pixels = torch.randn(batch * images, 3, size.image_size, size.image_size, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def make_rivals(size: Size, point: dict[str, int], seed: int = 0) -> tuple[dict, dict]:
    """The rivals of a training step and those of a decoding step at one point."""
    size = Size(**{**vars(size), "layers": point["layers"]})
    frozen = frozen_lavin(size, seed).eval()
    batch = even_batch(size, frozen.config, point["length"], point["batch"], point["images"], seed)
    steps = step_time.make_rivals(size, seed, batches=[batch])
    steps = {name: steps[name] for name in ("base", "base_vision", "mma")}

    base, mma = language_model(frozen).eval(), adapted_lavin(size, frozen).eval()
    mask = batch["attention_mask"]
    with torch.no_grad():
        embeds = embed(frozen, batch)
    images = {"input_ids": batch["input_ids"]}
    if point["images"]:
        images["pixel_values"] = batch["pixel_values"]

    def decode(model, **inputs):
        return lambda number: decode_step(model, size.new_tokens, attention_mask=mask, **inputs)

    return steps, {"base": decode(base, inputs_embeds=embeds), "mma": decode(mma, **images)}


def run(size: Size, rounds: int, seed: int = 0, **kwargs) -> dict:
    """
    Measures it.

    Returns:
        `dict`: `results` with seconds and ratios of each point, `points` with what each was, and what they were
            measured with.
    """
    axes, middle = (AXES, MIDDLE) if size.hidden_size >= DEFAULT.hidden_size else (QUICK_AXES, QUICK_MIDDLE)
    results, points, done = {}, {}, {}
    for axis, values in axes.items():
        for value in tqdm(values, desc=f"growth with {axis}", leave=False, disable=None):
            point = {**middle, axis: value}
            key = tuple(point.values())
            if key not in done:  # the middle lies on every axis
                steps, decodes = make_rivals(size, point, seed)
                done[key] = (
                    summary(interleave(steps, rounds), STEP_GOALS),
                    summary(interleave(decodes, rounds), DECODE_GOALS),
                )
            for kind, found in zip(("training step", "decoding step"), done[key], strict=True):
                case = f"{kind}, {axis} {value}"
                results[case], points[case] = found, {"kind": kind, "axis": axis, **point}
    return {
        "title": "Growth with length, rows, layers and images",
        "name": NAME,
        "machine": machine(),
        "rounds": rounds,
        "size": vars(size),
        "notes": [
            f"{describe(size)}, patch {size.patch_size}, layers as given; float32",
            "where not varied: " + ", ".join(f"{name} {value}" for name, value in middle.items()),
        ],
        "points": points,
        "results": results,
    }


def plot(result: dict, path: Path) -> Path:
    """Saves a PNG: above the ratio to the base, below the times, one column for each thing that varies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(point["axis"] for point in result["points"].values()))
    lines = {
        ("training step", "mma/base"): ("training / base", "#2f6f4f", "-"),
        ("training step", "mma/base_vision"): ("training / base with vision backward", "#2f6f4f", ":"),
        ("decoding step", "mma/base"): ("decoding / base", "#8a5a2b", "-"),
    }
    figure, grid = plt.subplots(
        2, len(axes), figsize=(3 * len(axes), 5.5), layout="constrained", squeeze=False, sharey="row"
    )
    for column, axis in enumerate(axes):
        above, below = grid[:, column]
        for (kind, name), (label, color, style) in lines.items():
            cases = [case for case, p in result["points"].items() if p["axis"] == axis and p["kind"] == kind]
            x = [result["points"][case][axis] for case in cases]
            found = [result["results"][case]["ratios"][name] for case in cases]
            above.plot(x, [ratio["median"] for ratio in found], style, color=color, marker="o", ms=3, label=label)
            if name != "mma/base":
                continue
            for rival, look in (("mma", "-"), ("base", "--")):
                seconds = [result["results"][case]["seconds"][rival] * 1000 for case in cases]
                label = f"{kind}, {'LaVIN' if rival == 'mma' else 'base'}"
                below.plot(x, seconds, look, color=color, marker="o", ms=3, label=label)
        above.axhline(1, color="grey", linewidth=0.8)
        low, high = above.get_ylim()
        above.set(title=axis, ylim=(min(0.9, low), max(1.2, high)))
        below.set(yscale="log", xlabel=axis)
        for panel in (above, below):
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xticks(x)
    grid[0, 0].set_ylabel("LaVIN / base")
    grid[1, 0].set_ylabel("ms")
    handles = [pair for row in (0, 1) for pair in zip(*grid[row, 0].get_legend_handles_labels(), strict=True)]
    figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
