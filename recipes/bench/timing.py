"""
Timing that survives a shared machine: rivals take turns, only ratios within a round count, and with one thread it is
processor time that is measured, which other programs' turns on the core do not lengthen.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm


# How the units of a result are printed.
UNITS = {"seconds": (1000, "ms"), "samples_per_second": (1, "samples/s"), "megabytes": (1, "MB")}


def clock() -> float:
    """Seconds: the process's processor time where torch has one thread, the wall's otherwise."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleave(
    rivals: dict[str, Callable[[int], float | None]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """
    Runs all rivals in every round, in another order each time: what one leaves behind (memory that must be mapped
    again) falls on the next, and must not always fall on the same one.

    Args:
        rivals (`dict[str, Callable]`): Each gets the number of the round, so that all of a round do the same work.
            What it returns counts as its seconds; if it returns `None`, the time it took.
        rounds (`int`): How many rounds count.
        warmup (`int`, *optional*, defaults to 1): Rounds before them that do not.

    Returns:
        `dict[str, list[float]]`: seconds of each rival in each round.
    """
    shuffled, seconds = random.Random(0), {name: [] for name in rivals}
    for number in tqdm(range(-warmup, rounds), desc="rounds", leave=False, disable=None):
        for name in shuffled.sample(list(rivals), len(rivals)):
            start = clock()
            own = rivals[name](max(number, 0))
            taken = clock() - start if own is None else own
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    values, last = sorted(values), len(values) - 1
    return {
        "median": statistics.median(values),
        "low": values[round(last * 0.25)],
        "high": values[round(last * 0.75)],
    }


def summary(
    measured: dict[str, list[float]], ratios: list[tuple[str, str, str | None]], unit: str = "seconds"
) -> dict[str, dict]:
    """
    What a benchmark reports of one measurement.

    Args:
        measured (`dict[str, list[float]]`): Of each rival in each round, as from [`interleave`].
        ratios (`list[tuple[str, str, str | None]]`): Rival, what it is compared with in the same round, and the goal
            if there is one, such as `"at most 1.05"`.
        unit (`str`, *optional*, defaults to `"seconds"`): What was measured; one of `UNITS`.

    Returns:
        `dict`: medians by rival under the unit's name, and `ratios`.
    """
    found = {}
    for name, to, goal in ratios:
        values = [a / b for a, b in zip(measured[name], measured[to], strict=True)]
        found[f"{name}/{to}"] = {**quartiles(values), "goal": goal}
    return {unit: {name: statistics.median(values) for name, values in measured.items()}, "ratios": found}


def reached(median: float, goal: str) -> bool:
    """Whether a median, to the two decimals that are shown, is within a goal such as `"at most 1.05"`."""
    kind, _, limit = goal.rpartition(" ")
    return round(median, 2) <= float(limit) if kind == "at most" else round(median, 2) >= float(limit)


def report(result: dict, path: Path):
    """Prints a benchmark's tables and writes it as JSON."""
    system = result["machine"]
    print(f"\n{result['title']}")
    print(f"{system['cpu']}, {system['cores']} cores, torch {system['torch']}")
    print(f"{system['threads']} thread(s), {system['clock']}")
    for line in result["notes"]:
        print(f"  {line}")
    width = max(len(name) for row in result["results"].values() for values in row.values() for name in values)
    for case, row in result["results"].items():
        print(f"  {case}, median of {result['rounds']} rounds")
        for unit, (factor, shown) in UNITS.items():
            for name, value in row.get(unit, {}).items():
                print(f"    {name:<{width}}  {value * factor:9.2f} {shown}")
        for kind, sign in (("ratios", "x"), ("differences", "s")):
            for name, value in row.get(kind, {}).items():
                goal = "" if value["goal"] is None else f"   goal: {value['goal']}"
                spread = f"({value['low']:.3f} .. {value['high']:.3f})"
                print(f"    {name:<{width}}  {value['median']:9.3f} {sign}  {spread}{goal}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"  -> {path}")


def goal_rows(results: list[dict]) -> list[dict[str, str]]:
    """Rows of a table: everything that has a goal, in the results of some benchmarks."""
    rows = []
    for result in results:
        for case, row in result["results"].items():
            for kind, sign in (("ratios", "x"), ("differences", " s")):
                for name, value in row.get(kind, {}).items():
                    if value["goal"] is None:
                        continue
                    spread = f"{value['low']:.2f} to {value['high']:.2f}"
                    rows.append(
                        {
                            "benchmark": result["name"],
                            "case": case,
                            "compared": name,
                            "median (quartiles)": f"{value['median']:.2f}{sign} ({spread})",
                            "goal": f"{value['goal']}{sign}",
                            "reached": "yes" if reached(value["median"], value["goal"]) else "no",
                        }
                    )
    return rows
