"""ScienceQA's own files and prompt formats, as rows of TRL."""

import glob
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lavin.files_lavin import read_text

from .records import find, json_rows, keep
from .rows import BadRow, check_image, image_part, message, read_image, text_part


LETTERS = "ABCDEFGHIJ"
ANSWER_START = "The answer is"
INPUTS = ("QCM", "CQM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUTS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA")
TEXTS = ("question", "hint", "lecture", "solution", "category")
OTHER_NAME = {"val": "validation", "validation": "val"}  # the official files and the Hub's form call it differently


def _tidy(text: str) -> str:
    return text.replace("  ", " ").strip()


def _reasons(problem: dict, order: str) -> str:
    """Lecture (L) and explanation (E) in the order asked for, each on one line; empty where neither says anything."""
    said = [problem[{"L": "lecture", "E": "solution"}[key]] for key in order if key in "LE"]
    return " ".join(text.replace("\n", "\\n") for text in said) if any(text.strip() for text in said) else ""


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
    context = f"{problem['hint']} {caption}".strip() or "N/A"
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(problem["choices"]))
    told = _reasons(problem, inputs)
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
    reason = _reasons(problem, outputs)
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
    splits = json.loads(read_text(folder / "pid_splits.json"))
    if split not in splits:
        raise ValueError(f"There is no split {split!r} in {folder}; it has {', '.join(splits)}.")
    problems = json.loads(read_text(folder / "problems.json"))
    return {pid: problems[pid] for pid in splits[split]}


def read_captions(folder: str | Path) -> dict[str, str]:
    """Reads `captions.json`; empty where there is none."""
    path = Path(folder) / "captions.json"
    return json.loads(read_text(path))["captions"] if path.is_file() else {}


def image_path(folder: str | Path, pid: str, problem: dict) -> Path | None:
    """Where a question's image lies; `None` for a question without."""
    return Path(folder) / "images" / problem["split"] / pid / problem["image"] if problem["image"] else None


def as_messages(prompt: str, answer: str, has_image: bool) -> tuple[list[dict], list[dict]]:
    """Returns the conversational prompt and completion of one row; the image stands before the text."""
    images = [image_part()] if has_image else []
    return [message("user", *images, text_part(prompt))], [message("assistant", text_part(answer))]


def split_format(prompt_format: str) -> tuple[str, str]:
    """`"QCM-ALE"` as `("QCM", "ALE")`; raises `ValueError` where a part is not known."""
    inputs, _, outputs = prompt_format.partition("-")
    if inputs not in INPUTS or outputs not in OUTPUTS:
        raise ValueError(
            f"There is no format {prompt_format!r}: it is one of {', '.join(INPUTS)}, a dash, and one of "
            f"{', '.join(OUTPUTS)}; for example QCM-ALE."
        )
    return inputs, outputs


def check_problem(problem) -> None:
    """Raises [`BadRow`] unless a record of `problems.json` has all that a row needs."""
    if not isinstance(problem, dict):
        raise BadRow("no problem", f"a {type(problem).__name__} where an object is expected")
    if missing := [key for key in (*TEXTS, "choices", "answer") if problem.get(key) is None]:
        raise BadRow("missing keys", ", ".join(missing))
    if wrong := [key for key in TEXTS if not isinstance(problem[key], str)]:
        raise BadRow("not a text", ", ".join(wrong))
    choices, answer = problem["choices"], problem["answer"]
    if not isinstance(choices, list) or not choices:
        raise BadRow("no choices")
    if not all(isinstance(choice, str) for choice in choices):
        raise BadRow("not a text", "choices")
    if len(choices) > len(LETTERS):
        raise BadRow("too many choices", f"{len(choices)}, and letters for {len(LETTERS)}")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadRow("answer out of range", f"{answer!r} with {len(choices)} choices")


