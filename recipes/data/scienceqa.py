"""ScienceQA's own files and prompt formats, as rows of TRL."""

import json
from collections.abc import Iterable
from pathlib import Path


LETTERS = "ABCDEFGHIJ"
ANSWER_START = "The answer is"
INPUTS = ("QCM", "CQM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUTS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA")


def _tidy(text: str) -> str:
    return text.replace("  ", " ").strip()


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def format_question(problem: dict, inputs: str = "QCM", caption: str = "") -> str:
    r"""
    Writes a question the way LaVIN asks it (ScienceQA's prompt formats, arXiv 2209.09513, appendix).

    Args:
        problem (`dict`): A record of `problems.json`.
        inputs (`str`, *optional*, defaults to `"QCM"`): Order of question, context (Q, C), options (M), and, where the
            format gives them away, lecture and explanation (L, E). One of `INPUTS`.
        caption (`str`, *optional*): A caption to add to the context.

    Returns:
        `str`: `"Question: ..\nContext: ..\nOptions: (A) .. (B) ..\nResponse:"`.

    Raises:
        `ValueError`: if `inputs` is not a known order.
    """
    if inputs not in INPUTS:
        raise ValueError(f"`inputs` must be one of {', '.join(INPUTS)}, got {inputs!r}.")
    context = " ".join(part for part in (problem["hint"].strip(), caption.strip()) if part) or "N/A"
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(problem["choices"]))
    told = " ".join(part for part in (_one_line(problem["lecture"] if "L" in inputs else ""),
                                      _one_line(problem["solution"] if "E" in inputs else "")) if part)  # fmt: skip
    parts = {"Q": f"Question: {problem['question']}", "C": f"Context: {context}", "M": f"Options: {options}"}
    lines = [parts[key] for key in inputs if key in parts]
    if told:
        before_options = inputs.endswith("M") and inputs not in ("QCM", "CQM")
        lines.insert(2 if before_options else len(lines), f"BECAUSE: {told}")
    return _tidy("\n".join([*lines, "Response:"]))


def format_answer(problem: dict, outputs: str = "ALE") -> str:
    """
    Writes the answer to learn: the letter, and in the longer formats the lecture (L) and the explanation (E).

    Args:
        problem (`dict`): A record of `problems.json`.
        outputs (`str`, *optional*, defaults to `"ALE"`): Order of answer, lecture and explanation; one of `OUTPUTS`.

    Returns:
        `str`: for example `"The answer is B. BECAUSE: .."`; without "BECAUSE:" where there is nothing to say.

    Raises:
        `ValueError`: if `outputs` is not a known order.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"`outputs` must be one of {', '.join(OUTPUTS)}, got {outputs!r}.")
    answer = f"{ANSWER_START} {LETTERS[problem['answer']]}."
    reasons = {"L": _one_line(problem["lecture"]), "E": _one_line(problem["solution"])}
    reason = " ".join(reasons[key] for key in outputs if reasons.get(key, "").strip())
    if not reason:
        return answer
    return _tidy(f"{answer} BECAUSE: {reason}" if outputs[0] == "A" else f"{reason} {answer}")


def read_scienceqa(folder: str | Path, split: str) -> dict[str, dict]:
    """
    Reads one split of a data set in ScienceQA's format.

    Args:
        folder (`str` or `Path`): Holds `problems.json`, `pid_splits.json` and `images/<split>/<id>/image.png`.
        split (`str`): A key of `pid_splits.json`, such as `"train"`, `"val"`, `"test"`, `"minival"`.

    Returns:
        `dict[str, dict]`: the split's records by id.

    Raises:
        `FileNotFoundError`: if one of the two files is not there.
        `ValueError`: if there is no such split.
    """
    folder = Path(folder)
    for name in ("problems.json", "pid_splits.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no ScienceQA data set: it has no {name}.")
    splits = json.loads((folder / "pid_splits.json").read_text(encoding="utf-8"))
    if split not in splits:
        raise ValueError(f"There is no split {split!r} in {folder}; it has {', '.join(splits)}.")
    problems = json.loads((folder / "problems.json").read_text(encoding="utf-8"))
    return {pid: problems[pid] for pid in splits[split]}


def read_captions(folder: str | Path) -> dict[str, str]:
    """Reads `captions.json`; empty where there is none."""
    path = Path(folder) / "captions.json"
    return json.loads(path.read_text(encoding="utf-8"))["captions"] if path.is_file() else {}


def image_path(folder: str | Path, pid: str, problem: dict) -> Path | None:
    """Where a question's image lies; `None` for a question without."""
    return Path(folder) / "images" / problem["split"] / pid / problem["image"] if problem["image"] else None


def as_messages(prompt: str, answer: str, has_image: bool) -> tuple[list[dict], list[dict]]:
    """Returns the conversational prompt and completion of one row; the image stands before the text."""
    content = [{"type": "image", "text": None}] if has_image else []
    content.append({"type": "text", "text": prompt})
    reply = [{"type": "text", "text": answer}]
    return [{"role": "user", "content": content}], [{"role": "assistant", "content": reply}]


def scienceqa_rows(
    folder: str | Path, split: str, prompt_format: str = "QCM-ALE", use_caption: bool = False
) -> Iterable[dict]:
    """
    Yields the rows `trl sft` trains on, in the order of the split.

    Args:
        folder (`str` or `Path`): A data set in ScienceQA's format.
        split (`str`): Which split.
        prompt_format (`str`, *optional*, defaults to `"QCM-ALE"`): Order of the inputs, a dash, order of the outputs.
        use_caption (`bool`, *optional*, defaults to `False`): Adds the image's caption to the context.

    Yields:
        `dict`: `prompt` and `completion` (lists of messages), `images` (list of `{"bytes", "path"}`, empty for a
        question without image), `id`, `answer` (index), `choices`, `category`.
    """
    inputs, _, outputs = prompt_format.partition("-")
    captions = read_captions(folder) if use_caption else {}
    for pid, problem in read_scienceqa(folder, split).items():
        path = image_path(folder, pid, problem)
        question = format_question(problem, inputs, captions.get(pid, ""))
        prompt, completion = as_messages(question, format_answer(problem, outputs), path is not None)
        images = [{"bytes": path.read_bytes(), "path": None}] if path else []
        yield {"prompt": prompt, "completion": completion, "images": images, "id": pid, "answer": problem["answer"],
               "choices": problem["choices"], "category": problem["category"]}  # fmt: skip


def write_parquet(rows: Iterable[dict], path: str | Path) -> int:
    """
    Writes rows to one Parquet file with the images' bytes inside, so that it can be moved anywhere.

    Args:
        rows (`Iterable[dict]`): As [`scienceqa_rows`] yields them.
        path (`str` or `Path`): The file to write.

    Returns:
        `int`: the number of rows.
    """
    from datasets import Dataset, Features, Image, List, Value
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    message = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
    features = Features({
        "prompt": List(message), "completion": List(message), "images": List(Image()), "id": Value("string"),
        "answer": Value("int64"), "choices": List(Value("string")), "category": Value("string"),
    })  # fmt: skip
    rows = list(rows)
    columns = {name: [row[name] for row in rows] for name in features}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    hidden = are_progress_bars_disabled()
    disable_progress_bars()  # it takes a moment
    Dataset.from_dict(columns, features=features).to_parquet(str(path))
    if not hidden:
        enable_progress_bars()
    return len(rows)
