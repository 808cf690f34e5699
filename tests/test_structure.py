"""The house: what docs/architecture.md says of the core, and what no file may do."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "modeling_lavin").glob("*_lavin.py"))
CODE = [*(ROOT / "modeling_lavin").glob("*.py"), *(ROOT / "recipes").rglob("*.py")]
TESTS = sorted((ROOT / "tests").glob("*.py"))


def imports(file: Path) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]


def test_the_page_has_every_file_and_each_keeps_its_budget():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    budgets = {name: int(lines) for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", page, flags=re.M)}
    assert budgets.keys() == {file.name for file in CORE} and max(budgets.values()) <= 450
    for file in CORE:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= budgets[file.name], file.name


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_test_files_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 500


def test_no_private_name_crosses_files():
    for file in CODE:
        for node in imports(file):
            ours = node.level or (node.module or "").startswith("lavin")
            assert not ours or not any(alias.name.startswith("_") for alias in node.names), file


def test_what_travels_imports_its_own_kind_flat():
    for file in CORE:
        for node in imports(file):
            assert not (node.module or "").startswith("lavin"), file
            assert not node.level or (node.level == 1 and re.fullmatch(r"\w+_lavin", node.module or "")), file


def test_core_does_not_know_the_recipes():
    for file in (ROOT / "modeling_lavin").glob("*.py"):
        assert not any("recipes" in (node.module or "") for node in imports(file)), file
