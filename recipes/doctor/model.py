"""The checks of a LaVIN folder, or of a repository of the Hub. No code of it is run, and no model is loaded."""

import ast
import contextlib
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from huggingface_hub import constants
from transformers.dynamic_module_utils import get_relative_imports

from lavin import LavinConfig
from lavin.files_lavin import ADAPTER_CONFIG, ADAPTER_NAME, ADAPTER_WEIGHTS
from lavin.recipes.doctor.fit import check_checkpoints, check_processor
from lavin.recipes.doctor.folder import (
    ADAPTER_AGAIN,
    AGAIN,
    MAKE,
    Folder,
    base_again,
    code_again,
    generation_again,
    has_file,
    processor_again,
)
from lavin.recipes.doctor.report import FAIL, OK, SKIP, Check, Line, said
from lavin.recipes.doctor.weights import check_adapter, check_base_weights
from lavin.saving_lavin import AUTO_MAP


_REFERENCE = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")


def model_checks(_: contextlib.ExitStack, name: str) -> list[Check]:
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
    return [
        Check("config", partial(check_config, folder), f"{AGAIN} {MAKE}"),
        *(Check(title, partial(_with_config, check, folder, title), do) for title, (check, do) in checks.items()),
    ]


def _with_config(check, folder: Folder, title: str) -> Iterator[Line]:
    if folder.config is None:
        yield Line(SKIP, title, "not checked: it needs a config.json that can be read")
    else:
        yield from check(folder)


def check_config(folder: Folder) -> Iterator[Line]:
    name = folder.name
    if not folder.is_local and (os.path.isabs(name) or name.startswith(".") or name.count("/") != 1):
        yield Line(FAIL, "config", f"there is no folder {name} (paths start at {Path.cwd()})", MAKE)
        return
    try:
        found = has_file(name, None, "config.json")
    except OSError as error:
        do = "Check the network, or download the folder and name it by its path."
        yield Line(FAIL, "config", f"{name} is no folder here ({Path.cwd()}), and {error}", do)
        return
    if not found and not folder.is_local:
        where = (
            "not in the cache, and this is offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "not on the Hub"
        )
        do = f"Check the name; `hf auth login` for a private repository; `hf download {name}` to have it in the cache."
        yield Line(FAIL, "config", f"{name} is no folder here ({Path.cwd()}), and its config.json is {where}", do)
        return
    if not found:
        yield Line(FAIL, "config", f"config.json is missing: {name} is no LaVIN folder", f"{AGAIN} {MAKE}")
        return
    kind = folder.read("config.json").get("model_type")
    if kind != LavinConfig.model_type:
        yield Line(FAIL, "config", f"{name} is a {kind}, no LaVIN", MAKE)
        return
    config = folder.config = LavinConfig.from_pretrained(name)
    towers = f"{config.vision_config.model_type} and {config.text_config.model_type}"
    yield Line(OK, "config", f"a LaVIN of {towers}, {config.num_image_tokens} image tokens per image")


def check_files(folder: Folder) -> Iterator[Line]:
    """Everything that loading needs, one line for each missing file."""
    code, missing = code_files(folder)
    lines = [Line(FAIL, "files", f"{file} is missing", code_again(folder, file)) for file in sorted(missing)]
    for file in folder.missing_of_processor():
        lines.append(Line(FAIL, "files", f"{file} is missing", processor_again(folder)))
    if folder.find("generation_config.json") is None:
        lines.append(Line(FAIL, "files", "generation_config.json is missing", generation_again(folder)))
    adapter = {f"{ADAPTER_NAME}/{file}" for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    present = {file for file in adapter if folder.find(file)}
    if present:
        lines += [Line(FAIL, "files", f"{file} is missing", ADAPTER_AGAIN) for file in sorted(adapter - present)]
    if index := folder.base_index():
        lines += [
            Line(FAIL, "files", f"{shard} is missing", base_again(folder))
            for shard in sorted(index)
            if not has_file(folder.name, None, shard)
        ]
    yield from lines
    if not lines:
        parts = f"config, {len(code)} of code, processor, tokenizer, chat template, generation config"
        parts += (", adapter" if present else "") + (f", {len(index)} of base weights" if index else "")
        yield Line(OK, "files", f"complete: {parts}")


def code_files(folder: Folder) -> tuple[set[str], set[str]]:
    """
    Returns:
        `tuple[set[str], set[str]]`: the files that `auto_map` names with all that they import of each other, and which
        of them are missing.
    """
    names = [name for name in _auto_map(folder).values() if _REFERENCE.fullmatch(name)]
    waiting, found, missing = {f"{name.partition('.')[0]}.py" for name in names}, set(), set()
    while waiting:
        file = waiting.pop()
        path = folder.find(file)
        (missing if path is None else found).add(file)
        if path is not None:
            waiting |= {f"{module}.py" for module in get_relative_imports(path)} - found - missing
    return found, missing


def check_auto_map(folder: Folder) -> Iterator[Line]:
    """Each entry names a class that its file defines: read, not run."""
    entries, lines = _auto_map(folder), []
    for auto in AUTO_MAP:
        if auto not in entries:
            do = f'Add `"{auto}": "{AUTO_MAP[auto]}"` to `auto_map` in config.json, or save the model again.'
            lines.append(Line(FAIL, "auto_map", f"{auto} is not in it: it cannot be loaded so", do))
    processor = folder.read("processor_config.json")
    if processor and "AutoProcessor" not in processor.get("auto_map", {}):
        found = "processor_config.json does not say where its code is, and `trl sft` cannot load it"
        lines.append(Line(FAIL, "auto_map", found, processor_again(folder)))
    for auto, name in entries.items():
        if problem := _unresolved(folder, name):
            right = f'Write `"{auto}": "{AUTO_MAP[auto]}"` there' if auto in AUTO_MAP else "Remove the entry"
            do = f"{right}, or save model and processor again with `save_pretrained`."
            lines.append(Line(FAIL, "auto_map", f"{auto}: {name!r} {problem}", do))
    yield from lines
    if not lines:
        yield Line(OK, "auto_map", f"{len(entries)} classes, each defined in the file that it names")


def _auto_map(folder: Folder) -> dict[str, str]:
    """The entries of config.json and of processor_config.json; one that is no text is shown as it is written."""
    entries = {**folder.read("config.json").get("auto_map", {})}
    for auto, name in folder.read("processor_config.json").get("auto_map", {}).items():
        entries[auto if entries.get(auto, name) == name else f"{auto} (processor_config.json)"] = name
    return {auto: name if isinstance(name, str) else json.dumps(name) for auto, name in entries.items()}


def _unresolved(folder: Folder, name: str) -> str | None:
    """Why an entry of `auto_map` does not lead to a class of this folder."""
    if not _REFERENCE.fullmatch(name):
        return "asks for code outside this folder"
    module, _, wanted = name.partition(".")
    path = folder.find(f"{module}.py")
    if path is None:
        return f"names {module}.py, which is missing"
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        return f"names {module}.py, which is no Python ({said(error)})"
    if not any(isinstance(node, ast.ClassDef) and node.name == wanted for node in tree.body):
        return f"names a class that {module}.py does not define"
    return None
