"""Alpaca and LLaVA-Instruct JSON, as rows of TRL."""

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from .records import json_rows, keep, line_rows
from .rows import BadRow, image_part, message, read_image, text_part


IMAGE = "<image>"  # where LLaVA-Instruct has an image
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def format_instruction(instruction: str, more: str = "") -> str:
    r"""
    Writes an instruction the way LaVIN asks it.

    Args:
        instruction (`str`): What to do.
        more (`str`, *optional*): Alpaca's `input`.

    Returns:
        `str`: `"Instruction: {instruction} {input}\nResponse:"`; the space stays where there is no input.
    """
    return f"Instruction: {instruction.strip()} {more.strip()}\nResponse:"


def user_turn(text: str, more: str = "", has_slots: bool = True) -> dict:
    """
    A human turn as a message, its `<image>` slots as places of images.

    Args:
        text (`str`): What the human says. Slots at the beginning, at the end or on a line of their own go with their
            newline and stand before the text, where LaVIN has its images. If one stands within a sentence, all stay
            where they are.
        more (`str`, *optional*): Alpaca's `input`.
        has_slots (`bool`, *optional*, defaults to `True`): Whether `<image>` is a slot, and not a word of the text.

    Raises:
        [`BadRow`]: if there is no text.
    """
    pieces = text.split(IMAGE) if has_slots else [text]
    if not any(piece.strip() for piece in pieces):
        raise BadRow("empty question")
    within = any(
        before.rpartition("\n")[2].strip() and after.partition("\n")[0].strip()
        for before, after in zip(pieces, pieces[1:], strict=False)
    )
    if not within:
        text = "\n".join(piece.strip() for piece in pieces if piece.strip())
        return message("user", *[image_part()] * (len(pieces) - 1), text_part(format_instruction(text, more)))
    first, *others = format_instruction(text, more).split(IMAGE)
    parts = [text_part(first.removesuffix(" "))]
    for piece in others:  # the chat template puts a space between text and image
        parts.append(image_part())
        if piece := piece.removeprefix(" ").removesuffix(" "):
            parts.append(text_part(piece))
    return message("user", *parts)


def read_turns(entry: dict) -> tuple[list[tuple[str, str, str]], list[str]]:
    """
    Reads an entry of either format.

    Args:
        entry (`dict`): `conversations` (LLaVA-Instruct), or `instruction`, `input`, `output` (Alpaca), with `image`
            (a name or a list of them) or without.

    Returns:
        `tuple`: the turns as role, text and Alpaca's input; the images' names. There are as many `<image>` in the
        user's turns as there are images (where there are none, an `<image>` in Alpaca's text is a word like others).

    Raises:
        [`BadRow`]: if keys are missing, turns do not alternate, or `<image>` and images differ in number.
    """
    images = entry.get("image") or entry.get("images") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise BadRow("image is no file name", repr(images)[:80])
    if "conversations" in entry:
        turns = check_talk(entry["conversations"])
    else:
        needed = {key: entry.get(key) for key in ("instruction", "output")}
        if missing := [key for key, value in needed.items() if not isinstance(value, str)]:
            raise BadRow("missing keys", f"{', '.join(missing)} (or conversations)")
        more = entry.get("input") or ""
        if not isinstance(more, str):
            raise BadRow("not a text", "input")
        turns = [("user", entry["instruction"], more), ("assistant", entry["output"], "")]
    slots = sum(text.count(IMAGE) for role, text, _ in turns if role == "user")
    if images and not slots:  # an image that the text does not mention stands before the first question
        first = [role for role, *_ in turns].index("user")
        turns[first] = ("user", IMAGE * len(images) + turns[first][1], turns[first][2])
    elif slots != len(images) and (images or "conversations" in entry):
        raise BadRow("images and <image> differ", f"{slots} times <image> in the text, {len(images)} image files")
    return turns, images


