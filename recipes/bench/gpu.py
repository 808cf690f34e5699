"""
Speed and memory of training LaVIN-7B and 13B, with random weights of their shapes.

    python -m lavin.recipes.bench.gpu            # on a GPU: 7B, 13B; bf16, 4-bit; with checkpointing and without
    python -m lavin.recipes.bench.gpu --quick    # a tiny shape on any machine; the numbers mean nothing

A bare loop: forward, loss at the labelled positions, backward and AdamW after every micro-batch, under bf16 autocast,
rows padded to the longest of their micro-batch, as our recipes train; no data is read, nothing logged or saved. What
does not fit is reported as out of memory, and the other rows go on. JSON is written after every row.
"""

import argparse
import gc
import json
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from ..machine import machine
from ..report import markdown_table
from .gpu_models import FLOPS, WIDTHS, build, count_flops, empty_model, make_batches, with_adapter
from .step_time import labelled_loss


BASES = ("bf16", "4-bit")
ROWS, EPOCHS = 12_726, 20
GOALS = {"hours": 1.5, "mfu": 45.0, "memory": {"bf16": 20.0, "4-bit": 8.0}}  # one H200, 7B
# Dense bf16 TFLOP/s from the vendor's data sheets; the first name that is part of the GPU's counts.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362}


def measure(model, batches: list[dict[str, torch.Tensor]], device: str) -> dict:
    """
    Trains on every batch once, after a warm-up on some of them, the longest first.

    Returns:
        `dict`: `seconds` in all; `peak` and `reserved`, the largest memory in GB (10^9 bytes; `None` on a CPU).
    """
    gpu = torch.device(device).type == "cuda"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02)
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    longest = sorted(batches, key=lambda batch: -batch["input_ids"].shape[1])

    def step(batch):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = labelled_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    for batch in longest[:3]:
        step(batch)
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    losses = [step(batch) for batch in batches]
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if not torch.stack(losses).isfinite().all():
        raise ArithmeticError("a loss is not finite: the numbers would mean nothing")
    return {
        "seconds": seconds,
        "peak": torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
        "reserved": torch.cuda.max_memory_reserved() / 1e9 if gpu else None,
    }


def row_of(shape: str, base: str, checkpointing: bool, measured: dict, samples: int, flops: float, peak) -> dict:
    """One row of the results; `peak` is the GPU's FLOP/s, or `None`."""
    speed = samples / measured["seconds"]
    return {
        "model": shape,
        "base": base,
        "checkpointing": checkpointing,
        "samples_per_second": speed,
        "mfu_percent": 100 * flops / measured["seconds"] / peak if peak else None,
        "peak_memory_gb": measured["peak"],
        "reserved_memory_gb": measured["reserved"],
        "hours_20_epochs": ROWS * EPOCHS / speed / 3600,
    }


