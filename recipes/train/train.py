"""`lavin train`: checks, a plan, unmodified `trl sft`, and our card put back."""

import contextlib
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavin.files_lavin import ADAPTER_NAME
from lavin.saving_lavin import check_output_folder

from ..card import card_folder
from ..report import readable
from .base import asked_patterns, base_bytes, by_part, rounding_warning, trained_of_base
from .checkpoints import (
    STATE,
    checkpoint_problem,
    last_whole,
    list_checkpoints,
    put_aside,
    read_state,
    same_weights,
    step_of,
    zero_ranks,
)
from .checks import (
    check_model,
    check_options,
    check_output,
    check_push,
    checkpoint_bytes,
    choose_report_to,
    hub_arguments,
)
from .launch import run_watched
from .settings import Settings, count_steps, read_settings, read_yaml


def train(
    config: str | os.PathLike, overrides: list[str] | tuple[str, ...] = (), settings: Settings | None = None
) -> int:
    """
    Checks a recipe and its data, then runs `trl sft` on it, from the newest whole checkpoint if there is one.

    Args:
        config (`str` or `os.PathLike`): A YAML that `trl sft --config` takes.
        overrides (`list[str]`): Further options of `trl sft` and `accelerate launch`, as on their command line.
        settings ([`Settings`], *optional*): What [`read_settings`] gives for both, where that is known.

    Returns:
        `int`: 0, the exit code of `trl sft`, or 128 + N after signal N.

    Raises:
        `OSError`, `ValueError`: if something would go wrong; nothing has been started then.
    """
    _say("Checking the recipe, the model and the rows ...")
    settings = settings or read_settings(config, list(overrides))
    from .record import compare_record, write_record

    found = check_run(settings)
    output, steps, warnings = Path(settings["output_dir"]), found.steps, found.warnings
    with locked(output, settings.machine_rank):
        resume, finished = choose_checkpoint(settings, steps)
        if resume and (longer := compare_record(resume, found.record)):
            warnings.append(longer)
        if finished:
            _say(
                f"This run is finished: {output} holds what step {step_of(resume)} gave. To train on, raise "
                f"`num_train_epochs` or `max_steps`; to start over, name another `output_dir`.\n{_ask(output)}"
            )
            return 0
        check_output(settings, found.size, steps, len(list_checkpoints(output)))
        extra = [] if "report_to" in settings.given else ["--report_to", *(found.report_to or ["none"])]
        extra += [] if "logging_nan_inf_filter" in settings.given else ["--logging_nan_inf_filter", "false"]
        extra += ["--resume_from_checkpoint", str(resume)] if resume else []
        arguments = [*_without_false(settings, config), *extra]
        for warning in warnings:
            _say(f"Warning: {warning}")
        _say(plan(settings, found, resume))
        _say("$ " + shlex.join(["trl", "sft", *arguments]) + "\n")
        trl = Path(sys.executable).with_name("trl")
        command = [str(trl)] if trl.exists() else [sys.executable, "-c", "from trl.cli import main; main()"]
        if settings.machine_rank == 0:
            write_record(output, found.record)
        code = run_watched([*command, "sft", *arguments])
        return _after_success(settings) if code == 0 else _after_failure(settings, code, found.size)


@dataclass
class Checked:
    """
    What is known of a run before it starts.

    Args:
        model ([`LavinConfig`]): Configuration of the model.
        trained (`int`): Number of values that are trained.
        data (`dict`): What [`measure`](rows.py) gave for each split; what is trained on comes first.
        steps (`int`): Optimiser steps.
        size (`int`): Bytes of a checkpoint, about.
        record (`dict`): What shapes the training, see [`describe`](record.py).
        report_to, warnings (`list[str]`): Where the curves go; what to say.
    """

    model: object
    trained: int
    data: dict
    steps: int
    size: int
    record: dict
    report_to: list[str]
    warnings: list[str]


def check_run(settings: Settings) -> Checked:
    """
    Checks the settings, the model and every row of a run.

    Raises:
        `OSError`, `ValueError`: if something would go wrong.
    """
    from .record import describe
    from .rows import check_columns, check_rows, load_rows, measure

    warnings = check_options(settings)
    check_output_folder(settings["output_dir"])
    model, processor, trained = check_model(settings)
    report_to = choose_report_to(settings)
    check_push(settings, model, report_to)
    limit, given = settings["max_length"], "max_length" in settings.given
    data, record, steps = {}, None, 0
    for split, rows in load_rows(settings.values).items():
        columns, image = check_columns(split, rows, settings.values)
        data[split] = measure(split, rows, columns, image, processor, limit, settings["dataset_num_proc"])
        check_rows(split, data[split], limit, given, getattr(model.text_config, "max_position_embeddings", None))
        if record is None:  # what is trained on comes first
            steps = count_steps(settings, len(data[split]["problem"]))
            record = describe(settings, model, rows, columns, data[split], steps)
    warnings += rounding_warning(model, settings)
    base = base_bytes(model, settings, trained) if asked_patterns(settings) else 0
    size = checkpoint_bytes(trained, settings.deepspeed, settings["model_name_or_path"], base)
    return Checked(model, trained, data, steps, size, record, report_to, warnings)


