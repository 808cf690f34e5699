"""The wheel and the sdist: what is in them, what becomes importable, and that the command runs."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
CHECK = """
import importlib.util, pathlib, sys
import lavin, lavin.recipes.cli, lavin.recipes.convert, lavin.recipes.init
home = pathlib.Path(lavin.__file__).parent
assert home.is_relative_to(sys.prefix), home
for name in ("configuration", "modeling_lavin", "processing", "recipes", "tests", "tiny"):
    assert importlib.util.find_spec(name) is None, name
assert (home / "model_card.md").read_text() == pathlib.Path(sys.argv[1], "model_card.md").read_text()
"""


def run(*command, **options) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options["env"] = {**environment, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, built from a copy: setuptools leaves folders behind. The wheel is made from the sdist."""
    source = tmp_path_factory.mktemp("source") / "lavin"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT)
    run(sys.executable, "-m", "build", cwd=source)
    (wheel,), (sdist,) = (source / "dist").glob("*.whl"), (source / "dist").glob("*.tar.gz")
    return wheel, sdist


def expected_files() -> set[str]:
    """Code and data as they lie in the package."""
    files = {f"lavin/{path.name}" for path in (ROOT / "modeling_lavin").iterdir() if path.suffix in (".py", ".md")}
    recipes = ROOT / "recipes"
    for path in recipes.rglob("*"):
        if path.is_file() and (path.suffix in (".py", ".yaml") or "tiny" in path.relative_to(recipes).parts):
            files.add(f"lavin/recipes/{path.relative_to(recipes).as_posix()}")
    return files


@pytest.mark.slow
def test_wheel_and_sdist_hold_all_code_and_data(built):
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == expected_files()
        # What is a link in the repository is a file here.
        linked = ROOT / "configuration" / "configuration_lavin.py"
        assert archive.read("lavin/configuration_lavin.py") == linked.read_bytes()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert not any(member.issym() for member in members.values())
    assert {"LICENSE", "README.md", "constraints.txt", "Makefile"} <= set(members)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_install_in_a_fresh_environment(built, kind, tmp_path):
    """What lavin needs comes from this environment; lavin itself must not."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", built[kind == "sdist"])
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    assert (site / "lavin" / "__init__.py").is_file()
    # Behind its own site-packages, so that no installed (editable) lavin is seen: .pth files are not read there.
    here = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (site / "behind.pth").write_text(f"{here}\n")
    run(python, "-c", CHECK, ROOT, cwd=tmp_path)
    help_text = run(tmp_path / "venv" / "bin" / "lavin", "--help", cwd=tmp_path)
    assert all(name in help_text for name in ("init", "convert", "card", "quickstart"))
    top_level = {path.name for path in site.iterdir() if path.suffix != ".pth"}
    assert {name for name in top_level if not name.startswith(("pip", "setuptools", "_distutils", "distutils"))} <= {
        "lavin",
        "lavin-0.1.0.dist-info",
        "pkg_resources",
        "__pycache__",
    }


def test_what_travels_imports_only_what_the_dependencies_bring():
    """Torch, transformers, PEFT and what pip installs for them: no package that happens to be in this environment."""
    brought, waiting = set(), ["torch", "transformers", "peft", "pillow"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in brought:
            continue
        brought.add(name)
        needed = map(Requirement, requires(name) or [])
        waiting += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    providers = packages_distributions()
    for file in (ROOT / "modeling_lavin").glob("*_lavin.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                found = {canonicalize_name(name) for name in providers.get(top, [top])}
                assert found & brought, f"{file.name} imports {top}, which no dependency brings"
