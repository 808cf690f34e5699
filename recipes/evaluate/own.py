"""A task of one's own: a YAML names Parquet, prompt and metric."""

import os
import re
from pathlib import Path

import yaml

from lavin.files_lavin import read_text

from ..data.scienceqa import LETTERS
from ..report import markdown_table, percent
from .run import ask_model, write_results
from .scienceqa import parse_letter, to_choice


METRICS = ("exact", "letter", "contains")
# Each key of the YAML: its default, or `...` where it must be given.
FIELDS = {
    "data": ..., "metric": ..., "name": None, "prompt": None, "answer": None, "choices": "choices", "images": None,
    "group": None, "max_new_tokens": 64,
}  # fmt: skip


def read_config(path: str | os.PathLike) -> dict:
    """
    Reads a task.

    Args:
        path (`str` or `os.PathLike`): A YAML with `data` (a Parquet file, a pattern such as `test-*.parquet`, or a
            list of them; relative to the YAML) and `metric` (`exact`, `letter` or `contains`), and as they are needed
            `name`, `prompt` (a template such as `"Question: {question}\\nOptions: {options}\\nResponse:"`; without it
            the column `prompt`), `answer`, `choices`, `images`, `group` (columns), `max_new_tokens`.

    Raises:
        `OSError`, `ValueError`: if the file or a Parquet is not there, or a key is missing, unknown or wrong.
    """
    path = Path(path)
    try:
        config = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold keys and values: {', '.join(FIELDS)}.")
    if unknown := sorted(set(config) - set(FIELDS)):
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; a task knows {', '.join(FIELDS)}.")
    if missing := [key for key, default in FIELDS.items() if default is ... and key not in config]:
        raise ValueError(f"{path}: {', '.join(missing)} must be given.")
    config = {**FIELDS, **config}
    if config["metric"] not in METRICS:
        raise ValueError(f"{path}: `metric` must be one of {', '.join(METRICS)}, got {config['metric']!r}.")
    named = config["data"] if isinstance(config["data"], list) else [config["data"]]
    config["data"] = []
    for file in (path.parent / str(name) for name in named):
        files = [file] if file.is_file() else sorted(file.parent.glob(file.name))
        if not files:
            raise FileNotFoundError(f"{path}: there is no file {file}.")
        config["data"] += files
    config["name"] = config["name"] or path.stem
    return config


def load_questions(config: dict) -> list[dict]:
    """
    Reads the rows of a task, those that `lavin data` writes or plain columns with a template.

    Returns:
        `list[dict]`: `id`, `prompt`, `images` (bytes or paths), `expected` (text, or an index for `letter`), `choices`
        (how many, for `letter`), `group`.

    Raises:
        `ValueError`: if a column is missing or the template cannot be filled.
    """
    import pyarrow.parquet as parquet

    questions = []
    for file in config["data"]:
        for row in parquet.read_table(file).to_pylist():
            questions.append(_question(row, config, str(row.get("id", len(questions))), file))
    if len({question["id"] for question in questions}) < len(questions):  # the turns of one talk, say
        questions = [{**question, "id": str(i)} for i, question in enumerate(questions)]
    if not questions:
        raise ValueError(f"There are no rows in {', '.join(map(str, config['data']))}.")
    return questions