def check_talk(talk) -> list[tuple[str, str, str]]:
    """The turns of `conversations`: human and gpt in turn, human first, gpt last, perhaps a system message before."""
    if not isinstance(talk, list) or not talk:
        raise BadRow("missing keys", "conversations is empty")
    turns = []
    for turn in talk:
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            raise BadRow("missing keys", f"from and value in turn {len(turns)} of conversations")
        if role not in ROLES:
            raise BadRow("unknown speaker", repr(role))
        turns.append((ROLES[role], text, ""))
    said = [role for role, *_ in turns]
    asked = said[1:] if said[0] == "system" else said
    if not asked or asked != ["user", "assistant"] * (len(asked) // 2):
        raise BadRow("turns do not alternate", ", ".join(turn["from"] for turn in talk)[:80])
    return turns


class Instructions:
    """
    Alpaca and LLaVA-Instruct files, read entry by entry.

    Args:
        inputs (`list[str]` or `list[Path]`): JSON lists or JSON Lines; the two formats may be mixed.
        image_root (`str` or `Path`, *optional*): What the images' names are relative to.

    Raises:
        `FileNotFoundError`: if a file or the folder is not there.
    """

    def __init__(self, inputs: list[str | Path], image_root: str | Path | None = None):
        self.files = [Path(path) for path in inputs]
        self.image_root = None if image_root is None else Path(image_root)
        for path in self.files:
            if not path.is_file():
                raise FileNotFoundError(f"There is no file {path}.")
        if self.image_root is not None and not self.image_root.is_dir():
            raise FileNotFoundError(f"--image-root: there is no folder {image_root}.")

    def index(self, scratch: Path):
        """
        Reads the files once.

        Args:
            scratch (`Path`): A folder for the entries, which are read from there one by one.
        """
        from datasets import concatenate_datasets

        tables = [keep(json_rows if is_list(path) else line_rows, scratch, path=path) for path in self.files]
        self.entries = concatenate_datasets(tables)
        self.first = [0, *accumulate(map(len, tables))][:-1]  # the number of each file's first entry

    def __len__(self) -> int:
        return len(self.entries)

    def _file(self, index: int) -> tuple[Path, int]:
        """The file of an entry, and the entry's number in it."""
        file = bisect_right(self.first, index) - 1
        return self.files[file], index - self.first[file]

    def place(self, index: int) -> str:
        """File and number of an entry, from 0."""
        path, number = self._file(index)
        return f"{path.name}[{number}]"

    def name(self, index: int) -> str:
        """The entry's `id`; where it has none, the file's name and the entry's number."""
        try:
            return self._id(index, json.loads(self.entries[index]["entry"]))
        except ValueError:
            return self._id(index, {})

    def _id(self, index: int, entry) -> str:
        path, number = self._file(index)
        own = entry.get("id") if isinstance(entry, dict) else None
        return f"{path.stem}-{number}" if own in (None, "") else str(own)

    def rows(self, index: int) -> list[dict]:
        """
        The entry's rows, one for each answer: the prompt is all that was said before.

        Returns:
            `list[dict]`: `prompt` and `completion` (lists of messages), `images` (those of the prompt, as
            `{"bytes", "path"}`), `id` (that of the entry; with the answer's number where there are several).

        Raises:
            [`BadRow`]: if the entry cannot be used.
            `ValueError`: if it has an image, and there is no `image_root`.
        """
        try:
            entry = json.loads(self.entries[index]["entry"])
        except ValueError as error:
            raise BadRow("not JSON", str(error)) from error
        if not isinstance(entry, dict):
            raise BadRow("not an object", f"a {type(entry).__name__}")
        turns, names = read_turns(entry)
        if names and self.image_root is None:
            raise ValueError(
                f"Entry {self._id(index, entry)} has an image, {names[0]}: say where it is, --image-root."
            )
        images = [read_image(self.image_root / name) for name in names]
        said, rows, seen = [], [], 0
        for role, text, more in turns:
            if role == "user":
                said.append(user_turn(text, more, has_slots=bool(names)))
                seen += text.count(IMAGE) if names else 0
                continue
            if not text.strip():
                raise BadRow("empty answer" if role == "assistant" else "empty system message")
            said.append(message(role, text_part(text.strip())))
            if role == "assistant":
                name = self._id(index, entry)
                rows.append({"prompt": said[:-1], "completion": said[-1:], "images": images[:seen], "id": name})
        if len(rows) > 1:
            for number, row in enumerate(rows, 1):
                row["id"] += f"-{number}"
        return rows


def is_list(path: Path) -> bool:
    """Whether a file is a JSON list; otherwise it is JSON Lines."""
    with open(path, "rb") as file:
        head = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:1] in (b"[", b""):
        return True
    try:
        with open(path, "rb") as file:
            first = json.loads(next(line for line in file if line.strip()))
    except ValueError:
        first = None
    if not isinstance(first, dict):
        raise ValueError(f"{path} is neither a JSON list of entries nor JSON Lines.")
    return False
