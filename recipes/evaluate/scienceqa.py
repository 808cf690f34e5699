"""ScienceQA: asks a LaVIN, and scores as the official scorer does (tools/evaluate_acc.py of lupantech/ScienceQA)."""

import json
import os
import re
from pathlib import Path

from lavin.files_lavin import read_text

from ..data.scienceqa import (
    LETTERS,
    ScienceQA,
    format_question,
    image_path,
    read_captions,
    read_scienceqa,
)
from ..report import markdown_table, percent
from .run import ask_model, check_ids, read_answer_file, write_results


ANSWER = re.compile(r"The answer is \(?([A-Z])\b")
HUB = "derek-thomas/ScienceQA"
COLUMNS = ("question", "image", "choices", "answer", "hint", "subject", "grade")  # of the Hub's form, to ask and score
SIZES = {"train": 12726, "val": 4241, "validation": 4241, "test": 4241}  # of the real data set


def _grades(first: int, last: int) -> set[str]:
    return {f"grade{i}" for i in range(first, last + 1)}


GROUPS = {
    "NAT": lambda p: p["subject"] == "natural science",
    "SOC": lambda p: p["subject"] == "social science",
    "LAN": lambda p: p["subject"] == "language science",
    "TXT": lambda p: bool(p["hint"]),  # with or without an image
    "IMG": lambda p: bool(p["image"]),  # with or without a hint
    "NO": lambda p: not p["hint"] and not p["image"],
    "G1-6": lambda p: p["grade"] in _grades(1, 6),
    "G7-12": lambda p: p["grade"] in _grades(7, 12),
    "AVG": lambda p: True,
}


def parse_letter(text: str, choices: int = len(LETTERS)) -> int | None:
    """
    Reads the choice out of an answer: the letter after the first "The answer is", standing alone.

    Args:
        text (`str`): The answer.
        choices (`int`, *optional*, defaults to 10): How many there are.

    Returns:
        `int`: the choice's index, or `None`: no such letter, or not one of the choices. That counts as wrong (the
        reference draws a choice at random).
    """
    found = ANSWER.search(text)
    index = LETTERS.find(found.group(1)) if found else -1
    return index if 0 <= index < choices else None


def to_choice(value, choices: int) -> int | None:
    """The choice that a prediction names, given as index (also written as text: "2") or as answer text."""
    if isinstance(value, str):
        if not re.fullmatch(r"\s*\d{1,9}\s*", value):
            return parse_letter(value, choices)
        value = int(value)
    if isinstance(value, float):  # JSON as Python writes it may hold NaN and Infinity
        value = int(value) if value.is_integer() else None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value < choices else None


def score_scienceqa(problems: dict[str, dict], predictions: dict) -> tuple[dict[str, float | None], int]:
    """
    The official table.

    Args:
        problems (`dict[str, dict]`): Records of `problems.json` by id: the questions to score.
        predictions (`dict`): By id, the index of a choice or the text of an answer.

    Returns:
        `tuple(dict, int)`: percent right in each group, `None` for one without questions; and how many predictions
        name no choice, which are wrong.
    """
    chosen = {pid: to_choice(predictions[pid], len(problem["choices"])) for pid, problem in problems.items()}
    right = {pid: chosen[pid] == problem["answer"] for pid, problem in problems.items()}
    scores = {
        name: percent([right[pid] for pid, problem in problems.items() if belongs(problem)])
        for name, belongs in GROUPS.items()
    }
    return scores, sum(choice is None for choice in chosen.values())


def score_predictions(root: str | os.PathLike, split: str, predictions: str | os.PathLike) -> dict:
    """
    Scores a file of predictions.

    Args:
        root (`str` or `os.PathLike`): ScienceQA's folder.
        split (`str`): Which split the predictions are for.
        predictions (`str` or `os.PathLike`): JSON from question id to the index of a choice or the text of an answer,
            or a `predictions.jsonl`.

    Returns:
        `dict`: what `results.json` holds.

    Raises:
        `OSError`, `ValueError`: if a file is not there or a question of the split has no prediction.
    """
    problems = read_problems(root, split)
    answers, header = read_answer_file(predictions)
    check_ids(answers, list(problems), [*problems, *_all_ids(root)], f"split {split!r}")
    run = {"model": header["model"], "settings": header["settings"]} if header else {"model": None, "settings": {}}
    return _results(problems, split, answers, run)


