"""Writes a small data set in ScienceQA's own format."""

import json
import random
from pathlib import Path

from ..data.scienceqa import image_path
from .world import (
    Drawing,
    context_problem,
    digit_problem,
    digit_scans,
    draw,
    drawing_problem,
    knowledge_problem,
    render_scan,
    split_scans,
)


# Questions per split: drawings, scans, text with a hint, text without.
SIZES = {"train": (3000, 1600, 700, 700), "val": (60, 40, 30, 30), "test": (320, 320, 160, 160)}


def question_key(problem: dict) -> tuple:
    """What makes a text-only question the same as another."""
    return problem["question"], problem["hint"], tuple(problem["choices"])


def write_dataset(
    folder: str | Path, sizes: dict[str, tuple[int, int, int, int]] | None = None, seed: int = 0
) -> Path:
    """
    Writes the quickstart's data set in ScienceQA's format. The same seed gives the same files.

    No image and no text-only question of one split is in another: drawings are drawn anew, and the real scans are
    divided between the splits (a training scan may carry several questions, a test scan carries one while they last).

    Args:
        folder (`str` or `Path`): Where `problems.json`, `pid_splits.json`, `captions.json` and `images/` are written.
        sizes (`dict`, *optional*, defaults to `SIZES`): Questions of each split: on drawings, on scans, on text with
            a hint, on text without.
        seed (`int`, *optional*, defaults to 0): Seed of everything that is drawn.

    Returns:
        `Path`: the folder.
    """
    folder = Path(folder)
    scans, labels = digit_scans()
    problems, splits, captions, asked = {}, {}, {}, set()
    for split, numbers in (sizes or SIZES).items():
        rng = random.Random(f"quickstart {split} {seed}")
        indices = [int(index) for index in split_scans()[split]]
        makers = [0] * numbers[0] + [1] * numbers[1] + [2] * numbers[2] + [3] * numbers[3]
        rng.shuffle(makers)
        splits[split], used = [], 0
        for maker in makers:
            pid, image = str(len(problems) + 1), None
            if maker == 0:
                drawing = Drawing.sample(rng)
                image, problem = draw(drawing, rng), drawing_problem(drawing, rng)
            elif maker == 1:
                index = indices[used % len(indices)]
                used += 1
                image, problem = render_scan(scans[index]), digit_problem(int(labels[index]), rng)
            else:
                make = context_problem if maker == 2 else knowledge_problem
                while question_key(problem := make(rng)) in asked:
                    pass
            problem["split"] = split
            if image is not None:
                problem["image"] = "image.png"
                captions[pid] = problem["solution"]
                path = image_path(folder, pid, problem)
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
            problems[pid] = problem
            splits[split].append(pid)
        asked |= {question_key(problems[pid]) for pid in splits[split] if not problems[pid]["image"]}
    for name, content in (("problems", problems), ("pid_splits", splits), ("captions", {"captions": captions})):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder
