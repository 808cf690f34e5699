"""`make compat`: the limits it reads, the environments it asks for, and its table and exit code on real test runs."""

import shutil
import sys
from importlib.metadata import version

import compat
import pytest
from packaging.requirements import Requirement


def test_the_limits_are_those_of_pyproject_and_hold_what_is_tested_with():
    declared = compat.declared()
    assert set(declared) == set(compat.PACKAGES)
    tested = [Requirement(line) for line in (compat.ROOT / "constraints.txt").read_text().splitlines()[1:]]
    tested = [r for r in tested if r.name in declared and (r.marker is None or r.marker.evaluate())]
    assert len(tested) == len(declared)
    for requirement in tested:
        (pinned,) = requirement.specifier
        assert declared[requirement.name].specifier.contains(pinned.version)
    oldest, newest = compat.pins("oldest"), compat.pins("newest")
    torch = next(line for line in oldest if line.startswith("torch=="))
    assert set(oldest) - set(newest) == {torch, *(f"{name}=={compat.floor(r)}" for name, r in declared.items())}
    assert not set(newest) - set(oldest)
    assert {Requirement(line).name for line in newest} >= {"datasets", "hypothesis"}
    assert not {Requirement(line).name for line in newest} & {"torch", *compat.PACKAGES}


TESTS = """
import pytest
def test_passes(): pass
def test_second(): assert {second}
@pytest.mark.skip(reason="no")
def test_skipped(): pass
@pytest.mark.slow
def test_slow(): pass
"""


@pytest.mark.parametrize(
    "second, options, code, counts",
    [
        (True, ["-m", "not slow"], 0, (2, 0, 1)),
        (False, ["--all"], 1, (2, 1, 1)),
        (True, ["-k", "nothing"], 1, (0, 0, 0)),
    ],
)
def test_table_and_exit_code(monkeypatch, capsys, tmp_path, second, options, code, counts):
    """With this environment in place of a fresh one."""
    shutil.copy(compat.ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    monkeypatch.setattr(compat, "make_environment", lambda *asked: sys.executable)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS.format(second=second))
    assert compat.main(["--only", "oldest", "-p", "no:cacheprovider", *options]) == code
    header, _, row, *rest = capsys.readouterr().out.strip().splitlines()[-3 - (code == 1) :]
    cells = dict(zip(header.split("|")[1:-1], row.split("|")[1:-1], strict=True))
    cells = {name.strip(): cell.strip() for name, cell in cells.items()}
    assert tuple(int(cells[name]) for name in compat.COLUMNS) == counts
    assert cells["transformers"] == version("transformers") and cells["peft"] == version("peft")
    assert [line.startswith("failed, oldest: ") for line in rest] == [True] * (code == 1)
    assert ("test_it::test_second" in "".join(rest)) == (not second)
