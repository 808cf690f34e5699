"""
A LaVIN from nothing to answers, on two CPU cores and without a network:

    python -m lavin.recipes.quickstart

Two tiny frozen towers that have never met, a ScienceQA-format data set, `trl sft` on the adapter alone, accuracy
before and after with two controls, and the adapter repository loaded again in a fresh process.
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
from PIL import Image, ImageOps
from safetensors import safe_open

from lavin.images_lavin import read_image

from ..data.rows import write_parquet
from ..data.scienceqa import LETTERS, format_answer, format_question, scienceqa_rows
from ..figures import plot_loss, plot_routing, read_losses
from .data import write_dataset
from .evaluate import evaluate, load_questions


HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny"
RECIPE = HERE / "sft.yaml"
OUTPUT = "outputs/quickstart"  # the folder the recipe names
TAPS = [3, 4, 5, 6, 7, 8]  # blocks of the tiny vision tower whose class token is read
COLUMNS = [
    ("drawings", "questions on drawings"), ("digits", "questions on real handwritten digits"),
    ("IMG", "all questions with an image"), ("TXT", "text only, answer in the context"),
    ("NO", "text only, no context"), ("AVG", "all questions"),
    ("wrong_image", "control: another question's image"), ("no_image", "control: image left out"),
    ("chance", "guessing, questions with an image"),
]  # fmt: skip


def say(text: str):
    """Announces the next thing that happens."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def make_model(folder: Path):
    """Joins the two tiny towers to a light folder (no weights: it names where they are), as `lavin init` does."""
    from lavin import LavinForConditionalGeneration, LavinProcessor

    from ..init import init_folder

    init_folder(TINY / "vision", TINY / "text", folder, vision_feature_layers=TAPS)
    # The weights are stored as float16, which a CPU computes slowly.
    model = LavinForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, LavinProcessor.from_pretrained(folder)


def recipe_for(output: Path) -> Path:
    """The recipe as it is, or, for another output folder, a copy with that folder's name in it."""
    if output == Path(OUTPUT):
        return RECIPE
    copy = output / RECIPE.name
    copy.write_text(RECIPE.read_text(encoding="utf-8").replace(OUTPUT, output.as_posix()), encoding="utf-8")
    return copy


def run_sft(recipe: Path, arguments: list[str]) -> tuple[float, float]:
    """
    Runs `trl sft` in a process of its own, with its progress shown.

    Returns:
        `tuple[float, float]`: seconds on the clock and of the processor.

    Raises:
        `RuntimeError`: if it fails.
    """
    trl = Path(sys.executable).with_name("trl")
    command = [
        str(trl) if trl.exists() else (shutil.which("trl") or "trl"),
        "sft",
        "--config",
        str(recipe),
        *arguments,
    ]
    shown = os.path.relpath(recipe) if recipe.is_relative_to(Path.cwd()) else str(recipe)
    print("$ trl sft --config", shown, *arguments, flush=True)
    start, before = time.time(), os.times()
    offline = {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **offline}
    result = subprocess.run(command, env=environment, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"`trl sft` ended with exit code {result.returncode}; its own message is above.")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.time() - start, used


def count_trained(adapter: Path) -> int:
    """Number of values in an adapter file: everything that was trained."""
    with safe_open(str(adapter), framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def show_table(before: dict[str, float], after: dict[str, float]):
    """Prints accuracy before and after."""
    print(f"\n{'percent right':52}{'before':>8}{'after':>8}")
    for key, meaning in COLUMNS:
        print(f"{key:13}{meaning:39}{before[key]:8.1f}{after[key]:8.1f}")


def read_own_image(path: str) -> Image.Image:
    """Reads the user's image, upright, transparent parts as white paper."""
    image = Image.open(path)
    if not image.has_transparency_data:
        return read_image(image)
    image = ImageOps.exif_transpose(image).convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image).convert("RGB")


def pick_questions(data: Path, image: Path | None, question: str, choices: list[str]) -> list[dict]:
    """Three questions of the test split (drawing, digit, text); the user's image takes the digit's place."""
    picked = {}
    for entry in load_questions(data):
        problem = entry["problem"]
        path = data / "images" / "test" / entry["id"] / "image.png" if entry["image"] is not None else None
        picked.setdefault(problem["category"], {"prompt": entry["prompt"], "image": path and str(path),
                                                "expected": format_answer(problem)})  # fmt: skip
    if image:
        problem = {"question": question, "choices": choices, "hint": "", "lecture": "", "solution": ""}
        picked["digit"] = {"prompt": format_question(problem), "image": str(image), "expected": None}
    return [picked[category] for category in ("drawing", "digit", "text")]


