"""What a recipe and a command line say to `trl sft`, read by TRL's and accelerate's own parsers."""

import difflib
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import yaml

from lavin.files_lavin import read_text


NOT_TRL = {"env", "accelerate_config"}  # keys that `trl sft` takes from a YAML besides its options
NO_GPU = (
    "This machine has no GPU that PyTorch can use with bfloat16, and the recipe asks for one. To train on the CPU add "
    "`--use_cpu true --bf16 false --dtype float32`. On a GPU older than Ampere add `--bf16 false --fp16 true --dtype "
    "float16`. Where there is a newer one: does `nvidia-smi` show it, and is this a CUDA build of PyTorch?"
)


@dataclass
class Settings:
    """
    Args:
        arguments (`list[str]`): What `trl sft` is called with.
        values (`dict`): Every option of TRL with the value it will have.
        given (`set[str]`): The options that the YAML or the command line names.
        processes (`int`): Number of training processes on all machines.
        machine_rank (`int`): Which of the machines this is.
        deepspeed (`bool`): Whether DeepSpeed trains.
        zero_stage (`int`, *optional*): Its ZeRO stage.
    """

    arguments: list[str]
    values: dict
    given: set[str]
    processes: int = 1
    machine_rank: int = 0
    deepspeed: bool = False
    zero_stage: int | None = None

    def __getitem__(self, name: str):
        return self.values.get(name)  # older versions do not have all of them


def read_settings(config: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """
    Reads a recipe as `trl sft --config` will.

    Args:
        config (`str` or `os.PathLike`): The YAML.
        overrides (`list[str]`): Further options of `trl sft` and `accelerate launch`.

    Raises:
        `ValueError`: if the YAML cannot be read, a key is unknown, a value is of the wrong kind, or the machine cannot
        do what is asked.
    """
    return read_several([config], overrides)[0]


def read_several(configs: list, overrides: list[str] | tuple[str, ...] = ()) -> list[Settings]:
    """
    [`read_settings`] of several recipes. TRL's parser touches the GPU, so it runs in a process of its own: none of the
    GPU's memory stays taken by the launcher.
    """
    recipes = [read_yaml(config) for config in configs]
    for recipe in recipes:
        if isinstance(recipe.get("env"), dict):
            os.environ.update({key: str(value) for key, value in recipe["env"].items()})  # as TRL does
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        futures = [
            worker.submit(_parse_quietly, ["--config", os.fspath(config), *overrides], list(recipe))
            for config, recipe in zip(configs, recipes, strict=True)
        ]
        import lavin.recipes.train.rows  # noqa: F401  (takes as long, and is needed next)

        return [future.result() for future in futures]


def count_steps(settings: Settings, rows: int) -> int:
    """Optimiser steps of a run on so many rows, as Trainer counts them."""
    if settings["max_steps"] > 0:
        return settings["max_steps"]
    batch = settings["per_device_train_batch_size"] * settings.processes
    batches = rows // batch if settings["dataloader_drop_last"] else math.ceil(rows / batch)
    updates = max(math.ceil(batches / settings["gradient_accumulation_steps"]), 1)
    return math.ceil(settings["num_train_epochs"] * updates)


def read_yaml(config: str | os.PathLike) -> dict:
    """
    Raises:
        `OSError`, `ValueError`: if there is no such file, or it is no mapping in YAML.
    """
    try:
        recipe = yaml.safe_load(read_text(config))
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{config} must hold `key: value` lines, as `trl sft --config` takes them.")
    return recipe


def _parse_quietly(arguments: list[str], keys: list[str]) -> Settings:
    import logging
    import warnings

    warnings.simplefilter("ignore")  # `trl sft` itself will say these things again
    logging.disable(logging.WARNING)
    return parse(arguments, keys)


def parse(arguments: list[str], keys: list[str]) -> Settings:
    """What [`read_settings`] runs in a process of its own. `keys` are the YAML's."""
    from dataclasses import asdict

    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.scripts.sft import make_parser

    parser = make_parser(prog="trl sft")
    parser.error = _refuse
    launcher, launch_options = _launch_parser()
    known = {action.dest for action in parser._actions} - {"help"}
    if unknown := [key for key in keys if key not in known | launch_options | NOT_TRL]:
        raise ValueError(f"{arguments[1]}: {_nearest(unknown, known | launch_options | NOT_TRL)}")
    try:
        *groups, from_yaml, from_command = parser.parse_args_and_config(
            list(arguments), return_remaining_strings=True, separate_remaining_strings=True
        )
    except ValueError as error:
        raise ValueError(NO_GPU if "bf16/gpu" in str(error) else str(error)) from error
    options = [item[2:].partition("=")[0].replace("-", "_") for item in from_command if item.startswith("--")]
    if unknown := [name for name in options if name not in launch_options | NOT_TRL]:
        raise ValueError(f"The command line: {_nearest(unknown, known | launch_options, '--')}")
    values = {}
    for group in groups:
        values.update(group.to_dict() if hasattr(group, "to_dict") else asdict(group))
    settings = Settings(arguments, values, set(keys) | _named(arguments[2:]))
    _read_launch(launcher, resolve_accelerate_config_argument(from_yaml + from_command), settings)
    return settings


def _refuse(message: str):
    raise ValueError(message[0].upper() + message[1:])


def _nearest(unknown: list[str], known: set[str], dashes: str = "") -> str:
    said = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, 1)
        said.append(f"`{dashes}{name}`" + (f" (did you mean `{dashes}{near[0]}`?)" if near else ""))
    return f"neither `trl sft` nor `accelerate launch` knows {', '.join(said)}."


def _named(overrides: list[str]) -> set[str]:
    """The options of TRL that a command line names, abbreviated ones too."""
    import argparse

    from trl.scripts.sft import make_parser

    parser = make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    return set(vars(parser.parse_known_args(overrides)[0]))


def _launch_parser():
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = _refuse
    return parser, {action.dest for action in parser._actions if action.option_strings} - {"help"}


def _read_launch(parser, arguments: list[str], settings: Settings):
    """How many processes accelerate will start, which is not always what was asked for."""
    from accelerate.commands.launch import _validate_launch_command

    options = parser.parse_args([*arguments, "sft.py"])
    if options.training_script != "sft.py":  # a switch was given a value, or a stray word follows the options
        raise ValueError(
            f"accelerate would take {options.training_script!r} for the script to run. In a YAML, switches such as "
            "`multi_gpu: true` do not work: name a file with `accelerate_config`. On the command line, each value "
            "needs its `--option` before it."
        )
    options, *_ = _validate_launch_command(options)
    several = options.use_deepspeed or options.use_fsdp or options.use_megatron_lm or options.multi_gpu or options.tpu
    asked = options.num_processes or 1
    if asked > 1 and (options.cpu or not several):
        raise ValueError(
            f"{asked} processes are asked for, and accelerate would start one and say nothing. Its config needs "
            "`distributed_type: MULTI_GPU`, on CPUs with `use_cpu: true` beside it."
        )
    settings.processes = max(asked, 1)
    settings.machine_rank = options.machine_rank or 0
    settings.deepspeed = bool(options.use_deepspeed)
    if settings.deepspeed and options.deepspeed_config_file:
        own = json.loads(read_text(options.deepspeed_config_file))
        settings.zero_stage = own.get("zero_optimization", {}).get("stage", 0)
    elif settings.deepspeed:
        settings.zero_stage = 2 if options.zero_stage is None else int(options.zero_stage)  # accelerate's default
