"""Where each entry of a JSON file lies, so that any of them can be read alone: memory does not grow with the file."""

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm


CHUNK = 2**20
LONGEST = 2**26  # bytes of one entry; a broken file shows itself before all of it is in memory
SPACE = re.compile(r"[ \t\n\r]*")
NUMBER = ("", *"0123456789.eE+-")
DECODER = json.JSONDecoder()


class _Reader:
    """Reads JSON values one after another. Text is held as Latin-1: an offset in it is an offset in the file."""

    def __init__(self, path: Path, file, bar):
        self.path, self.file, self.bar = path, file, bar
        self.text, self.start, self.at = "", 0, 0  # what is held, where it begins in the file, where we are in it
        while len(self.text) < 3 and self.more():
            pass
        if self.text.startswith("\xef\xbb\xbf"):  # a byte order mark
            self.at = 3

    def more(self) -> bool:
        data = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.bar.update(len(data))
        self.text, self.start, self.at = self.text[self.at :] + data.decode("latin-1"), self.start + self.at, 0
        return bool(data)

    def fail(self, what: str):
        raise ValueError(f"{self.path} is no JSON file that can be read: {what} at byte {self.start + self.at:,}.")

    def peek(self) -> str:
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                self.fail("it ends too early,")

    def expect(self, characters: str) -> str:
        if (found := self.peek()) not in characters:
            self.fail(f"{' or '.join(characters)} is missing")
        self.at += 1
        return found

    def value(self) -> tuple[int, bytes]:
        """The next value: where it begins in the file, and its bytes."""
        self.peek()
        while True:
            try:
                end = DECODER.raw_decode(self.text, self.at)[1]
            except ValueError as error:  # not all of it is here, or it is broken
                if len(self.text) - self.at > LONGEST or not self.more():
                    self.fail(f"{error.msg if isinstance(error, json.JSONDecodeError) else error}")
                continue
            # what looks like the end of a number may be the end of what is held of it
            if self.text[end : end + 1] in NUMBER and self.more():
                continue
            start, raw = self.start + self.at, self.text[self.at : end].encode("latin-1")
            self.at = end
            return start, raw


def json_entries(path: str | Path, *keys: str) -> Iterator[tuple[str | None, int, bytes]]:
    """
    Goes through a JSON list or object, one entry at a time.

    Args:
        path (`str` or `Path`): The file.
        keys (`str`): Where in the file's objects the list or object is; the top by default.

    Yields:
        `tuple`: the key (`None` in a list), the first byte in the file, and the entry's bytes.

    Raises:
        `ValueError`: if the file is broken, or has no such key.
    """
    path = Path(path)
    bar = tqdm(total=path.stat().st_size, desc=f"Reading {path.name}", unit="B", unit_scale=True, delay=1, leave=False)
    with open(path, "rb") as file, bar:
        reader = _Reader(path, file, bar)
        for wanted in keys:
            reader.expect("{")
            while json.loads(reader.value()[1]) != wanted:
                reader.expect(":")
                reader.value()
                if reader.expect(",}") == "}":
                    raise ValueError(f"{path} has no {wanted!r}.")
            reader.expect(":")
        opening = reader.expect("{[")
        closing = "}" if opening == "{" else "]"
        if reader.peek() == closing:
            return
        while True:
            key = None
            if opening == "{":
                key = json.loads(reader.value()[1])
                reader.expect(":")
            yield key, *reader.value()
            if reader.expect("," + closing) == closing:
                return


def line_entries(path: str | Path) -> Iterator[tuple[None, int, bytes]]:
    """Goes through a file of JSON Lines as [`json_entries`] goes through a list; empty lines are left out."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                yield None, start, line
            start += len(line)


class Records:
    """
    The places of entries in files, 20 bytes each.

    Args:
        files (`list[Path]`): The files.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.file, self.start, self.length = array("i"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self.start)

    def add(self, start: int, length: int, file: int = 0):
        self.file.append(file)
        self.start.append(start)
        self.length.append(length)

    def read(self, index: int) -> bytes:
        """The bytes of one entry."""
        # opened each time: forked processes would share one position
        with open(self.files[self.file[index]], "rb") as file:
            file.seek(self.start[index])
            return file.read(self.length[index])


class Table:
    """
    The entries of a JSON object by key.

    Args:
        path (`str` or `Path`): The file.
        keys (`str`): Where in it the object is; the top by default.
    """

    def __init__(self, path: str | Path, *keys: str):
        self.records, names = Records([Path(path)]), []
        for key, start, raw in json_entries(path, *keys):
            if key is None:
                raise ValueError(f"{path} holds a list where ScienceQA has an object.")
            names.append(key)
            self.records.add(start, len(raw))
        names = np.array(names, dtype=str)
        self.order = np.argsort(names, kind="stable")
        self.names = names[self.order]

    def find(self, names: np.ndarray) -> np.ndarray:
        """For each name its place in `records`; -1 where there is none."""
        if not len(self.names) or not len(names):
            return np.full(len(names), -1)
        at = (
            np.searchsorted(self.names, names, side="right") - 1
        )  # of two with the same key the last counts, as in json
        return np.where(self.names[at] == names, self.order[at], -1)