def free():
    """Gives back what a failed or finished row held."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def run(shapes: list[str], micro_batch: int, steps: int, device: str, peak: float | None, seed: int, save) -> list:
    """
    Measures every shape with every kind of base, with and without checkpointing.

    Args:
        save (`Callable`): Gets the rows so far after each.

    Returns:
        `list[dict]`: the rows; one that failed has `error` instead of numbers.
    """
    rows = []
    with tqdm(total=len(shapes) * len(BASES) * 2, unit="row") as bar:
        for shape in shapes:
            batches = make_batches(shape, micro_batch, steps, seed)
            flops = count_flops(shape, batches)
            for base in BASES:
                model = None
                for checkpointing in (False, True):
                    bar.set_description(f"{shape} {base}{' checkpointing' if checkpointing else ''}")
                    error = None
                    try:
                        model = build(shape, base, device, seed) if model is None else model
                        lavin = model.get_base_model()
                        if checkpointing:
                            lavin.gradient_checkpointing_enable({"use_reentrant": False})
                        measured = measure(model, batches, device)
                    except torch.cuda.OutOfMemoryError:
                        error = "out of memory"
                    except Exception as problem:  # the other rows are not to be lost with this one
                        error = f"{type(problem).__name__}: {problem}"
                    if error is None:
                        row = row_of(shape, base, checkpointing, measured, micro_batch * steps, flops, peak)
                    else:
                        row = {"model": shape, "base": base, "checkpointing": checkpointing, "error": error}
                        model = lavin = None  # its gradients and what it kept for the backward
                    rows.append(row)
                    save(rows)
                    free()
                    bar.update()
                model = lavin = None
                free()
    return rows


def table(rows: list[dict]) -> str:
    """The rows beside the goals, which are for 7B on one H200."""

    def cell(row, value, digits, sign, goal):
        if value is None:
            return "n/a"
        if row["model"] != "7B":
            return f"{value:.{digits}f}"
        met = value >= goal if sign == ">=" else value < goal
        return f"{value:.{digits}f} ({sign} {goal:g}: {'yes' if met else 'no'})"

    shown = []
    for row in rows:
        name = {"model": row["model"], "base": row["base"], "checkpointing": "yes" if row["checkpointing"] else "no"}
        if "error" in row:
            first = row["error"].splitlines()[0][:60]
            shown.append({**name, "samples/s": first, "MFU %": "-", "peak GB": "-", "20 epochs, GPU-hours": "-"})
            continue
        memory = GOALS["memory"][row["base"]]
        shown.append({
            **name, "samples/s": f"{row['samples_per_second']:.1f}",
            "MFU %": cell(row, row["mfu_percent"], 1, ">=", GOALS["mfu"]),
            "peak GB": cell(row, row["peak_memory_gb"], 1, "<", memory),
            "20 epochs, GPU-hours": cell(row, row["hours_20_epochs"], 2, "<", GOALS["hours"]),
        })  # fmt: skip
    return markdown_table(shown)


def describe(device: str, peak_tflops: float | None) -> dict:
    """The hardware, and the date."""
    found = {"gpu": None, "gpu_memory_gb": None, "peak_tflops": None, **machine()}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known = next((value for name, value in PEAKS.items() if name in properties.name), None)
        found.update(gpu=properties.name, gpu_memory_gb=properties.total_memory / 1e9, peak_tflops=known)
        found["cuda"] = torch.version.cuda
        found["clock"] = "wall time"
    if peak_tflops is not None:
        found["peak_tflops"] = peak_tflops
    return {**found, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 1 where a row failed otherwise than for memory."""
    parser = argparse.ArgumentParser(prog="python -m lavin.recipes.bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape, on a CPU too: does it run?")
    parser.add_argument("--shapes", nargs="+", choices=("7B", "13B"), default=["7B", "13B"])
    parser.add_argument("--micro-batch", type=int, default=4, help="rows of a step (4)")
    parser.add_argument("--steps", type=int, help="micro-batches measured (24; 2 with --quick)")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in dense bf16, where it is not known")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench/gpu.json"))
    options = parser.parse_args(arguments)
    steps = options.steps if options.steps is not None else (2 if options.quick else 24)
    if steps < 1 or options.micro_batch < 1:
        parser.error("--steps and --micro-batch must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        parser.error("there is no GPU, and 7B on a CPU would take hours; --quick runs a tiny shape")

    # Told about a method's new name, which older releases that we support do not have.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    shapes = ["tiny"] if options.quick else options.shapes
    system = describe(device, options.peak_tflops)
    result = {
        "title": "LaVIN's training step with random weights (a bare loop)",
        "name": "gpu",
        "machine": system,
        "micro_batch": options.micro_batch,
        "steps": steps,
        "seed": options.seed,
        "goals_7b_h200": GOALS,
        "trained_parameters": {
            shape: with_adapter(empty_model(shape)).get_nb_trainable_parameters()[0] for shape in WIDTHS
        },
        "notes": [
            f"{EPOCHS} epochs of {ROWS} rows, extrapolated; micro-batch {options.micro_batch}, padded to the longest; "
            "prompt about 80 and answer about 220 tokens (medians, lognormal), half the rows with an image",
            FLOPS,
        ],
    }

    def save(rows):
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({**result, "results": rows}, indent=2) + "\n", encoding="utf-8")

    peak = system["peak_tflops"] * 1e12 if system["peak_tflops"] else None
    rows = run(shapes, options.micro_batch, steps, device, peak, options.seed, save)
    print(f"\n{result['title']}")
    print(f"{system['gpu'] or system['cpu']}, torch {system['torch']}, {system['date']}")
    print(f"peak {system['peak_tflops']} TFLOP/s in dense bf16" if peak else "peak FLOP/s unknown: no MFU")
    print(f"\n{table(rows)}\n")
    if not options.quick:
        print("In brackets: the goals, for 7B on one H200.")
    for note in result["notes"]:
        print(f"- {note}")
    print(f"-> {options.output}")
    return int(any(row.get("error", "out of memory") != "out of memory" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
