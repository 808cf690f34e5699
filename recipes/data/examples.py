"""What captions, questions and boxes on images share: two lists of JSON that belong together, rows, questions."""

import json
import re
import tempfile
from itertools import accumulate
from pathlib import Path

import numpy as np

from .records import find
from .rows import BadRow, image_part, message, read_image, text_part


def load(entry: bytes) -> dict:
    """One entry of a table of [`~records.keep`]; raises [`BadRow`] if it is no object."""
    try:
        found = json.loads(entry)
    except ValueError as error:
        raise BadRow("not JSON", str(error)) from error
    if not isinstance(found, dict):
        raise BadRow("not an object", f"a {type(found).__name__}")
    return found


def need(entry: dict, key: str, kind: type | tuple = str):
    """A value that an entry must have; raises [`BadRow`] if it has none, or an empty or another kind of one."""
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadRow("missing keys", f"{key} is {'missing' if value is None else repr(value)[:40]}")
    if isinstance(value, str) and not value.strip():
        raise BadRow("empty text", key)
    return value.strip() if isinstance(value, str) else value


class Joined:
    """
    A table of entries and the notes on each: captions of an image, answers to a question.

    Args:
        entries, notes (`datasets.Dataset`): Tables of [`~records.keep`]; a note's key is that of its entry.
    """

    def __init__(self, entries, notes):
        self.notes = notes
        place = find(entries, np.array(notes["key"], dtype=object))
        self.order = np.argsort(place, kind="stable")
        self.first = np.searchsorted(place[self.order], np.arange(len(entries) + 1))

    def of(self, index: int) -> list[dict]:
        """The notes on an entry, in the file's order."""
        chosen = self.order[self.first[index] : self.first[index + 1]].tolist()
        return [load(self.notes[note]["entry"]) for note in chosen]


class Several:
    """
    Entries of several files, counted from the first file's first to the last one's last.

    Args:
        files (`list[Path]`): The files.
        sizes (`list[int]`): Entries of each.
        what (`str`): What an entry is, for the message.

    Raises:
        `ValueError`: if a file is empty.
    """

    def __init__(self, files: list[Path], sizes: list[int], what: str):
        if empty := [path for path, size in zip(files, sizes, strict=True) if not size]:
            raise ValueError(f"{empty[0]} holds no {what}.")
        self.files, self.first = files, [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self.first[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Number of an entry's file, and of the entry in it, both from 0."""
        file = next(n for n, end in enumerate(self.first[1:]) if index < end)
        return file, index - self.first[file]

    def place(self, index: int) -> str:
        """File and number of an entry, from 0, for people."""
        file, number = self.locate(index)
        return f"{self.files[file].name}[{number}]"


def images_by_number(folder: Path) -> dict[int, Path]:
    """
    The images below a folder by the number at the end of their names, as COCO calls them
    (`COCO_train2014_000000000009.jpg` is 9).

    Raises:
        `ValueError`: if two have one number.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.rglob("*")):
        number = re.search(r"(\d+)\.(?:jpe?g|png)$", path.name, re.I)
        if number is None:
            continue
        if int(number[1]) in found:
            raise ValueError(f"{path} and {found[int(number[1])]} have the same number: name the folder of one split.")
        found[int(number[1])] = path
    return found


def check_paths(image_root: str | Path, *files: str | Path | None):
    """Raises `FileNotFoundError` where a file or the folder of images is not there, `ValueError` for a pickle."""
    for path in files:
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        if Path(path or "").suffix in (".p", ".pkl", ".pickle"):
            raise ValueError(
                f"{path} is a pickle, which may run code of others when it is opened, and is not read. The same "
                "boxes are published as JSON: MDETR's finetune_refcoco_*.json, or Qwen-VL's refcoco_*.jsonl."
            )
    if not Path(image_root).is_dir():
        raise FileNotFoundError(f"--image-root: there is no folder {image_root}.")


def make_rows(examples: list[dict]) -> list[dict]:
    """
    Rows of TRL.

    Args:
        examples (`list[dict]`): Each with `id`, `prompt` (what the user says after the image), `image` (its path) and
            `answer` (what is learnt).
    """
    images = {path: read_image(path) for path in {example["image"] for example in examples}}
    return [
        {
            "prompt": [message("user", image_part(), text_part(example["prompt"]))],
            "completion": [message("assistant", text_part(example["answer"]))],
            "images": [images[example["image"]]],
            "id": example["id"],
        }
        for example in examples
    ]


def all_questions(source) -> list[dict]:
    """
    Everything there is to ask of a source, for `lavin eval`.

    Returns:
        `list[dict]`: `id`, `prompt`, `images` (one path), `expected`, `group`, as the source's `ask(i)` says.

    Raises:
        `ValueError`: if an entry cannot be asked: a score over the others would be another benchmark's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source.index(Path(scratch))
        asked = []
        for index in range(len(source)):
            try:
                asked += source.ask(index)
            except BadRow as error:
                raise ValueError(f"entry {source.name(index)} ({source.place(index)}): {error}.") from error
    if not asked:
        raise ValueError("There are no questions to ask: is this the right file and split?")
    return asked
