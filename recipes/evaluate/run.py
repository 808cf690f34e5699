"""What every task does: ask the questions, write the results, show a table."""

import json
import os
import time
from datetime import datetime, timezone
from pathlib import Path

from lavin.files_lavin import read_text


MODES = ("generate", "letters")
ANSWERS, RESULTS, TABLE = "predictions.jsonl", "results.json", "results.md"


def ask_model(
    name: str | os.PathLike,
    questions: list[dict],
    output: str | os.PathLike,
    task: str,
    settings: dict,
    max_new_tokens: int = 64,
    mode: str = "generate",
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    decoding: dict | None = None,
) -> tuple[dict[str, dict], dict]:
    """
    Asks a model a task's questions; answers go to `predictions.jsonl` as they come, and a run that was killed goes on
    from there.

    Args:
        name (`str` or `os.PathLike`): A LaVIN folder or Hub name.
        questions (`list[dict]`): Each with `id`, `prompt` (text or messages), `images` (a list), and, for the mode
            `letters`, `choices` (how many).
        output (`str` or `os.PathLike`): The folder to write.
        task (`str`): Name of the task.
        settings (`dict`): What else the answers depend on.
        max_new_tokens (`int`, *optional*, defaults to 64): Longest answer, in tokens.
        mode (`str`, *optional*, defaults to `"generate"`): Or `"letters"`: scores the letters' logits.
        batch_size (`int`, *optional*): Questions at once; 16 by default.
        device, dtype (`str`, *optional*): As of [`~load.load_model`].
        decoding (`dict`, *optional*): Further fields of `GenerationConfig`, such as `num_beams`; greedy by default.

    Returns:
        `tuple(dict, dict)`: the records by id (`answer`, and `scores` in the mode `letters`), and what `results.json`
        says of the run.

    Raises:
        `OSError`, `ValueError`: if model, images or the file of answers are not right; the message says what to do.
    """
    from ..data.scienceqa import ANSWER_START, LETTERS
    from ..load import default_device, default_dtype, load_model, load_processor
    from .answers import BATCH_SIZE, generate_batches
    from .letters import letter_batches
    from .predictions import collect_answers, model_identity, questions_digest

    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
    batch_size = BATCH_SIZE if batch_size is None else batch_size
    device = default_device() if device is None else device
    dtype = default_dtype(device) if dtype is None else dtype
    processor = load_processor(name)
    decoding = decoding or {}
    limit = {"max_new_tokens": max_new_tokens, **decoding} if mode == "generate" else {}
    settings = {**settings, "mode": mode, **limit, "dtype": dtype}
    header = {
        "task": task, "model": model_identity(name), "settings": settings,
        "questions": questions_digest(processor, questions),
    }  # fmt: skip
    started = time.time()

    def ask(left):
        nonlocal started
        model, processor = load_model(name, device, dtype)
        started = time.time()
        prompts, images = [q["prompt"] for q in left], [q["images"] for q in left]
        if mode == "generate":
            asked = generate_batches(model, processor, prompts, images, batch_size, max_new_tokens, **decoding)
            for rows, texts in asked:
                yield rows, [{"answer": text} for text in texts]
            return
        choices = [q["choices"] for q in left]
        for rows, scores in letter_batches(model, processor, prompts, images, choices, batch_size):
            best = [max(range(len(row)), key=row.__getitem__) for row in scores]
            said = [f"{ANSWER_START} {LETTERS[i]}." for i in best]
            scores = [[round(score, 4) for score in row] for row in scores]
            yield rows, [{"answer": a, "scores": row} for a, row in zip(said, scores, strict=True)]

    records, asked = collect_answers(Path(output, ANSWERS), header, questions, ask, task)
    seconds = time.time() - started if asked else 0.0
    run = {
        "model": {"name": str(name), **header["model"]}, "settings": settings, "batch_size": batch_size,
        "device": device, "asked": asked, "seconds": round(seconds, 2),
        "samples_per_second": round(asked / seconds, 2) if asked else None,
    }  # fmt: skip
    return records, run


def check_positive(**numbers: int | None):
    """Raises `ValueError` where an option that counts something is below 1."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


def read_answer_file(path: str | os.PathLike) -> tuple[dict, dict | None]:
    """
    Reads predictions to score: a JSON object from question id to answer (also under the key "results", as ScienceQA's
    own tools write it), or the `predictions.jsonl` of `lavin eval`.

    Returns:
        `tuple(dict, dict)`: answers by id, and the header of a `predictions.jsonl`.

    Raises:
        `OSError`, `ValueError`: if it cannot be read or is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: name the file of predictions.")
    text = read_text(path)
    try:
        answers = json.loads(text)
    except ValueError as error:
        if '{"answers_of"' not in text[:20]:
            raise ValueError(f"{path} is no JSON: {error}.") from error
        from .predictions import read_answers

        header, records, _ = read_answers(path)
        return {pid: record["answer"] for pid, record in records.items()}, header
    if isinstance(answers, dict) and isinstance(answers.get("results"), dict):
        answers = answers["results"]
    if not isinstance(answers, dict):
        raise ValueError(
            f"{path} must hold one JSON object from question id to answer, not a {type(answers).__name__}."
        )
    return answers, None


def check_ids(answers: dict, ids: list[str], known: list[str], where: str):
    """
    Compares the ids of predictions and questions: an accuracy over part of them would not be the benchmark's.

    Args:
        answers (`dict`): Predictions by id.
        ids (`list[str]`): The questions to score.
        known (`list[str]`): All questions of the data set; predictions for its other splits do no harm.
        where (`str`): What the questions are called in the message.

    Raises:
        `ValueError`: if an answer is missing, or belongs to no question.
    """
    missing, unknown = [i for i in ids if i not in answers], sorted(set(answers) - set(known))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ids)} questions of {where} have no prediction, the first is {missing[0]}. Give "
            'each one; an answer that failed is "" and counts as wrong.'
        )
    if unknown:
        raise ValueError(f"{len(unknown)} predictions belong to no question of {where}, the first is {unknown[0]!r}.")


def write_results(output: str | os.PathLike, results: dict, table: str) -> dict:
    """Writes `results.json`, which `lavin card --results` reads, and the table as Markdown."""
    results = {**results, "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "versions": _versions()}
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(table + "\n", encoding="utf-8")
    return results


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft")}


def summary(run: dict, output: str | os.PathLike) -> str:
    """How long it took, and where everything is."""
    if not run["asked"]:
        return f"Every answer was there already. Results: {Path(output, RESULTS)}"
    speed = f"{run['samples_per_second']:.1f} samples/s"
    return f"{run['asked']} samples in {run['seconds']:.1f} s ({speed}). Results: {Path(output, RESULTS)}"
