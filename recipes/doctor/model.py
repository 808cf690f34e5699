"""The checks of a LaVIN folder, or of a repository of the Hub. No code of it is run, and no model is loaded."""

import ast
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from huggingface_hub import constants
from transformers.dynamic_module_utils import get_relative_imports

from lavin import LavinConfig
from lavin.files_lavin import ADAPTER_CONFIG, ADAPTER_NAME, ADAPTER_WEIGHTS
from lavin.saving_lavin import AUTO_MAP

from .fit import check_checkpoints, check_processor
from .folder import ADAPTER_AGAIN, AGAIN, MAKE, Folder, has_file
from .report import FAIL, OK, Finding, Line, said
from .weights import check_adapter, check_base_weights


def model_checks(name: str) -> list[tuple[str, Callable, str]]:
    """All checks of a folder, in the order of their lines. Without a readable config.json there is but one."""
    folder = Folder(os.fspath(name))
    checks = {
        "files": (check_files, AGAIN),
        "auto_map": (check_auto_map, AGAIN),
        "checkpoints": (check_checkpoints, AGAIN),
        "processor": (check_processor, AGAIN),
        "adapter": (check_adapter, ADAPTER_AGAIN),
        "base weights": (check_base_weights, AGAIN),
    }

    def with_config(check) -> list[Line]:
        folder.config  # noqa: B018  (skipped where there is none)
        return check(folder)

    return [
        ("config", partial(check_config, folder), f"{AGAIN} {MAKE}"),
        *((title, partial(with_config, check), do) for title, (check, do) in checks.items()),
    ]


def check_config(folder: Folder) -> str:
    name = folder.name
    if not folder.is_local and (os.path.isabs(name) or name.startswith(".") or name.count("/") != 1):
        raise Finding(FAIL, f"there is no folder {name} (paths start at {Path.cwd()})", MAKE)
    try:
        found = has_file(name, None, "config.json")
    except OSError as error:
        do = "Check the network, or download the folder and name it by its path."
        raise Finding(FAIL, f"{name} is no folder here ({Path.cwd()}), and {error}", do) from error
    if not found and folder.is_local:
        raise Finding(FAIL, f"config.json is missing: {name} is no LaVIN folder", f"{AGAIN} {MAKE}")
    if not found:
        where = "in the cache (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "on the Hub"
        do = f"Check the name; `hf auth login` for a private repository; `hf download {name}` to have it in the cache."
        raise Finding(FAIL, f"{name} is no folder here ({Path.cwd()}), and its config.json is not {where}", do)
    if (kind := folder.read("config.json").get("model_type")) != LavinConfig.model_type:
        raise Finding(FAIL, f"{name} is a {kind}, no LaVIN", MAKE)
    config = folder.known = LavinConfig.from_pretrained(name)
    towers = f"{config.vision_config.model_type} and {config.text_config.model_type}"
    return f"a LaVIN of {towers}, {config.num_image_tokens} image tokens per image"


def check_files(folder: Folder) -> list[Line]:
    """Everything that loading needs, one line for each missing file."""
    code, missing = code_files(folder)
    again = {file: folder.code_again(file) for file in sorted(missing)}
    again |= dict.fromkeys(folder.missing_of_processor(), folder.processor_again())
    if folder.find("generation_config.json") is None:
        again["generation_config.json"] = folder.generation_again()
    adapter = [f"{ADAPTER_NAME}/{file}" for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    absent = [file for file in adapter if folder.find(file) is None]
    again |= dict.fromkeys(absent if len(absent) == 1 else [], ADAPTER_AGAIN)
    shards = folder.base_index()
    again |= {shard: folder.base_again() for shard in sorted(shards) if not has_file(folder.name, None, shard)}
    parts = f"config, {len(code)} of code, processor, tokenizer, chat template, generation config"
    parts += ("" if absent else ", adapter") + (f", {len(shards)} of base weights" if shards else "")
    lines = [Line(FAIL, "files", f"{file} is missing", do) for file, do in again.items()]
    return lines or [Line(OK, "files", f"complete: {parts}")]


def code_files(folder: Folder) -> tuple[set[str], set[str]]:
    """The files of code, with all that they import of each other, that are there, and those that are missing."""
    waiting, found, missing = {f"{target.partition('.')[0]}.py" for target in AUTO_MAP.values()}, set(), set()
    while waiting:
        file = waiting.pop()
        path = folder.find(file)
        (missing if path is None else found).add(file)
        if path is not None:
            waiting |= {f"{module}.py" for module in get_relative_imports(path)} - found - missing
    return found, missing


def check_auto_map(folder: Folder) -> Iterator[Line]:
    """Each entry names the class that it should, and its file defines that: read, not run."""
    own, lines = folder.read("config.json").get("auto_map", {}), []
    processor = folder.read("processor_config.json")
    entries = [("config.json", own, auto) for auto in AUTO_MAP]
    entries += [("processor_config.json", processor.get("auto_map", {}), "AutoProcessor")] if processor else []
    for file, found, auto in entries:
        if found.get(auto) != AUTO_MAP[auto]:
            do = f'Write `"{auto}": "{AUTO_MAP[auto]}"` there, or save model and processor again.'
            if file != "config.json":
                do = f"{do} {folder.processor_again()}"
            words = f"{auto} in {file} is {found.get(auto)!r}: `trl sft` and others would load something else, or fail"
            lines.append(Line(FAIL, "auto_map", words, do))
    for module, wanted in sorted({tuple(target.split(".")) for target in AUTO_MAP.values()}):
        if problem := _undefined(folder.find(f"{module}.py"), wanted):
            lines.append(Line(FAIL, "auto_map", f"{module}.py {problem}", folder.code_again(f"{module}.py")))
    return lines or [Line(OK, "auto_map", f"{len(AUTO_MAP)} classes, each defined in the file that it names")]


def _undefined(path: str | None, wanted: str) -> str | None:
    """Why a file does not define a class; a missing one is told of elsewhere."""
    if path is None:
        return None
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        return f"is no Python ({said(error)})"
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return None if wanted in defined else f"does not define {wanted}"