def _without_false(settings: Settings, config: str | os.PathLike) -> list[str]:
    """The arguments without `--resume_from_checkpoint false`, which TRL would take for a folder of that name."""
    if str(settings["resume_from_checkpoint"]).lower() != "false":
        return settings.arguments
    if str(read_yaml(config).get("resume_from_checkpoint") or False).lower() != "false":
        raise ValueError(f"`--resume_from_checkpoint false`, but {config} names one: remove it there.")
    kept, items = [], iter(settings.arguments)
    for item in items:
        if not item.startswith("--resu"):
            kept.append(item)
        elif "=" not in item:
            next(items, None)
    return kept


def _say(text: str):
    print(text, flush=True)


def _ask(folder) -> str:
    return f'Ask it: lavin ask {shlex.quote(str(folder))} "What is this?" --image picture.png'


@contextlib.contextmanager
def locked(output: Path, machine_rank: int):
    """
    Keeps a second launcher out of a folder: it would take the checkpoint that is being written for a half-written one.

    Raises:
        `ValueError`: if there is one already.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a Unix
        fcntl = None
    if fcntl is None or machine_rank:
        yield
        return
    folder = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another `lavin train` is training into {output}: wait for it, or stop it.") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def choose_checkpoint(settings: Settings, steps: int) -> tuple[Path | None, bool]:
    """
    The checkpoint to go on from. Half-written ones that are newer are put aside, with a message; one that the user
    names goes before all.

    Returns:
        `tuple[Path or None, bool]`: the folder, and whether the run is finished.

    Raises:
        `ValueError`: if the checkpoint that is named is not whole, or none is and starting over would write over them.
    """
    output, asked = Path(settings["output_dir"]), settings["resume_from_checkpoint"]
    if "resume_from_checkpoint" in settings.given and str(asked).lower() == "false":
        if held := list_checkpoints(output):
            raise ValueError(
                f"`resume_from_checkpoint: false`, and {output} holds {held[0].name} of an earlier run: old and new "
                "checkpoints would mix. Name another `output_dir`, or move them away. (Without the setting, the run "
                "goes on from it.)"
            )
        return None, False
    whole, broken = last_whole(output, settings.processes)
    if asked and str(asked).lower() != "true":
        problem = checkpoint_problem(asked, settings.processes) if os.path.isdir(asked) else "there is no such folder"
        if problem:
            raise ValueError(
                f"The checkpoint {asked} is not whole: {problem}. "
                + (f"{whole} is; without `resume_from_checkpoint` it is used." if whole else f"None in {output} is.")
            )
        _check_layout(Path(asked), settings)
        return Path(asked), False
    listed = "\n".join(f"  {checkpoint}: {problem}" for checkpoint, problem in broken.items())
    if whole is None and any((checkpoint / STATE).is_file() for checkpoint in broken):
        raise ValueError(
            f"No checkpoint in {output} is whole, and starting over would write over them:\n{listed}\nName another "
            "`output_dir`, or move them away."
        )
    for checkpoint, problem in broken.items():
        if settings.machine_rank == 0:
            moved = put_aside(checkpoint)
            _say(f"{checkpoint} is only half written ({problem}). It is now {moved.name} and can be deleted.")
    if whole is None:
        if asked:
            raise ValueError(
                f"`resume_from_checkpoint: true`, and {output} holds no checkpoint: leave it out; `lavin train` finds "
                "checkpoints by itself."
            )
        return None, False
    if broken:
        _say(f"Going on from the one before it, {whole}.")
    _check_layout(whole, settings)
    state, kept = read_state(whole), whole
    if settings["load_best_model_at_end"] and state.get("best_model_checkpoint"):
        kept = whole.with_name(Path(state["best_model_checkpoint"]).name)
    return whole, state["global_step"] >= steps and same_weights(kept, output)


def _check_layout(checkpoint: Path, settings: Settings):
    ranks = zero_ranks(checkpoint)
    if settings.deepspeed and ranks != settings.processes:
        by = f"by DeepSpeed on {ranks} processes" if ranks else "without DeepSpeed"
        raise ValueError(f"{checkpoint} was written {by}; DeepSpeed on {settings.processes} cannot go on from it.")
    if not settings.deepspeed and ranks:
        raise ValueError(
            f"{checkpoint} was written by DeepSpeed on {ranks} processes: use the same accelerate config."
        )


def plan(settings: Settings, found: Checked, resume: Path | None) -> str:
    """What is going to happen, in a few lines."""
    name, model, trained, steps = settings["model_name_or_path"], found.model, found.trained, found.steps
    towers = f"{model.vision_config.model_type} and {model.text_config.model_type}"
    lines = [
        ("Model", f"{name} ({towers})"),
        ("Trained", f"{trained:,} values, {readable(trained * 4)}" if trained else "see `model_init_kwargs`"),
    ]
    if asked_patterns(settings):
        lines.append(("  of the base", by_part(trained_of_base(model, settings, hub_arguments(settings)))))
    for split, rows in found.data.items():
        length = rows["prompt"] + rows["completion"]
        with_images, limit = int((rows["images"] > 0).sum()), settings["max_length"]
        cut = "no max_length" if limit is None else f"none beyond max_length ({limit:,})"
        lines += [
            (f"{split} rows".capitalize(), f"{len(length):,}, {with_images:,} with images"),
            ("  tokens", f"median {np.median(length):,.0f}, longest {length.max():,} (row {length.argmax()}); {cut}"),
        ]
    batch, accumulated = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    total = settings.processes * batch * accumulated
    noun = "process" if settings.processes == 1 else "processes"
    lines.append(("Batch", f"{settings.processes} {noun} x {batch} rows x {accumulated} accumulated = {total} rows"))
    epochs = steps * total / len(next(iter(found.data.values()))["problem"])
    lines += [
        ("Steps", f"{steps:,}, {epochs:.3g} epochs"),
        ("Reports to", ", ".join(found.report_to) or "nothing but the terminal and trainer_state.json"),
        ("Output", settings["output_dir"]),
        ("Starts", f"at step {step_of(resume)}, from {resume}" if resume else "at the beginning"),
    ]
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def _after_success(settings: Settings) -> int:
    output = Path(settings["output_dir"])
    if settings.machine_rank or not (output / "config.json").is_file():  # `save_on_each_node: false`
        return 0
    name = settings["hub_model_id"] if settings["push_to_hub"] else None
    push = name if name and "/" in name else None
    try:
        card_folder(output, push=push)
        said = f"TRL's card is replaced by LaVIN's{f' (on the Hub too: {push})' if push else ''}."
    except (OSError, ValueError) as error:
        said = f"TRL's card stays: {error}"
    if settings["push_to_hub"] and push is None:
        said += f" On the Hub it is still TRL's: `lavin card {output} --push USER/{name or output.name}`."
    what = (
        f"The adapter is in {output / ADAPTER_NAME}"
        if (output / ADAPTER_NAME).is_dir()
        else f"The model is in {output}"
    )
    _say(f"\n{what}. {said}\n{_ask(output)}")
    last, _ = last_whole(output, settings.processes)
    if last and (best := read_state(last).get("best_model_checkpoint")):
        _say(f"The best checkpoint by {settings['metric_for_best_model'] or 'loss'}: {best}")
    return 0


def _after_failure(settings: Settings, code: int, size: int) -> int:
    output = Path(settings["output_dir"])
    said = [f"`trl sft` ended with exit code {code}; its own message is above."]
    if code == 137:
        said = ["`trl sft` was killed (signal 9), by the system if memory has run out."]
    elif code - 128 in (1, 2, 15):
        said = ["Stopped."]
    free = shutil.disk_usage(output).free if output.is_dir() else 0
    if free < size:
        said.append(f"The disk is full: {readable(free)} free at {output}, a checkpoint needs {readable(size)}.")
    elif not os.access(output, os.W_OK):
        said.append(f"{output} can no longer be written: is it mounted read-only?")
    again = "the same command" if code > 128 or free < size else "once the cause is gone, the same command"
    whole, broken = last_whole(output, settings.processes)
    if whole:
        said.append(f"The last whole checkpoint is {whole}; {again} goes on from it.")
    else:
        said.append(f"There is no whole checkpoint yet; {again} starts at the beginning.")
    said += [f"({checkpoint.name} is half written: {problem}.)" for checkpoint, problem in broken.items()]
    print("\nlavin train: " + "\n  ".join(said), file=sys.stderr, flush=True)
    return code
