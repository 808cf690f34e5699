"""Which checkpoints of a run are whole. TRL looks at the newest one only, and dies on a half-written one."""

import filecmp
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lavin.files_lavin import ADAPTER_CONFIG, ADAPTER_NAME, ADAPTER_WEIGHTS, BASE_WEIGHTS


STATE = "trainer_state.json"  # TRL writes it last
ASIDE = "_incomplete-"  # TRL neither counts nor uploads folders of such a name


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-N` of a run, newest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def step_of(checkpoint: str | os.PathLike) -> int:
    """The step in a checkpoint's name."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def read_state(checkpoint: str | os.PathLike) -> dict:
    """A checkpoint's `trainer_state.json`."""
    return json.loads(Path(checkpoint, STATE).read_text(encoding="utf-8"))


def checkpoint_problem(checkpoint: str | os.PathLike, processes: int = 1) -> str | None:
    """
    Why a run cannot go on from a checkpoint. Only the ends and headers of large files are read.

    Args:
        checkpoint (`str` or `os.PathLike`): A folder that `trl sft` wrote.
        processes (`int`, *optional*, defaults to 1): Processes of the run that would go on from it.

    Returns:
        `str` or `None`: the first thing that is missing or cut off, `None` where the checkpoint is whole.
    """
    folder = Path(checkpoint)
    names = [STATE, "config.json"]
    if (folder / ADAPTER_NAME).is_dir():
        names.append(f"{ADAPTER_NAME}/{ADAPTER_CONFIG}")
    for name in names:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError):
            return f"{name} is cut off"
        if name == STATE and not isinstance(content.get("global_step"), int):
            return f"{STATE} has no step"
    if problem := weights_problem(folder):
        return problem
    if (folder / "latest").is_file():  # DeepSpeed: weights and optimiser of each process in a folder of their own
        states = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        files = sorted(states.glob("*.pt"))
        if not any("model_states" in file.name for file in files):
            return f"{states.name} has no model states"
        if not zero_ranks(folder):
            return f"{states.name} has no optimiser states"
        files += [file for file in [folder / "scheduler.pt"] if file.exists()]
    else:
        files = [folder / "optimizer.pt", folder / "scheduler.pt"]
    random = sorted(folder.glob("rng_state*.pth"))
    if not random or ([file.name for file in random] == ["rng_state_0.pth"] and processes > 1):
        return "rng_state.pth (random numbers) is missing"
    files += [*random, *folder.glob("scaler.pt")]
    for file in files:
        if not file.is_file():
            return f"{file.relative_to(folder)} is missing"
        if not zipfile.is_zipfile(file):  # torch.save writes a zip, whose table of contents comes last
            return f"{file.relative_to(folder)} is cut off"
    return None


def zero_ranks(checkpoint: str | os.PathLike) -> int:
    """For how many processes DeepSpeed wrote a checkpoint; 0 where it did not."""
    return len(list(Path(checkpoint).glob("global_step*/*optim_states*.pt")))


def weight_files(folder: str | os.PathLike) -> list[str]:
    """
    The weights that a run writes into a folder: the adapter, the whole base where that was trained, or both.

    Returns:
        `list[str]`: names in the folder, also of files that should be there; the adapter's where there is nothing.
    """
    folder = Path(folder)
    single, index = BASE_WEIGHTS
    names = [single] if (folder / single).is_file() else []
    if not names and (folder / index).is_file():
        try:
            names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError):
            names = [index]  # no tensors in there: cut off
    adapter = f"{ADAPTER_NAME}/{ADAPTER_WEIGHTS}"
    return [*names, adapter] if (folder / ADAPTER_NAME).is_dir() or not names else names


def weights_problem(folder: str | os.PathLike) -> str | None:
    """What is wrong with the weights of a folder; the header of each file tells how long it must be."""
    for name in weight_files(folder):
        file = Path(folder, name)
        if not file.is_file():
            return f"{name} is missing"
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError):
            return f"{name} is cut off"
    return None


def same_weights(a: Path, b: Path) -> bool:
    """Whether two folders hold the same weights, byte by byte."""
    names = weight_files(a)
    if names != weight_files(b) or weights_problem(a) or weights_problem(b):
        return False
    return all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def last_whole(output_dir: str | os.PathLike, processes: int = 1) -> tuple[Path | None, dict[Path, str]]:
    """
    The newest whole checkpoint of a run.

    Returns:
        `tuple`: its folder or `None`, and the newer ones that are not whole with what is wrong with each.
    """
    broken = {}
    for checkpoint in list_checkpoints(output_dir):
        problem = checkpoint_problem(checkpoint, processes)
        if problem is None:
            return checkpoint, broken
        broken[checkpoint] = problem
    return None, broken


def put_aside(checkpoint: Path) -> Path:
    """
    Renames a half-written checkpoint, so that `save_total_limit` neither counts it nor keeps it in a whole one's
    place, and the next one of that step does not mix with its files.
    """
    target = checkpoint.with_name(ASIDE + checkpoint.name)
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)
    return target
