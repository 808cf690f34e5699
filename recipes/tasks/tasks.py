"""
Captions and boxes on two CPU cores and without a network:

    python -m lavin.recipes.tasks

The quickstart's two tiny towers, joined once by the pool-adapter, which keeps where things are, and once by the taps,
which read class tokens; both are trained alike and asked the same.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from ..data.captions import Captions
from ..data.grounding import Grounding
from ..data.prepare import prepare
from ..evaluate.caption import evaluate_caption, most_frequent, score_captions
from ..evaluate.grounding import PICTURE, evaluate_grounding
from ..figures import plot_loss, read_losses
from ..init import init_folder
from ..quickstart.quickstart import TAPS, TINY, say
from ..report import markdown_table
from .data import SIZES, write_tasks


RECIPE = Path(__file__).resolve().parent / "sft.yaml"
OUTPUT = "outputs/tasks"  # the folder the recipe names
DECIMALS = 2  # of a coordinate: a hundredth of 64 pixels is less than one
SETTINGS = {
    "pool": {"projector_type": "pool", "pool_size": 4},  # all of the tiny tower's 4 x 4 patches
    "taps": {"projector_type": "taps", "vision_feature_layers": TAPS},
}
LOST = "the most frequent caption"


def prepare_rows(data: Path, output: Path) -> int:
    """Writes the training rows of both tasks as `lavin data` does, and returns their number."""
    captions = Captions(data / "captions_train.json", data / "images/train")
    boxes = Grounding([data / "grounding_train.jsonl"], data / "images/train", DECIMALS)
    made = [prepare(captions, output / "captions", "train"), prepare(boxes, output / "grounding", "train")]
    return sum(part.rows for part in made)


def run_train(name: str, output: Path, arguments: list[str]) -> float:
    """
    Runs `lavin train` on the recipe with a model of its own, in a process of its own.

    Returns:
        `float`: seconds.

    Raises:
        `RuntimeError`: if it fails.
    """
    recipe = RECIPE
    if output != Path(OUTPUT):
        recipe = output / RECIPE.name
        recipe.write_text(RECIPE.read_text(encoding="utf-8").replace(OUTPUT, output.as_posix()), encoding="utf-8")
    shown = os.path.relpath(recipe) if recipe.is_relative_to(Path.cwd()) else str(recipe)
    own = ["--model_name_or_path", str(output / name), "--output_dir", str(output / f"{name}-trained"), *arguments]
    print("$ lavin train --config", shown, *own, flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONWARNINGS": "ignore::FutureWarning", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    start = time.time()
    command = [sys.executable, "-m", "lavin.recipes.cli", "train", "--config", str(recipe), *own]
    if code := subprocess.run(command, env=environment, check=False).returncode:
        raise RuntimeError(f"`lavin train` ended with exit code {code}; its own message is above.")
    return time.time() - start


def score(name: str, data: Path, output: Path) -> dict:
    """Asks a trained model for boxes and captions, and returns its scores."""
    folder, results = output / f"{name}-trained", output / "eval" / name
    shutil.rmtree(results, ignore_errors=True)
    boxes, table = evaluate_grounding(
        folder, [data / "grounding_test.jsonl"], data / "images/test", results / "grounding", batch_size=64
    )
    print(table)
    captions, table = evaluate_caption(
        folder, data / "captions_test.json", data / "images/test", results / "caption", batch_size=32
    )
    print(table)
    return {"IoU >= 0.5": boxes["scores"]["grounding_test"], "mean IoU": boxes["mean_iou"],
            "no box": boxes["unparsable"], **captions["scores"]}  # fmt: skip


def copied_caption(data: Path) -> tuple[str, dict]:
    """The caption that is most frequent in training, and its scores when it is said of every test image."""
    notes = json.loads((data / "captions_train.json").read_text(encoding="utf-8"))["annotations"]
    caption = most_frequent([note["caption"] for note in notes])
    asked = Captions(data / "captions_test.json", data / "images/test").questions()
    answers = {question["id"]: caption for question in asked}
    return caption, score_captions(answers, {question["id"]: question["expected"] for question in asked})


def main(arguments: list[str] | None = None) -> dict:
    """
    Runs both settings.

    Args:
        arguments (`list[str]`, *optional*): Command line arguments; defaults to those of the process.

    Returns:
        `dict`: what `report.json` holds.
    """
    parser = argparse.ArgumentParser(prog="python -m lavin.recipes.tasks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help="where everything is written")
    parser.add_argument("--max-steps", type=int, help="train for fewer steps than the recipe says")
    parser.add_argument(
        "--scenes", type=int, help=f"scenes to train on ({SIZES['train']:,}); a tenth as many to test on"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # two are hardly faster for matrices this small, and much slower on a busy machine
    started, output, data = time.time(), options.output, options.output / "data"
    for folder in (data, output / "rows", *(output / f"{name}{end}" for name in SETTINGS for end in ("", "-trained"))):
        shutil.rmtree(folder, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)

    say("1. Drawing scenes, their captions and boxes")
    sizes = {"train": options.scenes, "test": max(1, options.scenes // 10)} if options.scenes else SIZES
    write_tasks(data, sizes)
    rows = prepare_rows(data, output / "rows")
    print(f"{rows:,} rows in {output / 'rows'}, of which the recipe takes the shares it names")
    fewer = ["--max_steps", str(options.max_steps), "--save_steps", str(options.max_steps)]
    table, seconds = [], {}
    for number, (name, settings) in enumerate(SETTINGS.items(), 2):
        say(f"{number}. {name}: projector and language model are trained by lavin train, then asked")
        init_folder(TINY / "vision", TINY / "text", output / name, **settings)
        seconds[name] = round(run_train(name, output, fewer if options.max_steps else []), 1)
        plot_loss(read_losses(output / f"{name}-trained"), output / f"loss-{name}.png", f"{name}: captions and boxes")
        table.append({"percent": name, **score(name, data, output)})
        shutil.copy(output / "eval" / name / "grounding" / PICTURE, output / f"boxes-{name}.png")
    caption, scores = copied_caption(data)
    table.append({**dict.fromkeys(table[0]), "percent": LOST, **scores})

    say("The same test for both")
    text = markdown_table(table)
    print(text)
    report = {
        "scores": {row.pop("percent"): row for row in [dict(row) for row in table]},
        "most_frequent_caption": caption, "rows": rows, "train_seconds": seconds,
        "total_seconds": round(time.time() - started, 1),
    }  # fmt: skip
    (output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (output / "report.md").write_text(f"{text}\n", encoding="utf-8")
    trained = ", ".join(f"{name} {took:.0f} s" for name, took in seconds.items())
    print(f"\n{report['total_seconds']:.0f} s in all; training {trained}.")
    print(f"Report: {output}/report.json, report.md. Boxes on their images: {output}/boxes-pool.png, boxes-taps.png")
    return report
