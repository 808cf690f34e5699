"""Asks a LaVIN the questions of a data set in ScienceQA's format, by greedy decoding, and scores the letters."""

import random
import re
import time
from pathlib import Path

import torch
from PIL import Image

from lavin.recipes.data.scienceqa import LETTERS, format_question, image_path, read_scienceqa


ANSWER = re.compile(r"The answer is \(?([A-J])\b")


def parse_letter(text: str) -> int | None:
    """Index of the choice a generated answer names, or `None`: that counts as wrong and is reported as a failure."""
    found = ANSWER.search(text)
    return LETTERS.index(found.group(1)) if found else None


def load_questions(folder: str | Path, split: str = "test", prompt_format: str = "QCM-ALE") -> list[dict]:
    """
    Reads a split's questions with their images.

    Returns:
        `list[dict]`: `id`, `problem` (the record), `prompt` (text) and `image` (RGB, or `None`).
    """
    questions = []
    for pid, problem in read_scienceqa(folder, split).items():
        path = image_path(folder, pid, problem)
        image = Image.open(path).convert("RGB") if path else None
        prompt = format_question(problem, prompt_format.partition("-")[0])
        questions.append({"id": pid, "problem": problem, "prompt": prompt, "image": image})
    return questions


@torch.inference_mode()
def answer(
    model, processor, prompts: list[str], images: list, batch_size: int = 64, max_new_tokens: int = 6
) -> list[str]:
    """
    Generates one greedy answer per prompt.

    Args:
        model ([`LavinForConditionalGeneration`]): The model.
        processor ([`LavinProcessor`]): Its processor.
        prompts (`list[str]`): Questions.
        images (`list[PIL.Image.Image | None]`): The image of each question, or `None`.
        batch_size (`int`, *optional*, defaults to 64): Questions at once; rows never influence each other.
        max_new_tokens (`int`, *optional*, defaults to 6): Enough for the letter; more for the explanation.

    Returns:
        `list[str]`: the new text of each row.
    """
    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = list(zip(prompts[start : start + batch_size], images[start : start + batch_size], strict=True))
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * (image is not None) + [{"type": "text", "text": prompt}],
                }
            ]
            for prompt, image in batch
        ]
        rendered = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        rows = [[image] if image is not None else [] for _, image in batch]
        inputs = processor(
            text=rendered, images=rows if any(rows) else None, padding=True, return_tensors="pt",
            add_special_tokens=False,
        ).to(model.device)  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


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


def percent(right: list[bool]) -> float:
    """Share of `True` in percent, two decimals."""
    return round(100 * sum(right) / len(right), 2) if right else 0.0


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
        return [
            parse_letter(text) for text in answer(model, processor, [q["prompt"] for q in some], images, batch_size)
        ]

    problems = [question["problem"] for question in questions]
    letters = ask(questions, [question["image"] for question in questions])
    right = [letter == problem["answer"] for letter, problem in zip(letters, problems, strict=True)]

    def share(chosen) -> float:
        return percent([ok for ok, problem in zip(right, problems, strict=True) if chosen(problem)])

    scores = {
        "TXT": share(lambda p: p["hint"]),
        "IMG": share(lambda p: p["image"]),
        "NO": share(lambda p: not p["hint"] and not p["image"]),
        "AVG": percent(right),
        "text_only": share(lambda p: not p["image"]),
    }
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
