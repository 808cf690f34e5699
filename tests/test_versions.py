"""What a folder says of versions that it was never run with, and that the ranges in three places agree."""

import logging
from importlib.metadata import version

import compat
import pytest
from conftest import tiny_lavin
from packaging.requirements import Requirement
from packaging.version import Version

from lavin import LavinForConditionalGeneration, files_lavin


def minor(number: str) -> tuple:
    return Version(number).release[:2]


def test_the_range_is_that_of_pyproject_and_constraints():
    pins = [Requirement(line) for line in (compat.ROOT / "constraints.txt").read_text().splitlines()[1:]]
    pins = {r.name: max(s.version for s in r.specifier) for r in reversed(pins)}  # of several, the first
    floors = {**compat.declared(), "torch": Requirement("torch>=2.6")}
    for name, (oldest, newest) in files_lavin.RAN_WITH.items():
        assert minor(oldest) == minor(compat.floor(floors[name]))
        assert minor(newest) >= minor(pins[name])
        assert minor(oldest) <= minor(version(name)) <= minor(newest), "this environment's is outside: run and widen"


@pytest.mark.parametrize("name, installed, said", [
    ("transformers", "5.25.0", True),
    ("transformers", "6.0.0.dev0", True),
    ("transformers", "4.57.1", True),
    ("transformers", "5.24.9", False),
    ("torch", "2.13.0+cpu", False),
    ("torch", "2.16.0", True),
    ("peft", "0.22.0", True),
])  # fmt: skip
def test_one_line_when_a_folder_is_loaded(monkeypatch, tmp_path, caplog, name, installed, said):
    tiny_lavin(adapter=False).save_pretrained(tmp_path)
    monkeypatch.setattr(files_lavin, "version", lambda asked: installed if asked == name else version(asked))
    files_lavin.logger.warning_once.__func__.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for _ in range(2):
        LavinForConditionalGeneration.from_pretrained(tmp_path)
    lines = [record.message for record in caplog.records if "never run with" in record.message]
    assert len(lines) == said
    if said:
        assert f"{name} {installed}" in lines[0] and "\n" not in lines[0]
