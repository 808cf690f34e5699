"""What the segments of a recipe will cost, before they are started."""

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from ..init import meta_model
from ..report import duration, readable
from ..train.base import asked_patterns, base_bytes, by_part, trained_of_base
from ..train.checks import hub_arguments
from ..train.settings import Settings
from ..train.train import Checked
from .recipe import Segment


@dataclass
class Cost:
    """
    Args:
        parts (`str`): What is trained, with numbers.
        data (`str`): Rows, and the shares of the data sets.
        steps (`int`): Optimiser steps.
        values, trained (`int`): Numbers in the model and in what is trained.
        weights, gradients, optimiser (`int`): Bytes of each in one process, before ZeRO shares them.
        flops (`float`): Multiplications and additions of the weights in the whole segment.
    """

    parts: str
    data: str
    steps: int
    values: int
    trained: int
    weights: int
    gradients: int
    optimiser: int
    flops: float

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimiser


def cost(settings: Settings, checked: Checked) -> Cost:
    """
    What a segment costs, from its settings and what [`check_run`](../train/train.py) found. Gradients and AdamW's two
    moments are float32, one and two for each trained value; activations are not counted.

    A weight costs two operations per token or patch forwards, two where a gradient flows through it, two more where it
    is trained, and two again forwards where activations are computed anew (gradient checkpointing).
    """
    config, trained, counts = checked.model, checked.trained, {}
    model = meta_model(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            counts[_part(name)] = counts.get(_part(name), 0) + parameter.numel()
    values, share = sum(parameter.numel() for parameter in model.parameters()), dict.fromkeys(counts, 0)
    if asked_patterns(settings) is None:
        parts, values, flows = f"MMA {trained:,}", values + trained, set(counts)
        weights = _quantised(settings, base_bytes(config, settings)) + trained * 4
    else:
        named = trained_of_base(config, settings, hub_arguments(settings))
        parts, weights = by_part(named), base_bytes(config, settings, trained)
        for name, count in named:
            share[_part(name)] += count
        # A gradient flows from the head back to the first part that is trained.
        order = ["text", "projector", "vision"]
        flows = set(order[: max(i for i, part in enumerate(order) if share[part] or not i) + 1])
    rows = next(iter(checked.data.values()))
    epochs = _epochs(settings, checked.steps, len(rows["problem"]))
    tokens = float((rows["prompt"] + rows["completion"]).sum()) * epochs
    images = float(rows["images"].sum()) * epochs
    patch = getattr(config.vision_config, "patch_size", None)
    patches = config.image_shape[1] * config.image_shape[2] // patch**2 + 1 if isinstance(patch, int) else 1
    units = {"text": tokens, "projector": images * config.num_image_tokens, "vision": images * patches}
    again = 2 if settings["gradient_checkpointing"] else 0
    flops = sum(
        units[part]
        * (counts.get(part, 0) * (2 + (2 + again if part in flows else 0)) + 2 * min(share[part], counts[part]))
        for part in counts
    )
    data = f"{len(rows['problem']):,} rows, {int((rows['images'] > 0).sum()):,} with images{_shares(settings)}"
    return Cost(parts, data, checked.steps, values, trained, weights, trained * 4, trained * 8, flops)


def _part(name: str) -> str:
    return "vision" if "vision_tower." in name else "projector" if "multi_modal_projector." in name else "text"


def _quantised(settings: Settings, size: int) -> int:
    width = 0.5 if settings["load_in_4bit"] else 1 if settings["load_in_8bit"] else None
    return size if width is None else int(size * width / (4 if settings["dtype"] in (None, "float32") else 2))


def _epochs(settings: Settings, steps: int, rows: int) -> float:
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * settings.processes
    return steps * batch / rows if settings["max_steps"] > 0 else settings["num_train_epochs"]


def _shares(settings: Settings) -> str:
    """The data sets of a mixture with their shares, which TRL makes add up to one."""
    sources = settings["datasets"] or []
    fractions = [source["fraction"] for source in sources]
    if len(sources) < 2:
        return ""
    names = [_name(source["data_files"] or source["path"]) for source in sources]
    if None in fractions:
        return ": " + ", ".join(names)
    return ": " + ", ".join(f"{f / sum(fractions):.0%} {name}" for name, f in zip(names, fractions, strict=True))


def _name(files) -> str:
    first = files if isinstance(files, str) else next(iter(files.values() if isinstance(files, dict) else files))
    return "/".join(Path(first if isinstance(first, str) else first[0]).parts[-2:])


def measure_speed(settings: Settings) -> float:
    """Operations per second of a matrix product here, as the run will compute: float32, or 16 bits under autocast."""
    low = torch.bfloat16 if settings["bf16"] else torch.float16 if settings["fp16"] else torch.float32
    if settings["use_cpu"] or not torch.cuda.is_available():
        return _multiply("cpu", low, 1024)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:  # none of the GPU's memory stays taken
        return worker.submit(_multiply, "cuda", low, 8192).result()


def _multiply(device: str, dtype: torch.dtype, size: int) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def plan(
    segments: list[Segment], costs: list[Cost], finished: dict, speed: float, start: float, measured: bool
) -> str:
    """
    The plan in words.

    Args:
        finished (`dict`): What is known of the segments that are finished, by title.
        speed (`float`): Operations per second; `measured` says whether a finished segment reached them.
        start (`float`): Seconds that a segment takes before its first step.
    """
    lines = []
    for segment, one in zip(segments, costs, strict=True):
        lines.append(f"Segment {segment.number} of {len(segments)}: {segment.name}, from {segment.start}")
        if segment.title in finished:
            lines.append(f"  finished   {one.steps:,} steps, {duration(finished[segment.title]['seconds'])}")
            continue
        lines += [
            f"  trains     {one.trained:,} of {one.values:,} values: {one.parts}",
            f"  data       {one.data}",
            f"  steps      {one.steps:,}",
            f"  memory     {readable(one.memory)} = weights {readable(one.weights)} + gradients "
            f"{readable(one.gradients)} + AdamW {readable(one.optimiser)}, and activations",
            f"  time       {'about' if measured else 'at least'} {duration(one.flops / speed + start)}",
        ]
    left = [one for segment, one in zip(segments, costs, strict=True) if segment.title not in finished]
    if left:
        total = f"{'about' if measured else 'at least'} {duration(sum(one.flops / speed + start for one in left))}"
        rests = "what the last segment reached" if measured else "what one matrix product reaches here"
        lines += [
            f"In all {sum(one.steps for one in left):,} steps, {total}; the largest needs "
            f"{readable(max(one.memory for one in left))}.",
            f"Time: {duration(start)} to start each, as these checks took, and the operations of the weights at "
            f"{speed / 1e9:,.3g} GFLOP/s, {rests}"
            + ("." if measured else "; small steps, images and data take more."),
            "Memory: of one process, before ZeRO shares it. Activations come on top: they grow with rows and tokens "
            "of a step, and `gradient_checkpointing` makes them fewer.",
        ]
    return "\n".join(lines)
