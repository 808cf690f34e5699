"""MME (arXiv 2306.13394): yes or no, two questions per image; scored as the benchmark's own calculation.py does."""

import os
import sys
from pathlib import Path

from lavin.files_lavin import read_text

from ..report import markdown_table
from .run import ask_model, check_ids, read_answer_file, write_results


PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
HUB = "lmms-lab/MME"
SIZE = 2374  # questions of the whole benchmark
SUFFIXES = {".jpg", ".jpeg", ".png"}


def parse_yes_no(text: str) -> str:
    """`"yes"` or `"no"` where it is in the first four characters, else `"other"`, which is never right."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def load_questions(root: str | os.PathLike) -> list[dict]:
    """
    Reads MME in either layout: in a subtask's folder, images and their `.txt` side by side, or in `images/` and
    `questions_answers_YN/`.

    Args:
        root (`str` or `os.PathLike`): Holds a folder for each subtask; other folders are left aside, and said.

    Returns:
        `list[dict]`: `id` (`"count/0001.jpg/1"`: subtask, image, line), `subtask`, `image` (its file's name),
        `prompt` (as the reference asks), `images` (the path), `expected` (`"yes"` or `"no"`).

    Raises:
        `FileNotFoundError`: if there is no subtask, or an image or its `.txt` is missing.
        `ValueError`: if a `.txt` does not have two questions with Yes or No.
    """
    root = Path(root)
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir()} if root.is_dir() else {}
    subtasks = [name for name in (*PERCEPTION, *COGNITION) if name in folders]
    if not subtasks:
        raise FileNotFoundError(
            f"{root} is no MME: it has none of the folders {', '.join((*PERCEPTION, *COGNITION))}."
        )
    if others := sorted(set(folders) - set(subtasks)):
        print(f"Left aside in {root}, no subtasks of MME: {', '.join(others)}", file=sys.stderr)
    questions = []
    for subtask in subtasks:
        folder = folders[subtask]
        images = folder / "images" if (folder / "images").is_dir() else folder
        texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
        pictures = {path.stem: path for path in sorted(images.iterdir()) if path.suffix.lower() in SUFFIXES}
        asked = {path.stem: path for path in sorted(texts.glob("*.txt"))}
        if lonely := sorted(set(pictures) ^ set(asked)):
            what = "a .txt with its questions" if lonely[0] in pictures else "an image (.jpg, .jpeg or .png)"
            raise FileNotFoundError(f"{folder}: {lonely[0]} has no {what.removeprefix('a ').removeprefix('an ')}.")
        for stem, path in pictures.items():
            for number, (question, expected) in enumerate(_read_pair(asked[stem]), start=1):
                prompt = f"Instruction: {question}\nResponse:".replace("  ", " ").strip()
                questions.append(
                    {
                        "id": f"{subtask}/{path.name}/{number}",
                        "subtask": subtask,
                        "image": path.name,
                        "prompt": prompt,
                        "images": [path],
                        "expected": expected,
                    }  # fmt: skip
                )
    return questions


def _read_pair(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    pairs = [(line.rpartition("\t")[0].strip(), line.rpartition("\t")[2].strip().lower()) for line in lines]
    if len(pairs) != 2 or any(not question or expected not in ("yes", "no") for question, expected in pairs):
        raise ValueError(f"{path} must have two lines, each a question, a tab, and Yes or No.")
    return pairs


def score_mme(questions: list[dict], answers: dict[str, str]) -> dict[str, dict]:
    """
    Accuracy over questions (acc), over images with both right (acc+), and their sum, the score.

    Args:
        questions (`list[dict]`): As [`load_questions`] gives them.
        answers (`dict[str, str]`): Answer text by question id.

    Returns:
        `dict[str, dict]`: for each subtask `acc`, `acc+`, `score` (at most 200), `other` (answers that are neither yes
        nor no, which are wrong) and `questions`.
    """
    rows: dict[str, dict] = {}
    for subtask in dict.fromkeys(question["subtask"] for question in questions):
        mine = [question for question in questions if question["subtask"] == subtask]
        said = {question["id"]: parse_yes_no(str(answers[question["id"]])) for question in mine}
        right: dict[str, list[bool]] = {}
        for question in mine:
            right.setdefault(question["image"], []).append(said[question["id"]] == question["expected"])
        acc = 100 * sum(map(sum, right.values())) / len(mine)
        plus = 100 * sum(map(all, right.values())) / len(right)
        other = sum(answer == "other" for answer in said.values())
        rows[subtask] = {"acc": acc, "acc+": plus, "score": acc + plus, "other": other, "questions": len(mine)}
    return rows


def totals(scores: dict[str, float]) -> dict[str, float | None]:
    """Sums the subtasks' scores: perception (at most 2000) and cognition (800); `None` where a subtask is missing."""
    sums = {}
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        whole = all(subtask in scores for subtask in subtasks)
        sums[name] = sum(scores[subtask] for subtask in subtasks) if whole else None
    return sums


def evaluate_mme(
    model: str | os.PathLike, root: str | os.PathLike, output: str | os.PathLike, max_new_tokens: int = 20, **options
) -> tuple[dict, str]:
    """
    Asks a model all of MME and scores its answers.

    Args:
        model (`str` or `os.PathLike`): A LaVIN folder or Hub name.
        root (`str` or `os.PathLike`): MME's folder.
        output (`str` or `os.PathLike`): The folder for answers and results.
        max_new_tokens (`int`, *optional*, defaults to 20): As the reference.
        options: `batch_size`, `device`, `dtype` of [`~run.ask_model`].

    Returns:
        `tuple(dict, str)`: what `results.json` holds, and the table.
    """
    questions = load_questions(root)
    records, run = ask_model(model, questions, output, "mme", {}, max_new_tokens, **options)
    results = _results(questions, {pid: record["answer"] for pid, record in records.items()}, run)
    table = show(results)
    return write_results(output, results, table), table


def score_predictions(root: str | os.PathLike, predictions: str | os.PathLike) -> dict:
    """Scores a file from question id (see [`load_questions`]) to answer text; as `results.json` holds it."""
    questions = load_questions(root)
    answers, header = read_answer_file(predictions)
    ids = [question["id"] for question in questions]
    check_ids(answers, ids, ids, str(root))
    run = {"model": header["model"], "settings": header["settings"]} if header else {"model": None, "settings": {}}
    return _results(questions, answers, run)


def _results(questions: list[dict], answers: dict[str, str], run: dict) -> dict:
    rows = score_mme(questions, answers)
    sums = totals({subtask: row["score"] for subtask, row in rows.items()})
    whole = len(questions) == SIZE
    scores = {**sums, **{subtask: row["score"] for subtask, row in rows.items()}}
    return {
        "task": "mme",
        "dataset": {
            "name": "MME" if whole else f"{len(questions)} questions in MME's format", "hub": HUB if whole else None,
            "split": "test", "questions": len(questions),
        },
        "scores": {name: value if value is None else round(value, 2) for name, value in scores.items()},
        "metric_types": dict.fromkeys(scores, "mme_score"),
        "subtasks": rows,
        "benchmark": {name: round(value, 2) for name, value in sums.items()} if whole else {},
        "unparsable": sum(row["other"] for row in rows.values()),
        **run,
    }  # fmt: skip


def show(results: dict) -> str:
    """The tables and what must be said with them."""
    rows, lines = results["subtasks"], [f"{results['dataset']['name']}: acc, acc+ (percent), score = acc + acc+", ""]
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        table = [{name: subtask, **rows[subtask]} for subtask in subtasks if subtask in rows]
        total = results["scores"][name]
        # A total over some of the subtasks would look like a bad score.
        empty = dict.fromkeys(("acc", "acc+", "other", "questions"))
        table.append({name: "total", **empty, "score": total})
        lines += [markdown_table(table), ""]
        if total is None:
            absent = [subtask for subtask in subtasks if subtask not in rows]
            lines += [f"No total: {', '.join(absent)} not there.", ""]
    lines.append(f"{results['unparsable']} answers are neither yes nor no; they count as wrong.")
    return "\n".join(lines)
