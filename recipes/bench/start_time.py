"""
Time until one can begin: `import lavin` beside importing transformers and PEFT, each in a fresh process; and loading a
base with its adapter beside loading the base, in one process, from files that the system has read before.

`lavin_base` is a light folder, which names its two checkpoints; `lavin` is the same with an adapter. `towers` loads
the two checkpoints by transformers' own classes, without LaVIN.
"""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import CLIPVisionModel, LlamaForCausalLM
from transformers.utils import logging

from lavin import LavinForConditionalGeneration, MMAConfig

from ..machine import machine
from .models import Size, describe, frozen_lavin, language_model
from .timing import clock, interleave, quartiles, summary


NAME = "start_time"
ROUNDS = 9
IMPORTS = {"transformers_peft": "import transformers, peft", "lavin": "import lavin"}
IMPORT_GOAL = "at most 0.20"
GOALS = [("lavin", "lavin_base", "at most 1.05"), ("lavin", "towers", None), ("lavin_base", "towers", None)]


def time_import(statement: str) -> float:
    """Processor seconds of an import in a fresh process."""
    code = f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
    # Away from the working directory, whose files could be imported instead.
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
    return float(done.stdout.split()[-1])


def write_folders(root: Path, size: Size, seed: int = 0):
    """Writes `vision` and `text`, the towers; `lavin_base`, a light folder of them; `lavin`, with an adapter."""
    frozen = frozen_lavin(size, seed)
    tower = CLIPVisionModel(frozen.config.vision_config)
    tower.load_state_dict(frozen.model.vision_tower.state_dict())
    tower.save_pretrained(root / "vision")
    language_model(frozen).save_pretrained(root / "text")
    pair = str(root / "vision"), str(root / "text")
    model = LavinForConditionalGeneration.from_vision_text_pretrained(*pair)
    model.save_pretrained(root / "lavin_base", full=False)
    adapted = get_peft_model(model, MMAConfig(), adapter_name="mma")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "adapter_up" in name:
                parameter.normal_(std=0.02)
    adapted.get_base_model().save_pretrained(root / "lavin", full=False)


def make_rivals(root: Path) -> dict:
    """One function per rival, which loads and returns its model, or models, in a list."""

    def lavin(folder):
        return [LavinForConditionalGeneration.from_pretrained(root / folder)]

    return {
        "towers": lambda: [
            CLIPVisionModel.from_pretrained(root / "vision"),
            LlamaForCausalLM.from_pretrained(root / "text"),
        ],
        "lavin_base": lambda: lavin("lavin_base"),
        "lavin": lambda: lavin("lavin"),
    }


def run(size: Size, rounds: int, seed: int = 0, **kwargs) -> dict:
    """
    Measures it.

    Returns:
        `dict`: `results` with seconds, ratios and the difference of the imports, and what they were measured with.
    """

    def importer(statement):
        return lambda number: time_import(statement)

    imports = interleave({name: importer(statement) for name, statement in IMPORTS.items()}, rounds)
    more = [a - b for a, b in zip(imports["lavin"], imports["transformers_peft"], strict=True)]
    importing = summary(imports, [("lavin", "transformers_peft", None)])
    importing["differences"] = {"lavin-transformers_peft": {**quartiles(more), "goal": IMPORT_GOAL}}

    def loader(load):
        def once(number):
            gc.collect()  # what the rival before has left
            start = clock()
            load()
            return clock() - start

        return once

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_folders(Path(folder), size, seed)
            loads = interleave({name: loader(load) for name, load in make_rivals(Path(folder)).items()}, rounds)
    finally:
        if bar:
            logging.enable_progress_bar()
    return {
        "title": "Start",
        "name": NAME,
        "machine": machine(),
        "rounds": rounds,
        "size": vars(size),
        "notes": [f"{describe(size)}; float32", "imports are always in processor time"],
        "results": {"import": importing, "load": summary(loads, GOALS)},
    }
