"""
The paper's ablation (arXiv 2305.15023) on the quickstart's tiny LaVIN: each row adds one part, three seeds each.

    python -m lavin.recipes.quickstart.ablation

Every run is unmodified `trl sft` with the quickstart's recipe; two run at once, one thread each. Finished runs are
kept: started again after it was stopped, the ablation goes on from there. To begin anew, remove the output folder.
"""

import argparse
import json
import math
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from tqdm import tqdm

from ..data.rows import write_parquet
from ..data.scienceqa import scienceqa_rows
from ..figures import pyplot
from ..machine import end_with_parent
from ..report import spread
from .data import write_dataset
from .evaluate import evaluate, load_questions
from .quickstart import RECIPE, make_model, run_sft


OUTPUT = "outputs/ablation"
AT_ONCE = 2  # runs, of one thread each
# At this temperature both experts weigh exactly 1/2 in float32, whatever the router says. They start equal (zero), get
# equal gradients and stay equal: one expert without a router. (Clipping sees its gradient's norm divided by sqrt(2).)
NO_ROUTER = {"router_temperature": 1e12}
TEXT_ADAPTERS = {"target_modules": r".*language_model\.layers\.\d+\.self_attn"}
# What each row trains, as fields of MMAConfig over the recipe's; "text" also leaves every image out.
ROWS = {
    "text": {**NO_ROUTER, **TEXT_ADAPTERS},
    "image": {**NO_ROUTER, **TEXT_ADAPTERS},
    "vision": {**NO_ROUTER, "vision_router": False},
    "router": {},
}
LABELS = {
    "text": "text only",
    "image": "+ image",
    "vision": "+ adapters in the vision tower",
    "router": "+ router (MMA as it is)",
}
# LaVIN-7B. Between its last two rows the paper changes to ViT-L (88.33 without the router), which no row here does.
PAPER = {"text": 82.65, "image": 86.32, "vision": 87.34, "router": 89.41}
COLUMNS = ("drawings", "digits", "IMG", "TXT", "NO", "AVG")


def run_recipe(row: str, seed: int, output: Path, max_steps: int | None = None) -> dict:
    """
    The quickstart's recipe for one run.

    Args:
        row (`str`): One of `ROWS`.
        seed (`int`): Seeds the adapter's start, the order of the rows, and the data set's questions and images.
        output (`Path`): The ablation's folder.
        max_steps (`int`, *optional*): Fewer steps than the recipe has.

    Returns:
        `dict`: settings for `trl sft`.
    """
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    train = "train-text.parquet" if row == "text" else "train.parquet"
    recipe["datasets"][0]["data_files"]["train"] = (output / f"data-{seed}" / train).as_posix()
    recipe["model_init_kwargs"]["mma"].update(ROWS[row], init_seed=seed)
    recipe["model_name_or_path"] = (output / "lavin-tiny").as_posix()
    recipe["output_dir"] = run_folder(output, row, seed).as_posix()
    recipe.update(seed=seed, save_strategy="no", max_steps=max_steps or recipe["max_steps"])
    return recipe


def run_folder(output: Path, row: str, seed: int) -> Path:
    """Where one run writes."""
    return output / f"{row}-{seed}"


def without_images(rows):
    """Leaves the images out of training rows; their prompts then say "Image: N/A"."""
    for row in rows:
        message = row["prompt"][0]
        content = [part for part in message["content"] if part["type"] != "image"]
        yield {**row, "prompt": [{**message, "content": content}], "images": []}


def write_data(folder: Path, seed: int, sizes: dict | None = None):
    """Writes one seed's data set (`sizes` as in `write_dataset`), with and without images, where it is not yet."""
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_dataset(unfinished, sizes, seed)
    write_parquet(scienceqa_rows(unfinished, "train"), unfinished / "train.parquet")
    write_parquet(without_images(scienceqa_rows(unfinished, "train")), unfinished / "train-text.parquet")
    unfinished.rename(folder)


def score(model, processor, questions: list[dict], with_images: bool) -> dict[str, float]:
    """Percent right of `COLUMNS`, on all questions; a row without images gets none here either."""
    if with_images:
        return evaluate(model, processor, questions)
    questions = [{**question, "image": None} for question in questions]
    scores = evaluate(model, processor, questions)
    for category in ("drawing", "digit"):
        some = [question for question in questions if question["problem"]["category"] == category]
        scores[f"{category}s"] = evaluate(model, processor, some)["AVG"]
    return scores


