"""
The pages of docs/, of the root and of the recipes: every command is one, by its own parser; every Python block runs on
tiny checkpoints. A block that needs more says so in its first line: `# needs a GPU`, `the Hub`, `a server`.
"""

import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from test_readme import ROOT, blocks, folder, run_python  # noqa: F401, the fixture
from trl.scripts import dpo, sft

import lavin
from lavin.recipes.cli import build_parser


GENERATED = ("docs/families.md",)
OURS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "C*.md", "SKILL.md", "docs/*.md", "recipes/README.md")
    for path in ROOT.glob(pattern)
)
OURS = [page for page in OURS if page not in GENERATED]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("recipes/*/README.md"))
MARK = re.compile(r"# needs (a GPU|the Hub|a server)$", flags=re.M)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def check_training(words: list[str], parser):
    """Options of TRL and of `accelerate launch`; files of this repository are there."""
    known = {*parser._option_string_actions, *launch_command_parser()._option_string_actions}
    known |= {"--config", "--accelerate_config"}  # which TRL reads before its parser
    assert {word for word in words if word.startswith("--")} <= known, words
    for word in words:
        assert not word.startswith("recipes/") or (ROOT / word).is_file(), word


def check_module(words: list[str]):
    """`python -m module options`: its help knows the options."""
    if not words[0].startswith("lavin.recipes."):
        assert find_spec(words[0].partition(".")[0]), words
        return
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", [words[0], "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    assert not end.value.code
    assert all(word in shown.getvalue() for word in words[1:] if word.startswith("--")), words


def check(words: list[str]) -> bool:
    """Whether it is a command that is known here; it raises where the command would refuse its options."""
    name, rest = words[0], words[1:]
    if name == "lavin" and rest[0] in ("train", "train-segments"):
        check_training(build_parser().parse_known_args(rest)[1], sft.make_parser())
    elif name == "lavin" and rest[0] != "quickstart":
        build_parser().parse_args(rest)
    elif name == "trl":
        check_training(rest[1:], {"sft": sft, "dpo": dpo}[rest[0]].make_parser())
    elif name == "make":
        targets = [word for word in rest if "=" not in word]
        assert all(re.search(rf"^{target}:", MAKEFILE, flags=re.M) for target in targets), words
    elif name == "pip" and "-e" in rest:
        extras = re.findall(r"\w+", rest[-1])
        known = re.findall(r"^(\w+) = \[", text_of("pyproject.toml"), flags=re.M)
        assert rest[:-1] == ["install", "-c", "constraints.txt", "-e"] and set(extras) <= set(known), words
    elif name == "python" and rest[0] == "-m":
        check_module(rest[1:])
    elif name == "hf":
        help = [sys.executable, "-m", "huggingface_hub.cli.hf", rest[0], "--help"]
        shown = subprocess.run(help, capture_output=True, text=True, check=True).stdout
        assert all(word in shown for word in rest if word.startswith("--")), shown
    else:
        return False
    return True


@pytest.mark.parametrize("page", OURS + RECIPES)
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for block in re.findall(r"^```bash\n(.*?)^```$", text_of(page), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and not check(words):
                assert page in RECIPES or MARK.match(block), line


@pytest.mark.parametrize("page", OURS)
def test_commands_within_the_text_exist(page):
    inline = re.findall(r"`((?:make|lavin|python -m) [^`]+)`", text_of(page))
    (subcommands,) = (action.choices for action in build_parser()._actions if action.dest == "command")
    for line in inline:
        words = shlex.split(line.split("|")[0].replace("...", ""))
        if words[0] == "make":
            check(words)
        elif words[0] == "lavin":
            assert words[1] in subcommands, line
        else:
            assert find_spec(words[2]), line


@pytest.mark.parametrize("page", OURS)
def test_blocks_are_of_a_kind_that_is_tried(page):
    kinds = set(re.findall(r"^```(\w*)\n.*?^```$", text_of(page), flags=re.M | re.S))
    assert kinds <= {"bash", "python", "yaml", "bibtex", "mermaid"}
    if page != "README.md":  # whose recipe is trained with
        assert not blocks("yaml", page)


@pytest.mark.parametrize("page", [page for page in OURS if page not in ("README.md", "docs/own-data.md")])
def test_python_blocks_run(page, request, monkeypatch):
    if not blocks("python", page):
        return
    monkeypatch.chdir(request.getfixturevalue("folder"))
    assert not any(MARK.match(block) for block in blocks("python", page))
    run_python(page)


def test_every_public_name_is_in_the_reference():
    assert re.findall(r"^::: lavin\.(\w+)", text_of("docs/api.md"), flags=re.M) == [
        name for name in lavin.__all__ if getattr(lavin, name).__doc__.strip()
    ]


def test_marks_of_measured_numbers_are_pairs():
    for page in [*OURS, *RECIPES]:
        assert [name for end, name in re.findall(r"<!-- (/?)(\w+:[\w-]+) -->", text_of(page)) if not end] == [
            name for end, name in re.findall(r"<!-- (/?)(\w+:[\w-]+) -->", text_of(page)) if end
        ], page


@pytest.mark.slow
def test_site_is_built_without_a_warning(tmp_path):
    """As `make docs` builds it: strict, so without a broken link or a missing anchor."""
    pytest.importorskip("mkdocs", reason="the extra `docs`, from Python 3.11 on")
    (line,) = re.findall(r"^docs: .*\n\t(.*)", MAKEFILE, flags=re.M)
    assert "--strict" in line
    line = line.replace("$(VENV)/bin/python", shlex.quote(sys.executable)).replace("$(ARGS)", f"--site-dir {tmp_path}")
    built = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    reference = Path(tmp_path, "api.html").read_text(encoding="utf-8")
    assert all(f'id="lavin.{name}"' in reference for name in lavin.__all__)
