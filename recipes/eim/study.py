"""
EIM's idea on the quickstart's tiny LaVIN: a measure in encoder, projector and language model, each alone and all of
them, against plain training with the same number of steps.

    python -m lavin.recipes.eim

Each run is what `lavin train-segments` does with the recipe of that name, in a process of its own. Finished runs are
kept: started again after it was stopped, the study goes on from there. To begin anew, remove the output folder.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import yaml

from ..compare.runs import Run, run_all
from ..compare.tiny import GPT2_PAIR, PAIR, make_base, make_data
from ..report import markdown_table, spread
from ..segments.recipe import read_recipe
from .views import write_views


HERE = Path(__file__).resolve().parent
OUTPUT = "outputs/eim"  # the folder that the recipes name
LABELS = {
    "plain": "plain",
    "encoder": "encoder: views",
    "projector": "projector: first alone",
    "language": "language model: noise",
    "all": "all three",
}
# EIM's other test beds, one seed: as they are, and with all three.
OTHERS = {
    "llama_adapter_plain": "LLaMA-Adapter, plain",
    "llama_adapter_all": "LLaMA-Adapter, all three",
    "clipcap_plain": "ClipCap-like, plain",
    "clipcap_all": "ClipCap-like, all three",
}
COLUMNS = ("drawings", "digits", "IMG", "TXT", "NO", "AVG")


def study_run(name: str, seed: int, output: Path, max_steps: int | None = None) -> Run:
    """
    One run of a recipe.

    Args:
        name (`str`): Of a recipe in this folder.
        seed (`int`): Seeds the rows, their order, their views, and the start of an adapter.
        output (`Path`): The study's folder.
        max_steps (`int`, *optional*): At most so many steps in each segment.
    """
    folder = output / f"{name}-{seed}"
    text = (HERE / f"{name}.yaml").read_text(encoding="utf-8")
    text = text.replace(f"{OUTPUT}-{name}", folder.as_posix()).replace(OUTPUT, output.as_posix())
    recipe = yaml.safe_load(text.replace("data-0/", f"data-{seed}/").replace("seed: 0", f"seed: {seed}"))
    # `lavin train-segments` trains MMA or weights of the base: an adapter of PEFT's own takes MMA's place here.
    adapters = [segment.pop("peft", None) for segment in recipe["segments"]]
    for segment, adapter in zip(recipe["segments"], adapters, strict=True):
        segment.update({"mma": {}} if adapter else {})
    copy = output / "recipes" / f"{folder.name}.yaml"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    recipes = [segment.values for segment in read_recipe(copy)[1]]
    for recipe, adapter in zip(recipes, adapters, strict=True):
        if adapter:
            recipe["model_init_kwargs"] = {"peft": adapter}
        recipe["max_steps"] = min(recipe["max_steps"], max_steps or recipe["max_steps"])
        recipe["learning_rate"] = float(recipe["learning_rate"])
    return Run(folder, recipes, output / f"data-{seed}")


def rows_of(results: dict[str, list[dict]]) -> list[dict]:
    """The table's rows: mean and standard deviation, and each seed's own difference to plain training."""
    rows = []
    for name, some in results.items():
        row = {"": {**LABELS, **OTHERS}[name]}
        for column in COLUMNS:
            row[column] = spread([result["scores"][column] for result in some])
        plain = results[name.replace("all", "plain") if name in OTHERS else "plain"]
        gains = [a["scores"]["AVG"] - b["scores"]["AVG"] for a, b in zip(some, plain, strict=False)]
        row["gain, AVG"] = "" if some is plain else spread(gains, "+.1f")
        row["text ability"] = spread([result["text"]["skill"] for result in some])
        row["CPU s"] = f"{sum(result['cpu_seconds'] for result in some) / len(some):.0f}"
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> dict:
    """
    Runs the study: table on the screen, `eim.md` and `report.json` in the output folder.

    Args:
        arguments (`list[str]`, *optional*): Command line arguments; defaults to those of the process.

    Returns:
        `dict`: what `report.json` holds.
    """
    parser = argparse.ArgumentParser(prog="python -m lavin.recipes.eim", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help=f"where everything is written ({OUTPUT})")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each recipe (3)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="at most so many steps in each segment")
    names = [*LABELS, *OTHERS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    began, output, seeds = time.time(), options.output, range(options.seeds)
    wanted = set(options.only or names)
    wanted |= {name.replace("all", "plain") if name in OTHERS else "plain" for name in wanted}
    output.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        data = make_data(output, seed)
        if not (data / "train-views.parquet").exists():
            write_views(data / "train.parquet", data / "train-views.parquet", seed)
    for base in (PAIR, GPT2_PAIR) if any(name.startswith("clipcap") for name in wanted) else (PAIR,):
        make_base(base, output)
    plan = [(name, seed) for seed in seeds for name in LABELS if name in wanted]
    plan += [(name, 0) for name in OTHERS if name in wanted]
    try:
        done = run_all([study_run(name, seed, output, options.max_steps) for name, seed in plan])
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    results: dict[str, list[dict]] = {}
    for (name, _), result in sorted(zip(plan, done, strict=True), key=lambda pair: names.index(pair[0][0])):
        results.setdefault(name, []).append(result)
    text = markdown_table(rows_of(results))
    print(f"\nPercent right, mean of {options.seeds} seeds ± standard deviation:\n{text}\n")
    (output / "eim.md").write_text(text + "\n", encoding="utf-8")
    report = {"runs": results, "seconds": round(time.time() - began, 1)}
    (output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"Table, every run: {output}/eim.md, report.json")
    return report