def count_acting(adapter: Path, row: str) -> int:
    """Number of trained values that a row's model depends on: without a router, two equal experts count as one."""
    count = 0
    with safe_open(str(adapter), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            size = math.prod(file.get_slice(name).get_shape())
            if row == "text" and "multi_modal_projector" in name:
                continue
            if row != "router":
                if "adapter_router" in name or "modality_embedding" in name:
                    continue
                size //= 2 if "language_model" in name and "adapter_up" in name else 1
            count += size
    return count


def one_run(row: str, seed: int, output: Path, max_steps: int | None = None) -> dict:
    """Trains and scores one run, in this process and a `trl sft` below it. Returns what `scores.json` then holds."""
    from lavin import LavinForConditionalGeneration, LavinProcessor

    torch.set_num_threads(1)
    start, folder = time.time(), run_folder(output, row, seed)
    recipe = run_recipe(row, seed, output, max_steps)
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    _, train_cpu_seconds = run_sft(folder / "sft.yaml", [])
    model = LavinForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LavinProcessor.from_pretrained(folder)
    scores = score(model, processor, load_questions(output / f"data-{seed}"), row != "text")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = {
        "row": row, "seed": seed, "scores": scores, "recipe": recipe,
        "trained": count_acting(folder / "mma" / "adapter_model.safetensors", row),
        "seconds": round(time.time() - start, 1), "train_cpu_seconds": round(train_cpu_seconds, 1),
        "cpu_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in used), 1),
    }  # fmt: skip
    unfinished = folder / "scores.json.part"
    unfinished.write_text(json.dumps(result, indent=1), encoding="utf-8")
    unfinished.rename(folder / "scores.json")
    return result


def finished(row: str, seed: int, output: Path, max_steps: int | None = None) -> dict | None:
    """The result of a run that has been made with these settings, or `None`."""
    path = run_folder(output, row, seed) / "scores.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result["recipe"] == run_recipe(row, seed, output, max_steps) else None


def steps_done(log: Path, steps: int) -> int:
    """Optimiser steps that a run's progress bar in its log shows."""
    shown = re.findall(rf"(?<!\d)(\d+)/{steps} \[", log.read_text(encoding="utf-8", errors="replace"))
    return int(shown[-1]) if shown else 0


def start_run(row: str, seed: int, output: Path, max_steps: int | None) -> subprocess.Popen:
    """Starts a run in a process group of its own, which ends when the pipe to it closes: with this process."""
    folder = run_folder(output, row, seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--one", row, str(seed)]
    command += ["--output", str(output), *(["--max-steps", str(max_steps)] if max_steps else [])]
    with open(folder / "log.txt", "wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def run_all(wanted: list[tuple[str, int]], output: Path, max_steps: int | None = None):
    """
    Makes the runs that have not been made, `AT_ONCE` at once, with one progress bar.

    Raises:
        `RuntimeError`: if a run fails; the others stop, and what was finished is kept.
    """
    steps = max_steps or yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["max_steps"]
    waiting = [run for run in wanted if finished(*run, output, max_steps) is None]
    print(f"{len(wanted)} runs of {steps} steps, {len(wanted) - len(waiting)} of them finished before", flush=True)
    done, running = 0, {}
    with tqdm(total=len(waiting) * steps, unit="step", smoothing=0, disable=not waiting) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < AT_ONCE:
                    run = waiting.pop(0)
                    running[run] = start_run(*run, output, max_steps)
                time.sleep(1)
                for run, process in list(running.items()):
                    log = run_folder(output, *run) / "log.txt"
                    if process.poll() is None:
                        continue
                    if process.returncode:
                        end = "\n".join(re.split(r"[\r\n]+", log.read_text(errors="replace").strip())[-15:])
                        raise RuntimeError(f"The run {run[0]}, seed {run[1]}, failed:\n{end}\n\nIts whole log: {log}")
                    del running[run]
                    done += steps
                    tqdm.write(one_line(finished(*run, output, max_steps)))
                logs = [run_folder(output, *run) / "log.txt" for run in running]
                bar.update(done + sum(steps_done(log, steps) for log in logs) - bar.n)
                bar.set_postfix_str(", ".join(f"{row} seed {seed}" for row, seed in running), refresh=False)
        finally:
            for process in running.values():
                process.stdin.close()


def one_line(result: dict) -> str:
    """One finished run, for people."""
    scores = "  ".join(f"{name} {result['scores'][name]:.1f}" for name in COLUMNS)
    return f"{LABELS[result['row']]}, seed {result['seed']}: {scores}  ({result['cpu_seconds']:.0f} CPU s)"


def by_row(results: list[dict], name: str) -> dict[str, list[float]]:
    """One column's scores of every row, in the order of the seeds."""
    return {row: [result["scores"][name] for result in results if result["row"] == row] for row in ROWS}


def table(results: list[dict]) -> str:
    """
    A Markdown table: the four rows, mean and spread over the seeds; what a row adds to the one above, as the mean and
    spread of each seed's own difference; and the paper's average.
    """
    trained = {result["row"]: result["trained"] for result in results}
    scores, above = {name: by_row(results, name) for name in COLUMNS}, None
    lines = [
        f"| percent right | trained | {' | '.join(COLUMNS)} | step, AVG | paper, AVG |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for row, average in scores["AVG"].items():
        cells = [spread(scores[name][row]) for name in COLUMNS]
        step = spread([a - b for a, b in zip(average, above, strict=True)], "+.1f") if above else ""
        lines.append(f"| {LABELS[row]} | {trained[row]:,} | {' | '.join(cells)} | {step} | {PAPER[row]} |")
        above = average
    return "\n".join(lines)


def plot(results: list[dict], path: Path):
    """Saves the chart: three columns beside the paper's average; closer, each seed's way through rows with images."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, colour in (("AVG", "#2f6f4f"), ("IMG", "#b3541e"), ("TXT", "#8a8a8a")):
        points = list(by_row(results, name).values())
        axes[0].plot([statistics.mean(some) for some in points], color=colour, label=f"{name}, tiny LaVIN")
        for i, some in enumerate(points):
            axes[0].plot([i] * len(some), some, "o", color=colour, markersize=4, alpha=0.6)
    axes[0].plot(list(PAPER.values()), "k--", linewidth=1, label="AVG, LaVIN-7B (paper)")
    chance = statistics.mean(result["scores"]["chance"] for result in results if result["row"] != "text")
    axes[0].axhline(chance, color="#b3541e", linewidth=0.8, linestyle=":", label="chance on IMG")
    pictured = list(by_row(results, "AVG").values())[1:]
    for seed, way in enumerate(zip(*pictured, strict=True)):
        axes[1].plot(way, "o-", linewidth=0.8, markersize=4, alpha=0.7, label=f"AVG, seed {seed}")
    axes[1].plot([statistics.mean(some) for some in pictured], color="#2f6f4f", linewidth=2.5, label="AVG, mean")
    for axis, rows in zip(axes, (list(ROWS), list(ROWS)[1:]), strict=True):
        axis.set_xticks(range(len(rows)), [LABELS[row].replace(" (", "\n(").replace(" in ", "\nin ") for row in rows])
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("percent right")
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict:
    """
    Runs the ablation: table on the screen, `report.json`, `ablation.md` and `ablation.png` in the output folder.

    Args:
        arguments (`list[str]`, *optional*): Command line arguments; defaults to those of the process.

    Returns:
        `dict`: what `report.json` holds.
    """
    parser = argparse.ArgumentParser(prog="python -m lavin.recipes.quickstart.ablation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help=f"where everything is written ({OUTPUT})")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per row (3)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="train for fewer steps than the recipe says")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # how it starts its own runs
    options = parser.parse_args(arguments)
    if options.one:
        end_with_parent()
        return one_run(options.one[0], int(options.one[1]), options.output, options.max_steps)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    start, output, seeds = time.time(), options.output, range(options.seeds)
    wanted = [(row, seed) for seed in seeds for row in ROWS]
    for seed in seeds:
        print(f"Data set of seed {seed}: {output / f'data-{seed}'}", flush=True)
        write_data(output / f"data-{seed}", seed)
    make_model(output / "lavin-tiny")
    try:
        run_all(wanted, output, options.max_steps)
    except RuntimeError as error:
        parser.exit(1, f"{error}\nFinished runs are kept: the same command goes on from here.\n")
    results = [finished(*run, output, options.max_steps) for run in wanted]
    text = table(results)
    print(f"\nMean of {options.seeds} seeds ± standard deviation:\n{text}\n")
    plot(results, output / "ablation.png")
    (output / "ablation.md").write_text(text + "\n", encoding="utf-8")
    report = {
        "runs": results,
        "cpu_seconds": round(sum(result["cpu_seconds"] for result in results), 1),
        "seconds": round(time.time() - start, 1),
    }
    (output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"{report['cpu_seconds']:,.0f} CPU seconds of runs; {report['seconds']:,.0f} s on the clock this time.")
    print(f"Chart, table, every run: {output}/ablation.png, ablation.md, report.json")
    return report


if __name__ == "__main__":
    main()