def main(arguments: list[str] | None = None) -> dict:
    """
    Runs the quickstart.

    Args:
        arguments (`list[str]`, *optional*): Command line arguments; defaults to those of the process.

    Returns:
        `dict`: what `report.json` holds.
    """
    parser = argparse.ArgumentParser(prog="python -m lavin.recipes.quickstart", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help="where everything is written")
    parser.add_argument(
        "--image", help="an image of your own to ask about at the end (a dark digit on light paper, say)"
    )
    parser.add_argument("--question", default="Which digit is shown?", help="what to ask about it")
    parser.add_argument("--choices", default="1,3,5,7", help="the choices, with commas")
    parser.add_argument("--max-steps", type=int, help="train for fewer steps than the recipe says")
    options = parser.parse_args(arguments)
    choices = [choice.strip() for choice in options.choices.split(",")]
    if not 2 <= len(choices) <= len(LETTERS):
        parser.error(f"--choices: 2 to {len(LETTERS)} choices with commas between them, got {len(choices)}")
    own = None
    if options.image:
        try:
            own = read_own_image(options.image)
        except OSError as error:
            parser.error(f"--image {options.image} cannot be read: {error}")
    torch.set_num_threads(1)  # two are hardly faster for matrices this small, and much slower on a busy machine
    started = time.time()
    output, data, base = options.output, options.output / "data", options.output / "lavin-tiny"
    adapter = options.output / "lavin-tiny-mma"
    for folder in (data, base, adapter):
        shutil.rmtree(folder, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)

    say("1. Writing a ScienceQA-format data set (drawings, real handwritten digits, text)")
    write_dataset(data)
    numbers = {
        split: write_parquet(scienceqa_rows(data, split), data / f"{split}.parquet") for split in ("train", "test")
    }
    print(f"{numbers['train']:,} training and {numbers['test']:,} test questions in {data}")

    say("2. Joining a tiny vision tower and a tiny language model that have never met")
    model, processor = make_model(base)
    print(f"light folder {base}: no weights, it names {TINY.name}/vision and {TINY.name}/text")
    questions = load_questions(data)
    before = evaluate(model, processor, questions)
    print(f"before training, questions with an image: {before['IMG']:.1f}% right (chance: {before['chance']:.1f}%)")

    say("3. Training the adapter alone: unmodified trl sft")
    fewer = str(options.max_steps)
    train_seconds, train_cpu_seconds = run_sft(
        recipe_for(output), ["--max_steps", fewer, "--save_steps", fewer] if options.max_steps else []
    )
    trained = count_trained(adapter / "mma" / "adapter_model.safetensors")

    say("4. Accuracy before and after")
    model = type(model).from_pretrained(adapter, dtype=torch.float32).eval()
    after = evaluate(model, processor, questions)
    show_table(before, after)
    with torch.no_grad():
        routing = model.model.routing_table()
    plot_loss(read_losses(adapter), output / "loss.png")
    plot_routing(routing, output / "routing.png")

    say("5. A fresh process loads the adapter repository and answers")
    if own is not None:
        own.save(output / "own_image.png")
    asked = pick_questions(data, output / "own_image.png" if own is not None else None, options.question, choices)
    (output / "questions.json").write_text(json.dumps(asked, indent=1), encoding="utf-8")
    # -I: nothing of this package is importable there but what is installed
    command = [sys.executable, "-I", str(HERE / "ask.py"), str(adapter), str(output / "questions.json")]
    subprocess.run(command, check=True)

    report = {
        "before": before, "after": after,
        "train_seconds": round(train_seconds, 1), "train_cpu_seconds": round(train_cpu_seconds, 1),
        "total_seconds": round(time.time() - started, 1), "trainable_parameters": trained,
        "questions": numbers, "routing_table": [[[round(w, 4) for w in m] for m in row] for row in routing.tolist()],
    }  # fmt: skip
    (output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    total = report["total_seconds"]
    print(f"\n{trained:,} trained parameters; training {train_seconds:.0f} s ({train_cpu_seconds:.0f} CPU s),")
    print(f"{total:.0f} s in all.")
    print(f"Report, loss curve, routing table: {output}/report.json, loss.png, routing.png")
    print(f"Adapter repository: {adapter}")
    return report
