"""The table "what was tried, what happened": the tests of bad input and faults fill it, pytest's end writes it."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lavin import LavinForConditionalGeneration, LavinProcessor


TABLE = Path(__file__).parents[1] / "outputs" / "faults" / "table.md"
ROWS: dict[tuple[str, str], str] = {}


def happened(area: str, what: str, outcome: str):
    """One row. Called where everything about the case has been asserted."""
    outcome = " ".join(outcome.split())
    outcome = re.sub(r"(?<![\w.:/])/(?:[^\s'\"/,;:()`]+/)+", ".../", outcome)  # folders of this machine
    outcome = re.sub(r"127\.0\.0\.1:\d+", "HOST", outcome)
    ROWS[area, what] = outcome.replace("|", "\\|")


@contextlib.contextmanager
def refused(area: str, what: str, match: str, kind=(ValueError, OSError)):
    """The case must end with an error of this kind, whose message matches; the message is what happened."""
    with pytest.raises(kind, match=match) as error:
        yield error
    message = " ".join(str(error.value).split())
    happened(area, what, "refused: " + (message if len(message) <= 180 else f"{message[:180]} ..."))


def write_table() -> Path | None:
    """The rows of this session as Markdown; `make faults` asks for the table, in which all rows are."""
    if not ROWS or "LAVIN_FAULTS" not in os.environ:
        return None
    lines = ["| area | what was tried | what happened |", "|---|---|---|"]
    lines += [f"| {area} | {what} | {outcome} |" for (area, what), outcome in sorted(ROWS.items())]
    os.makedirs(TABLE.parent, exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return TABLE


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory) -> Path:
    """A light LaVIN folder of the pair, whose adapter is not the identity."""
    from conftest import fill

    where = tmp_path_factory.mktemp("lavin")
    model = LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text", mma={})
    fill(model).save_pretrained(where)
    LavinProcessor.from_vision_text_pretrained(str(pair / "vision"), str(pair / "text")).save_pretrained(where)
    return where


def chat(text: str, *images) -> list[dict]:
    """One user message; an image is a path, a URL, bytes or an object of PIL."""
    parts = [{"type": "image", "path" if isinstance(image, str) else "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def inputs_of(processor, messages, **options):
    """What `generate` gets, by the documented call."""
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **asked, **options)


def lavin(*arguments, **environment) -> subprocess.CompletedProcess:
    """The command in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "lavin.recipes.cli", *map(str, arguments)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
