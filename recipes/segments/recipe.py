"""A recipe of segments: what `lavin train-segments` reads, and the `trl sft` recipe of each segment in it."""

import difflib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lavin.trainable_lavin import BOTH, check_patterns

from ..train.settings import read_yaml


# What `trainable` may name beside regular expressions. A decoder that has query and value in one map has no `q_and_v`.
PARTS = {
    "adapter": r"multi_modal_projector\.",
    "projector": r"multi_modal_projector\.",
    "vision_tower": r"vision_tower\.",
    "q_and_v": r"language_model\..*\.(q|v)_proj\.weight$",
    "language_model": r"(language_model\.|^lm_head\.)",
    "all": r".",
}
PREVIOUS = "previous"
TOP, OWN = ("output_dir", "common", "segments"), ("name", "init_from", "trainable", "mma")
# Settings that follow from the order of the segments.
OURS = ("output_dir", "model_name_or_path", "resume_from_checkpoint", "push_to_hub", "config")


@dataclass
class Segment:
    """
    Args:
        number (`int`): From 1.
        name (`str`): What the recipe calls it.
        folder (`Path`): Where it is trained.
        start (`str`): Folder or Hub name that it starts from.
        after (`Segment`, *optional*): The one that writes `start`.
        values (`dict`): Its recipe of `trl sft`.
    """

    number: int
    name: str
    folder: Path
    start: str
    after: "Segment | None"
    values: dict = field(repr=False)

    @property
    def title(self) -> str:
        return f"{self.number}-{self.name}"

    def write(self, folder: Path) -> Path:
        """Writes its recipe, which `lavin train --config` takes as well."""
        file = folder / f"{self.title}.yaml"
        file.write_text(yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return file


def read_recipe(path: str | os.PathLike) -> tuple[Path, list[Segment]]:
    """
    Reads a recipe: `output_dir`, `common` (options of `trl sft` for all segments) and `segments`, each with a `name`,
    `init_from` (`previous` by default), `trainable` or `mma`, and options of `trl sft` that go before those of
    `common`.

    Returns:
        `tuple[Path, list[Segment]]`: the folder of the whole, and the segments.

    Raises:
        `ValueError`: if something is missing, unknown or does not go together. Options of `trl sft` are not looked at.
    """
    recipe = read_yaml(path)
    _known(f"{path}", recipe, TOP)
    if not isinstance(recipe.get("output_dir"), str):
        raise ValueError(f"{path} names no `output_dir`, the folder for all segments.")
    common, entries = recipe.get("common") or {}, recipe.get("segments")
    if not isinstance(common, dict):
        raise ValueError(f"{path}: `common` must hold options of `trl sft`, as `key: value` lines.")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: `segments` must be a list, each entry with `name:`, `trainable:` and settings.")
    _not_ours(f"{path}, common", common, (*OURS, *OWN))
    output, segments = Path(recipe["output_dir"]), []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, segment {number}"
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{where} needs a `name` of letters, digits, dots and hyphens; got {name!r}.")
        if name in [segment.name for segment in segments]:
            raise ValueError(f"{where}: there is a segment {name!r} already.")
        _not_ours(where, entry, OURS)
        segments.append(_segment(f"{where} ({name})", entry, common, number, output, segments[-1:]))
    return output, segments


def _segment(where: str, entry: dict, common: dict, number: int, output: Path, before: list[Segment]) -> Segment:
    start = entry.get("init_from", PREVIOUS)
    if start == PREVIOUS and not before:
        raise ValueError(f"{where} is the first: `init_from: my-lavin` names the folder or Hub name it starts from.")
    if not isinstance(start, str):
        raise ValueError(f"{where}: `init_from` must be `previous`, a folder or a Hub name; got {start!r}.")
    after = before[0] if start == PREVIOUS else None
    kwargs = {**(common.get("model_init_kwargs") or {}), **(entry.get("model_init_kwargs") or {})}
    if "trainable" in kwargs or "mma" in kwargs:
        raise ValueError(f"{where}: `trainable` and `mma` stand in the segment itself, not in `model_init_kwargs`.")
    trainable, mma = entry.get("trainable"), entry.get("mma")
    if trainable is not None and mma is not None:
        raise ValueError(f"{where}: {BOTH}")
    if trainable is None and mma is None:
        raise ValueError(
            f"{where} trains nothing: add `mma: {{}}` or `trainable: [...]` with {', '.join(PARTS)} or regular "
            "expressions."
        )
    if trainable is not None:
        trainable = [trainable] if isinstance(trainable, str) else trainable
        check_patterns(trainable)
        kwargs["trainable"] = [PARTS.get(part, part) for part in trainable]
        if after is not None and "mma" in after.values["model_init_kwargs"]:
            raise ValueError(
                f"{where} trains the base after an adapter was trained on it: the adapter would no longer fit. Put "
                "the segments with `mma` last."
            )
    else:
        kwargs["mma"] = mma
    folder = output / f"{number}-{entry['name']}"
    settings = {key: value for key, value in {**common, **entry}.items() if key not in OWN}
    start = str(after.folder) if after else start
    ours = {"model_name_or_path": start, "model_init_kwargs": kwargs, "output_dir": str(folder)}
    return Segment(number, entry["name"], folder, start, after, {"trust_remote_code": True, **settings, **ours})


def _known(where: str, given: dict, known: tuple[str, ...]):
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean `{near[0]}`?" if near else "options of `trl sft` go into `common` or a segment."
            raise ValueError(f"{where}: unknown key `{key}`: {hint}")


def _not_ours(where: str, given: dict, ours: tuple[str, ...]):
    for key in given:
        if key in ours:
            raise ValueError(
                f"{where}: `{key}` cannot stand here. Where a segment starts is said by its `init_from`, where all of "
                "them go by the recipe's `output_dir`, what it trains by its `trainable` or `mma`; it resumes by "
                "itself; and the result is uploaded when all is done."
            )
