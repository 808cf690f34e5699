"""POPE (arXiv 2305.10355): accuracy, precision, recall, F1 and how often the model says yes."""

import os
import re

from ..data.pope import CATEGORIES, POPE
from ..report import markdown_table
from .run import ask_model, write_results


MEASURES = ("accuracy", "precision", "recall", "F1", "yes")


def says_yes(answer: str) -> bool:
    """As POPE's own scorer reads it: the first sentence says no if it has "no", "No" or "not" as a word, else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"no", "No", "not"} & set(words)


def score_pope(said: list[bool], wanted: list[bool]) -> dict[str, float]:
    """
    The benchmark's measures in percent; "yes" is what is to be found.

    Args:
        said, wanted (`list[bool]`): The model's and the true answers, `True` for yes.

    Returns:
        `dict[str, float]`: accuracy, precision, recall, F1, and `yes`, the share of the answers that say so. A measure
        with nothing to divide by is 0.
    """
    hits = sum(s and w for s, w in zip(said, wanted, strict=True))
    right = sum(s == w for s, w in zip(said, wanted, strict=True))
    precision, recall = hits / max(1, sum(said)), hits / max(1, sum(wanted))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    values = (right / len(said), precision, recall, f1, sum(said) / len(said))
    return {name: round(100 * value, 2) for name, value in zip(MEASURES, values, strict=True)}


def evaluate_pope(
    model: str | os.PathLike,
    inputs: list[str | os.PathLike],
    image_root: str | os.PathLike,
    output: str | os.PathLike,
    max_new_tokens: int = 64,
    **options,
) -> tuple[dict, str]:
    """
    Asks a model POPE's questions and scores its answers.

    Args:
        model (`str` or `os.PathLike`): A LaVIN folder or Hub name.
        inputs, image_root: As of [`POPE`]: a file for each category.
        output (`str` or `os.PathLike`): The folder for answers and results.
        max_new_tokens (`int`, *optional*, defaults to 64): Longest answer; greedy.
        options: `batch_size`, `device`, `dtype` of [`~run.ask_model`].

    Returns:
        `tuple(dict, str)`: what `results.json` holds, and the table. `F1` is the mean of the three categories', where
        all of them were asked.
    """
    source = POPE(inputs, image_root)
    asked = source.questions()
    records, run = ask_model(model, asked, output, "pope", {}, max_new_tokens=max_new_tokens, **options)
    answers = {question["id"]: records[question["id"]]["answer"] for question in asked}
    rows = {}
    for name in source.names:
        mine = [question for question in asked if question["group"] == name]
        said = [says_yes(answers[question["id"]]) for question in mine]
        rows[name] = score_pope(said, [question["expected"] == "yes" for question in mine]) | {"questions": len(mine)}
    whole = set(source.names) == set(CATEGORIES)
    scores = {f"F1 {name}": row["F1"] for name, row in rows.items()}
    if whole:
        scores["F1"] = round(sum(scores.values()) / len(scores), 2)
    neither = sum(re.search(r"\b(yes|no|not)\b", answer, re.I) is None for answer in answers.values())
    results = {
        "task": "pope",
        "dataset": {"name": "POPE" if whole else f"POPE, {', '.join(rows)}", "hub": None, "split": None,
                    "questions": len(asked)},
        "scores": scores,
        "metric_types": dict.fromkeys(scores, "f1"),
        "categories": rows,
        "neither": neither,
        **run,
    }  # fmt: skip
    lines = ["POPE, in percent:", "", markdown_table([{"category": name, **row} for name, row in rows.items()]), ""]
    lines.append(f"Mean F1: {scores['F1']:.2f}" if whole else "No mean F1: it is that of all three categories.")
    lines.append(f"{neither} answers say neither yes nor no; as in the benchmark's own scorer they count as yes.")
    table = "\n".join(lines)
    return write_results(output, results, table), table