class ScienceQA:
    """
    One split of ScienceQA, read entry by entry.

    Args:
        root (`str` or `Path`):
            The official files (`problems.json`, `pid_splits.json`, `captions.json`, `images/<split>/<id>/image.png`),
            or the form the data set has on the Hub: `data/<split>-*.parquet` with one row per question.
        split (`str`): `"train"`, `"val"` (the Hub's form calls it `"validation"`), `"test"`, `"minival"`, ...
        prompt_format (`str`, *optional*, defaults to `"QCM-ALE"`): Order of the inputs, a dash, order of the outputs.
        use_caption (`bool`, *optional*, defaults to `False`): Adds the image's caption to the context.

    Raises:
        `FileNotFoundError`: if `root` has neither form, or no `captions.json` when captions are asked for.
        `ValueError`: if there is no such split or format.
    """

    def __init__(self, root: str | Path, split: str, prompt_format: str = "QCM-ALE", use_caption: bool = False):
        self.root, self.split, self.use_caption = Path(root), split, use_caption
        self.inputs, self.outputs = split_format(prompt_format)
        self.is_hub = not (self.root / "problems.json").is_file()
        if self.is_hub:
            self.parquet = self._hub_files()
        elif not (self.root / "pid_splits.json").is_file():
            raise FileNotFoundError(f"{root} is no ScienceQA data set: it has no pid_splits.json.")
        if use_caption and self.is_hub:
            raise ValueError(f"{root} has no captions: they are in captions.json of the official files.")
        if use_caption and not (self.root / "captions.json").is_file():
            raise FileNotFoundError(f"{root} has no captions.json, which captions are taken from.")

    def _hub_files(self) -> list[Path]:
        files = sorted([*self.root.glob("data/*-*.parquet"), *self.root.glob("*-*.parquet")])
        names = {path.name.partition("-")[0] for path in files}
        if not files:
            raise FileNotFoundError(
                f"{self.root} is no ScienceQA data set: it has neither problems.json nor data/<split>-*.parquet."
            )
        found = [name for name in (self.split, OTHER_NAME.get(self.split)) if name in names]
        if not found:
            raise ValueError(f"There is no split {self.split!r} in {self.root}; it has {', '.join(sorted(names))}.")
        return [path for path in files if path.name.partition("-")[0] == found[0]]

    def index(self, scratch: Path):
        """
        Reads the files once and finds the split's entries.

        Args:
            scratch (`Path`): A folder for the entries, which are read from there one by one.
        """
        if self.is_hub:
            self.problems = self._read_hub(scratch)
            self.where = np.arange(len(self.problems))
            return
        with open(self.root / "pid_splits.json", encoding="utf-8") as file:
            splits = json.load(file)
        split = self.split if self.split in splits else OTHER_NAME.get(self.split)
        if split not in splits:
            raise ValueError(f"There is no split {self.split!r} in {self.root}; it has {', '.join(splits)}.")
        self.ids = np.array([str(pid) for pid in splits[split]], dtype=str)
        self.problems = keep(json_rows, scratch, path=self.root / "problems.json", at="")
        self.where = find(self.problems, self.ids)
        if self.use_caption:
            self.captions = keep(json_rows, scratch, path=self.root / "captions.json", at="captions")
            self.caption_where = find(self.captions, self.ids)

    def _read_hub(self, scratch: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq
        from datasets import Image, load_dataset
        from datasets.exceptions import DatasetGenerationError

        columns = ["image", "answer", "choices", *TEXTS]
        for path in self.parquet:
            try:
                names = pq.read_schema(path).names
            except pa.ArrowException as error:
                raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error
            if missing := [name for name in columns if name not in names]:
                raise ValueError(f"{path} is not ScienceQA: it has no column {', '.join(missing)}.")
        files = [glob.escape(str(path)) for path in self.parquet]
        try:
            table = load_dataset(
                "parquet", data_files=files, split="train", cache_dir=str(scratch),
                columns=columns, batch_size=100,  # by default all rows of a group, which may be the whole file
            )  # fmt: skip
        except (DatasetGenerationError, ValueError) as error:  # the second: without any row
            raise ValueError(f"{self.place(0)} cannot be read as Parquet: {error.__cause__ or error}") from error
        return table.cast_column("image", Image(decode=False))

    def __len__(self) -> int:
        return len(self.where)

    def name(self, index: int) -> str:
        """The entry's id; in the Hub's form, which has none, the split and the row's number in its files."""
        return f"{self.parquet[0].name.partition('-')[0]}-{index}" if self.is_hub else str(self.ids[index])

    def place(self, index: int) -> str:
        """Where the entry is."""
        return self.parquet[0].parent.as_posix() if self.is_hub else (self.root / "problems.json").as_posix()

    def rows(self, index: int) -> list[dict]:
        """
        The entry's one row.

        Returns:
            `list[dict]`: `prompt` and `completion` (lists of messages), `images` (list of `{"bytes", "path"}`, empty
            for a question without image), `id`, `answer` (index), `choices`, `category`.

        Raises:
            [`BadRow`]: if the entry cannot be used.
        """
        pid = self.name(index)
        if self.where[index] < 0:
            raise BadRow("not in problems.json")
        found = self.problems[int(self.where[index])]
        problem = found if self.is_hub else json.loads(found["entry"])
        check_problem(problem)
        images = [self._image(pid, problem)] if problem.get("image") else []
        caption = ""
        if self.use_caption and self.caption_where[index] >= 0:
            caption = json.loads(self.captions[int(self.caption_where[index])]["entry"])
        question, answer = format_question(problem, self.inputs, caption), format_answer(problem, self.outputs)
        prompt, completion = as_messages(question, answer, bool(images))
        return [{"prompt": prompt, "completion": completion, "images": images, "id": pid, "answer": problem["answer"],
                 "choices": problem["choices"], "category": problem["category"]}]  # fmt: skip

    def _image(self, pid: str, problem: dict) -> dict:
        if not self.is_hub:
            if not isinstance(problem.get("split"), str):
                raise BadRow("missing keys", "split, which says where the image lies")
            return read_image(image_path(self.root, pid, problem))
        data = problem["image"].get("bytes")
        if not data:
            raise BadRow("image missing", "the Parquet row holds no bytes")
        return {"bytes": check_image(data, "in the Parquet row"), "path": None}


def scienceqa_rows(
    folder: str | Path, split: str, prompt_format: str = "QCM-ALE", use_caption: bool = False
) -> Iterator[dict]:
    """
    Yields the rows `trl sft` trains on, in the order of the split.

    Args:
        folder (`str` or `Path`): The official files of a data set in ScienceQA's format.
        split (`str`): Which split.
        prompt_format (`str`, *optional*, defaults to `"QCM-ALE"`): Order of the inputs, a dash, order of the outputs.
        use_caption (`bool`, *optional*, defaults to `False`): Adds the image's caption to the context.

    Yields:
        `dict`: [`ScienceQA.rows`].
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = ScienceQA(folder, split, prompt_format, use_caption)
        source.index(Path(scratch))
        for index in range(len(source)):
            yield from source.rows(index)