def _question(row: dict, config: dict, name: str, file: Path) -> dict:
    def column(key, default=None):
        wanted = config[key] or default
        if wanted is not None and wanted not in row:
            raise ValueError(f"{file} has no column {wanted!r} (`{key}` of the task); it has {', '.join(row)}.")
        return None if wanted is None else row[wanted]

    letter = config["metric"] == "letter"
    choices = column("choices") if letter else row.get(config["choices"])
    if letter and (not isinstance(choices, list) or not choices):
        raise ValueError(f"{file}, row {name}: it has no choices, and the metric `letter` asks for one of them.")
    choices = choices if isinstance(choices, list) else []
    if (letter or "{options" in (config["prompt"] or "")) and len(choices) > len(LETTERS):
        raise ValueError(f"{file}, row {name}: {len(choices)} choices, and there are letters for {len(LETTERS)}.")
    if config["prompt"]:
        options = " ".join(f"({mark}) {choice}" for mark, choice in zip(LETTERS, choices, strict=False))
        try:
            prompt = config["prompt"].format(**{"options": options, **row})
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"The template {config['prompt']!r} cannot be filled from {file} ({error!r}): it has the columns "
                f"{', '.join(row)}, and `options` is made of the choices."
            ) from error
    else:
        prompt = row.get("prompt")
        if prompt is None:
            raise ValueError(f"{file} has no column 'prompt': give the task a `prompt` template.")
        if not isinstance(prompt, str):  # a text column of Arrow has no text in an image's part
            prompt = [{"role": message["role"], "content": _content(message["content"])} for message in prompt]
    images = column("images", "images" if "images" in row else None)
    images = images if isinstance(images, list) else [images]
    expected = column("answer", "answer" if letter else "completion" if "completion" in row else "answer")
    if isinstance(expected, list):  # a completion: messages
        parts = expected[-1]["content"]
        expected = parts if isinstance(parts, str) else "".join(part["text"] or "" for part in parts or [])
    if expected is None or not str(expected).strip():
        raise ValueError(f"{file}, row {name}: the expected answer is empty. Fill it in, or leave the row out.")
    question = {"id": name, "prompt": prompt, "images": [_image(image, file) for image in images if image is not None],
                "group": str(column("group")) if config["group"] else None}  # fmt: skip
    if not letter:
        return {**question, "expected": str(expected)}
    index = to_choice(expected, len(choices))
    if index is None and str(expected) in LETTERS[: len(choices)]:
        index = LETTERS.index(str(expected))
    if index is None:
        raise ValueError(
            f"{file}, row {name}: the answer {expected!r} is no letter or index of {len(choices)} choices."
        )
    return {**question, "expected": index, "choices": len(choices)}


def _content(content):
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else {"type": part["type"]} for part in content]


def _image(image, file: Path):
    """The bytes of an image as `datasets` stores it, or its path, relative to the Parquet file."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    return file.parent / image if isinstance(image, str) else image


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").strip()


def is_right(answer: str, question: dict, metric: str) -> bool:
    """
    Whether an answer is right: `exact` compares the whole text and `contains` looks for the expected words in it, both
    without regard to case, spacing and a final full stop; `letter` reads "The answer is X".
    """
    if metric == "letter":
        return parse_letter(answer, question["choices"]) == question["expected"]
    expected, answer = _plain(question["expected"]), _plain(answer)
    return answer == expected if metric == "exact" else bool(re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", answer))


def evaluate_own(
    model: str | os.PathLike, config: str | os.PathLike, output: str | os.PathLike, **options
) -> tuple[dict, str]:
    """
    Asks a model the questions of an own task and scores its answers.

    Args:
        model (`str` or `os.PathLike`): A LaVIN folder or Hub name.
        config (`str` or `os.PathLike`): The task, see [`read_config`].
        output (`str` or `os.PathLike`): The folder for answers and results.
        options: `batch_size`, `device`, `dtype` of [`~run.ask_model`]; `mode` for the metric `letter`.

    Returns:
        `tuple(dict, str)`: what `results.json` holds, and the table.
    """
    task = read_config(config)
    metric = task["metric"]
    if options.get("mode", "generate") != "generate" and metric != "letter":
        raise ValueError(f"The mode `letters` is for the metric `letter`, and this task's is {metric!r}.")
    questions = load_questions(task)
    records, run = ask_model(model, questions, output, task["name"], {}, task["max_new_tokens"], **options)
    answers = {name: record["answer"] for name, record in records.items()}
    right = [is_right(answers[question["id"]], question, metric) for question in questions]
    groups = sorted({question["group"] for question in questions} - {None})
    scores = {
        group: percent([ok for ok, question in zip(right, questions, strict=True) if question["group"] == group])
        for group in groups
    }
    scores["AVG"] = percent(right)
    results = {
        "task": task["name"],
        "dataset": {"name": task["name"], "hub": None, "split": None, "questions": len(questions)},
        "scores": scores,
        "metric_types": dict.fromkeys(scores, {"exact": "exact_match"}.get(metric, "accuracy")),
        "metric": metric,
        **run,
    }
    lines = [f"{task['name']}, {len(questions)} questions, percent right ({metric}):", "", markdown_table([scores])]
    if metric == "letter":
        failed = [parse_letter(answers[question["id"]], question["choices"]) is None for question in questions]
        results["unparsable"] = sum(failed)
        lines += ["", f"{sum(failed)} of {len(questions)} answers name no choice; they count as wrong."]
    table = "\n".join(lines)
    return write_results(output, results, table), table