def evaluate_scienceqa(
    model: str | os.PathLike,
    root: str | os.PathLike,
    split: str,
    output: str | os.PathLike,
    prompt_format: str = "QCM-ALE",
    captions: bool = False,
    max_new_tokens: int | None = None,
    **options,
) -> tuple[dict, str]:
    """
    Asks a model a split of ScienceQA and scores its answers.

    Args:
        model (`str` or `os.PathLike`): A LaVIN folder or Hub name.
        root (`str` or `os.PathLike`): The official files, or the folder of the data set on the Hub.
        split (`str`): Which split.
        output (`str` or `os.PathLike`): The folder for answers and results.
        prompt_format (`str`, *optional*, defaults to `"QCM-ALE"`): As the model was trained.
        captions (`bool`, *optional*, defaults to `False`): Adds the image's caption to the context.
        max_new_tokens (`int`, *optional*): 64 by default; 512 where lecture or explanation come before the answer.
        options: `mode`, `batch_size`, `device`, `dtype` of [`~run.ask_model`].

    Returns:
        `tuple(dict, str)`: what `results.json` holds, and the table.
    """
    problems = read_problems(root, split)
    if max_new_tokens is None:
        max_new_tokens = 64 if prompt_format.partition("-")[2].startswith("A") else 512
    settings = {"format": prompt_format, "captions": captions}
    questions = load_questions(root, split, prompt_format, captions)
    records, run = ask_model(model, questions, output, "scienceqa", settings, max_new_tokens, **options)
    results = _results(problems, split, {pid: record["answer"] for pid, record in records.items()}, run)
    table = show(results)
    return write_results(output, results, table), table


def load_questions(
    root: str | os.PathLike, split: str, prompt_format: str = "QCM-ALE", captions: bool = False
) -> list[dict]:
    """
    A split's questions as [`~run.ask_model`] takes them.

    Returns:
        `list[dict]`: `id`, `prompt`, `images` (paths, or bytes from Parquet), `choices` (how many).
    """
    inputs = ScienceQA(root, split, prompt_format, captions).inputs  # and checks all four
    texts = read_captions(root) if captions else {}
    questions = []
    for pid, problem in read_problems(root, split).items():
        image = problem["image"]
        image = image["bytes"] if isinstance(image, dict) else image_path(root, pid, problem)
        prompt = format_question(problem, inputs, texts.get(pid, ""))
        images = [image] if image else []
        questions.append({"id": pid, "prompt": prompt, "images": images, "choices": len(problem["choices"])})
    return questions


def show(results: dict) -> str:
    """The table and what must be said with it."""
    dataset, scores = results["dataset"], results["scores"]
    lines = [f"{dataset['name']}, percent right:", "", markdown_table([scores]), ""]
    lines.append(f"{results['unparsable']} of {dataset['questions']} answers name no choice; they count as wrong.")
    return "\n".join(lines)


def read_problems(root: str | os.PathLike, split: str) -> dict[str, dict]:
    """
    Reads the records of a split by id. In the data set's form on the Hub, which has no ids, they are called by split
    and row (`test-0`), as `lavin data scienceqa` calls them, and an image is its bytes.

    Raises:
        `OSError`, `ValueError`: if there is no such data set or split, or it has no questions.
    """
    if Path(root, "problems.json").is_file():
        problems = read_scienceqa(root, split)
    else:
        import pyarrow.parquet as parquet

        source = ScienceQA(root, split)
        for file in source.parquet:
            names = parquet.read_schema(file).names
            if missing := [name for name in COLUMNS if name not in names]:
                made = "`lavin data` wrote it: name the folder that it was made from" if "prompt" in names else ""
                raise ValueError(
                    f"{file} is not ScienceQA: it has no column {', '.join(missing)}. "
                    f"{made or 'Name the official files, or the data set as it is on the Hub'}."
                )
        rows = (row for file in source.parquet for row in parquet.read_table(file).to_pylist())
        problems = {source.name(i): row for i, row in enumerate(rows)}
    if not problems:
        raise ValueError(f"The split {split!r} of {root} has no questions.")
    return problems


def _all_ids(root) -> list[str]:
    file = Path(root, "pid_splits.json")
    splits = json.loads(read_text(file)) if file.is_file() else {}
    return [pid for ids in splits.values() for pid in ids]


def _results(problems: dict, split: str, answers: dict, run: dict) -> dict:
    scores, unparsable = score_scienceqa(problems, answers)
    whole = SIZES.get(split) == len(problems)
    name = f"ScienceQA ({split})" if whole else f"{len(problems)} questions in ScienceQA's format ({split})"
    return {
        "task": "scienceqa",
        "dataset": {"name": name, "hub": HUB if whole else None, "split": split, "questions": len(problems)},
        "scores": scores,
        "benchmark": {"scienceqa": scores["AVG"]} if whole and split == "test" else {},
        "unparsable": unparsable,
        **run,
    }
