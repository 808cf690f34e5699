"""Accuracy of the quickstart's LaVIN, with two controls; the answers and their letters are those of `lavin eval`."""

import random
import time
from pathlib import Path

from ..evaluate import scienceqa
from ..evaluate.answers import answer, read_image
from ..evaluate.scienceqa import GROUPS, parse_letter
from ..report import percent


def load_questions(folder: str | Path, split: str = "test", prompt_format: str = "QCM-ALE") -> list[dict]:
    """
    Reads a split's questions with their images and records.

    Returns:
        `list[dict]`: `id`, `problem` (the record), `prompt` (text) and `image` (RGB, or `None`).
    """
    problems = scienceqa.read_problems(folder, split)
    return [
        {"id": asked["id"], "problem": problems[asked["id"]], "prompt": asked["prompt"],
         "image": read_image(asked["images"][0]) if asked["images"] else None}
        for asked in scienceqa.load_questions(folder, split, prompt_format)
    ]  # fmt: skip


def other_images(questions: list[dict], seed: int = 0) -> list:
    """For the control "wrong image": every question gets the image of another question of its category."""
    rng = random.Random(f"wrong image {seed}")
    pools: dict[str, list] = {}
    for question in questions:
        pools.setdefault(question["problem"]["category"], []).append(question)
    chosen = []
    for question in questions:
        pool = pools[question["problem"]["category"]]
        while (other := rng.choice(pool)) is question and len(pool) > 1:
            pass
        chosen.append(other["image"])
    return chosen


def evaluate(model, processor, questions: list[dict], batch_size: int = 64) -> dict[str, float]:
    """
    Scores a model on questions.

    Args:
        model ([`LavinForConditionalGeneration`]): The model.
        processor ([`LavinProcessor`]): Its processor.
        questions (`list[dict]`): From [`load_questions`].
        batch_size (`int`, *optional*, defaults to 64): Questions at once.

    Returns:
        `dict[str, float]`, in percent: ScienceQA's `TXT` (questions with a hint), `IMG` (with an image), `NO`
        (neither) and `AVG`; `text_only` (all without an image); one entry for every category of image questions, named
        in the plural (`digits`, `drawings`); the controls `wrong_image` and `no_image` over all image questions;
        `chance` (guessing evenly, image questions); `failed` (answers without a letter); and `seconds`.
    """
    start = time.time()
    was_training = model.training
    model.eval()

    def ask(some: list[dict], images: list) -> list[int | None]:
        prompts, rows = [q["prompt"] for q in some], [[] if image is None else [image] for image in images]
        # Six tokens are enough for the letter.
        return [parse_letter(text) for text in answer(model, processor, prompts, rows, batch_size, max_new_tokens=6)]

    problems = [question["problem"] for question in questions]
    letters = ask(questions, [question["image"] for question in questions])
    right = [letter == problem["answer"] for letter, problem in zip(letters, problems, strict=True)]

    def share(chosen) -> float | None:
        return percent([ok for ok, problem in zip(right, problems, strict=True) if chosen(problem)])

    scores = {name: share(GROUPS[name]) for name in ("TXT", "IMG", "NO", "AVG")}
    scores["text_only"] = share(lambda p: not p["image"])
    pictured = [question for question in questions if question["image"] is not None]
    for category in sorted({question["problem"]["category"] for question in pictured}):
        scores[f"{category}s"] = share(lambda p, category=category: p["image"] and p["category"] == category)
    for control, images in (("wrong_image", other_images(pictured)), ("no_image", [None] * len(pictured))):
        guesses = ask(pictured, images)
        scores[control] = percent([g == q["problem"]["answer"] for g, q in zip(guesses, pictured, strict=True)])
    odds = [100 / len(question["problem"]["choices"]) for question in pictured]
    scores["chance"] = round(sum(odds) / len(odds), 2) if odds else 0.0
    scores["failed"] = percent([letter is None for letter in letters])
    scores["seconds"] = round(time.time() - start, 1)
    model.train(was_training)
    return scores
