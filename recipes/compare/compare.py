"""`lavin compare`: recipes for `trl sft` on the same rows, for the same steps, asked the same questions."""

import json
import time
from pathlib import Path

from ..report import markdown_table, spread
from ..train.settings import read_yaml
from .figures import plot
from .runs import Run, run_all
from .tiny import GPT2_PAIR, PAIR, SEARCH_SEED, make_base, make_data


HERE = Path(__file__).resolve().parent
RECIPES = ("lavin", "lora", "ia3", "llama_adapter", "projector", "full", "clipcap")
OUTPUT = "outputs/compare"  # the folder that the recipes name
BEFORE = {PAIR: "before training", GPT2_PAIR: "before training, GPT-2"}
FACTORS = (1 / 3, 1.0, 3.0)  # of a recipe's learning rate: where the search looks first
MOST = 5  # rates for a recipe


def read_recipe(path: str | Path) -> dict:
    """
    Reads a recipe and checks that it can be compared.

    Raises:
        `OSError`, `ValueError`: if it cannot be read, names other rows or another model than this package makes.
    """
    recipe = read_yaml(path)
    try:
        model, train = recipe["model_name_or_path"], recipe["datasets"][0]["data_files"]["train"]
        steps, _rate = int(recipe["max_steps"]), float(recipe["learning_rate"])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path} is no recipe that can be compared: it needs model_name_or_path, datasets, max_steps and "
            f"learning_rate, as {HERE.name}/lora.yaml has them. ({type(error).__name__}: {error})"
        ) from error
    if model not in [f"{OUTPUT}/{name}" for name in BEFORE] or train != f"{OUTPUT}/data-0/train.parquet" or steps < 1:
        raise ValueError(
            f"{path} trains {model} on {train}: to be compared, recipes train {OUTPUT}/{PAIR} or "
            f"{OUTPUT}/{GPT2_PAIR} on {OUTPUT}/data-0/train.parquet. Start from a copy of {HERE.name}/lora.yaml."
        )
    return recipe


def run_recipe(name: str, recipe: dict, seed: int, output: Path, max_steps=None, factor: float | None = None) -> dict:
    """
    A recipe for one run.

    Args:
        name (`str`): Its name.
        recipe (`dict`): Settings of `trl sft`.
        seed (`int`): Seeds the rows, their order, and the start of an adapter.
        output (`Path`): The comparison's folder.
        max_steps (`int`, *optional*): Steps in place of the recipe's.
        factor (`float`, *optional*): Of the learning rate, in the search.

    Returns:
        `dict`: settings for `trl sft`.
    """
    recipe = json.loads(json.dumps(recipe))  # a copy
    recipe["model_name_or_path"] = (output / Path(recipe["model_name_or_path"]).name).as_posix()
    data = "data-search" if factor is not None else f"data-{seed}"
    recipe["datasets"][0]["data_files"]["train"] = (output / data / "train.parquet").as_posix()
    recipe["output_dir"] = (output / run_name(name, seed, factor)).as_posix()
    rate = float(f"{float(recipe['learning_rate']) * (factor or 1):.2g}")
    recipe.update(seed=seed, save_strategy="no", max_steps=max_steps or recipe["max_steps"], learning_rate=rate)
    for adapter in ("mma", "peft"):
        if adapter in (recipe.get("model_init_kwargs") or {}):
            recipe["model_init_kwargs"][adapter]["init_seed"] = seed
    return recipe


def run_name(name: str, seed: int, factor: float | None = None) -> str:
    """The folder of a run."""
    return f"{name}-{seed}" if factor is None else f"search-{name}-x{factor:.2g}"


def rows_of(results: dict[str, list[dict]]) -> list[dict]:
    """The table's rows: mean and sample standard deviation over the seeds of each recipe."""
    rows = []
    for name, some in results.items():
        row = {"recipe": name, "trained": f"{some[0]['trained']:,}"}
        for column, key in (("CPU s", "cpu_seconds"), ("memory MB", "peak_mb")):
            mean = sum(result[key] for result in some) / len(some)
            row[column] = f"{mean:.0f}" if some[0]["trained"] else "-"
        for column in ("TXT", "IMG", "NO", "AVG"):
            row[column] = spread([result["scores"][column] for result in some])
        row["text ability"] = spread([result["text"]["skill"] for result in some])
        row["perplexity"] = f"{sum(result['text']['perplexity'] for result in some) / len(some):.2f}"
        rows.append(row)
    return rows


def compare(
    recipes: list[str] | None = None,
    output: str | Path = OUTPUT,
    seeds: int = 3,
    max_steps: int | None = None,
    search: bool = False,
) -> dict:
    """
    Runs recipes and writes `compare.md`, `compare.png`, `report.json`; with `search`, `search.md` and `search.json`.

    Args:
        recipes (`list[str]`, *optional*): YAML files for `trl sft`; all of this package by default.
        output (`str` or `Path`, *optional*): Where everything is written.
        seeds (`int`, *optional*, defaults to 3): Runs of each recipe.
        max_steps (`int`, *optional*): Steps in place of the recipes'.
        search (`bool`, *optional*, defaults to `False`): Try learning rates instead, on validation questions.

    Returns:
        `dict`: what `report.json` or `search.json` holds.

    Raises:
        `OSError`, `ValueError`: if a recipe cannot be compared, or a run fails.
    """
    if seeds < 1 or (max_steps is not None and max_steps < 1):
        raise ValueError(f"--seeds and --max-steps must be at least 1, got {seeds} and {max_steps}.")
    paths = [Path(path) for path in recipes or [HERE / f"{name}.yaml" for name in RECIPES]]
    if len({path.stem for path in paths}) < len(paths):
        raise ValueError("Two recipes have the same file name, by which runs are told apart: rename one.")
    read, output = {path.stem: read_recipe(path) for path in paths}, Path(output)
    output.mkdir(parents=True, exist_ok=True)
    bases = sorted({Path(recipe["model_name_or_path"]).name for recipe in read.values()}, reverse=True)
    for base in bases:
        make_base(base, output)
    began = time.time()
    if search:
        return _search(read, output, max_steps)
    data = {seed: make_data(output, seed) for seed in range(seeds)}
    plan: dict[str, list] = {}
    for base in bases:
        untrained = next(r for r in read.values() if Path(r["model_name_or_path"]).name == base)
        untrained = {**untrained, "model_init_kwargs": None, "learning_rate": 0.0}
        start = {**run_recipe(f"before-{base}", untrained, 0, output), "max_steps": 0}
        plan[BEFORE[base]] = [Run(output / run_name(f"before-{base}", seed), [start], data[seed]) for seed in data]
    for name, recipe in read.items():
        recipes = [run_recipe(name, recipe, seed, output, max_steps) for seed in data]
        plan[name] = [Run(output / run_name(name, seed), [recipes[seed]], data[seed]) for seed in data]
    done = iter(run_all([runs[seed] for seed in data for runs in plan.values()]))
    by_seed = [dict(zip(plan, done, strict=False)) for _ in data]
    results = {name: [some[name] for some in by_seed] for name in plan}
    text = markdown_table(rows_of(results))
    print(f"\nPercent right, mean of {seeds} seeds ± standard deviation:\n{text}\n")
    plot(results, output / "compare.png")
    (output / "compare.md").write_text(text + "\n", encoding="utf-8")
    report = {"runs": results, "seconds": round(time.time() - began, 1)}
    (output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"Table, chart, every run: {output}/compare.md, compare.png, report.json")
    return report


def _search(read: dict[str, dict], output: Path, max_steps: int | None) -> dict:
    """Three rates for each recipe; where the best is the lowest or the highest, one more beyond it, up to `MOST`."""
    data, tried = make_data(output, SEARCH_SEED, search=True), {name: {} for name in read}
    waiting = [(name, factor) for name in read for factor in FACTORS]
    while waiting:
        runs = []
        for name, factor in waiting:
            recipe = run_recipe(name, read[name], SEARCH_SEED, output, max_steps, factor)
            runs.append(Run(output / run_name(name, SEARCH_SEED, factor), [recipe], data, "val"))
        for (name, factor), result in zip(waiting, run_all(runs), strict=True):
            tried[name][factor] = result
        waiting = []
        for name, some in tried.items():
            best = max(some, key=lambda factor, some=some: some[factor]["scores"]["AVG"])
            if len(some) < MOST and best in (min(some), max(some)):
                waiting.append((name, best / 3 if best == min(some) else best * 3))
    rows = []
    for name, some in tried.items():
        for _, result in sorted(some.items()):
            (recipe,) = result["recipes"]
            row = {"recipe": name, "learning rate": f"{recipe['learning_rate']:g}", "steps": recipe["max_steps"]}
            rows.append({**row, **{column: result["scores"][column] for column in ("TXT", "IMG", "NO", "AVG")}})
    best = {name: max((r for r in rows if r["recipe"] == name), key=lambda r: r["AVG"]) for name in read}
    text = markdown_table([{**row, "best": "*" if row is best[row["recipe"]] else ""} for row in rows])
    print(f"\nPercent right on validation questions, one seed:\n{text}")
    (output / "search.md").write_text(text + "\n", encoding="utf-8")
    found = {"rows": rows, "best": {name: float(row["learning rate"]) for name, row in best.items()}}
    (output / "search.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found
