"""ScienceQA-format rows as `lavin data scienceqa` writes them, for lmms-eval."""

import os
from glob import glob
from pathlib import Path

from lavin.images_lavin import read_image
from lavin.recipes.data.scienceqa import LETTERS
from lavin.recipes.evaluate.scienceqa import parse_letter


def data_files() -> dict[str, list[str]]:
    """
    The rows' files: `test-*.parquet` in the folder that the environment variable `LAVIN_SCIENCEQA` names, by default
    `data/scienceqa`. Where there are none, `datasets` names the one it misses when the task is loaded, not before:
    `--include_path` imports this for other tasks too.
    """
    folder = Path(os.environ.get("LAVIN_SCIENCEQA", "data/scienceqa")).absolute()
    return {"test": sorted(glob(str(folder / "test-*.parquet"))) or [str(folder / "test-00000-of-00001.parquet")]}


DATA_FILES = data_files()


def images(row: dict) -> list:
    """A row's images."""
    return [read_image(image) for image in row["images"]]


def question(row: dict) -> str:
    """The user's text, written by `lavin data`; lmms-eval gives the images apart."""
    return "".join(part["text"] for part in row["prompt"][0]["content"] if part["type"] == "text")


def target(row: dict) -> str:
    """The right letter."""
    return LETTERS[row["answer"]]


def score_text(row: dict, results: list[str]) -> dict[str, float]:
    """Reads the letter as `lavin eval scienceqa` does; an answer without one is wrong, and counted."""
    letter = parse_letter(results[0], len(row["choices"]))
    return {"accuracy": float(letter == row["answer"]), "unparsable": float(letter is None)}
