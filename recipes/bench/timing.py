"""
Timing that survives a shared machine: rivals take turns, only ratios within a round count, and with one thread it is
processor time that is measured, which other programs' turns on the core do not lengthen.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
import transformers


@contextmanager
def one_thread_count(threads: int):
    """Runs torch with so many threads, and gives the caller's number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock() -> float:
    """Seconds: the process's processor time where torch has one thread, the wall's otherwise."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def cpu_model() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict:
    """What the numbers were measured on."""
    return {
        "cpu": cpu_model(),
        "cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if torch.get_num_threads() == 1 else "wall time",
        "platform": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def interleave(
    rivals: dict[str, Callable[[int], float | None]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """
    Runs all rivals in every round, each round starting with another one.

    Args:
        rivals (`dict[str, Callable]`): Each gets the number of the round, so that all of a round do the same work.
            What it returns counts as its seconds; if it returns `None`, the time it took.
        rounds (`int`): How many rounds count.
        warmup (`int`, *optional*, defaults to 1): Rounds before them that do not.

    Returns:
        `dict[str, list[float]]`: seconds of each rival in each round.
    """
    names, seconds = list(rivals), {name: [] for name in rivals}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            own = rivals[name](max(number, 0))
            taken = clock() - start if own is None else own
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Median and quartiles, over the rounds, of one rival's time divided by another's in the same round."""
    values = sorted(a / b for a, b in zip(seconds[name], seconds[to], strict=True))
    last = len(values) - 1
    quartiles = values[round(last * 0.25)], values[round(last * 0.75)]
    return {"median": statistics.median(values), "low": quartiles[0], "high": quartiles[1]}


def summary(seconds: dict[str, list[float]], ratios: list[tuple[str, str, float | None]]) -> dict:
    """
    What a benchmark reports of one measurement.

    Args:
        seconds (`dict[str, list[float]]`): From [`interleave`].
        ratios (`list[tuple[str, str, float | None]]`): Rival, what it is compared with, and the goal if there is one.
    """
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {f"{name}/{to}": {**ratio(seconds, name, to), "goal": goal} for name, to, goal in ratios},
    }


def report(result: dict, path: Path):
    """Prints a benchmark's tables and writes it as JSON."""
    system = result["machine"]
    print(f"\n{result['title']}")
    print(f"{system['cpu']}, {system['cores']} cores, torch {system['torch']}")
    print(f"{system['threads']} thread(s), {system['clock']}")
    for line in result["notes"]:
        print(f"  {line}")
    width = max(len(name) for row in result["results"].values() for name in [*row["seconds"], *row["ratios"]])
    for case, row in result["results"].items():
        print(f"  {case}, median of {result['rounds']} rounds")
        for name, value in row["seconds"].items():
            print(f"    {name:<{width}}  {value * 1000:9.2f} ms")
        for name, value in row["ratios"].items():
            goal = "" if value["goal"] is None else f"   goal {value['goal']:.2f}"
            print(f"    {name:<{width}}  {value['median']:9.3f} x  ({value['low']:.3f} .. {value['high']:.3f}){goal}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"  -> {path}")
