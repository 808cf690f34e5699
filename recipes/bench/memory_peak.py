"""
Peak memory of a training step, forward and backward, of LaVIN with MMA beside PEFT LoRA r=8 on q and v and the frozen
base: the rivals of `step_time`, and LoRA with logits at labelled positions only, as `mma_labelled` has them.

Each runs one step in a fresh process, after a small one that loads all code. What counts is the largest resident
memory of the process during the step, above that before it (Linux only: it reads /proc). Large blocks go back to the
system as soon as they are freed (`MALLOC_MMAP_THRESHOLD_`), so that what is left over of earlier steps does not count.
"""

import json
import os
import subprocess
import sys

import torch

from ..machine import forget_peak, machine, resident
from .models import Size, describe, lavin_config, make_batch
from .step_time import add_fused_lm_head, make_rivals
from .timing import interleave, summary


NAME = "memory_peak"
ROUNDS = 3
RIVALS = ("base", "lora", "lora_labelled", "mma", "mma_labelled")
TRL_RIVALS = ("lora_trl", "mma_trl") if add_fused_lm_head is not None else ()
GOALS = [
    ("mma_trl", "lora_trl", "at most 1.00"),
    ("mma", "lora", None),
    ("mma_labelled", "lora_labelled", None),
    ("mma_labelled", "lora", None),
    ("mma", "base", None),
]
# Small rows for the first step, at the models' own sizes.
FEW = {"batch_size": 2, "prompt_tokens": 4, "answer_tokens": 4}


def measure(rival: str, size: Size, number: int, seed: int = 0, lora_dropout: float = 0.0) -> float:
    """Runs one step here and returns its memory in MB; only in a fresh process does it mean something."""
    config = lavin_config(size)
    batches = [make_batch(one, config, number) for one in (Size(**{**vars(size), **FEW}), size)]
    step = make_rivals(size, seed, lora_dropout, batches)[rival]
    step(0)
    before = resident()
    forget_peak()
    step(1)
    return resident(peak=True) - before


def run(size: Size, rounds: int, seed: int = 0, lora_dropout: float = 0.0) -> dict:
    """
    Measures it.

    Returns:
        `dict`: `results` with megabytes and ratios, and what they were measured with.

    Raises:
        `OSError`: on a system other than Linux.
    """
    if sys.platform != "linux":
        raise OSError("Peak memory is read from /proc, which only Linux has.")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}

    def in_process(rival):
        def once(number):
            given = {"rival": rival, "number": number, "seed": seed, "lora_dropout": lora_dropout}
            given |= {"size": vars(size), "threads": torch.get_num_threads()}
            command = [sys.executable, "-m", __spec__.name, json.dumps(given)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"The step of {rival} failed:\n{done.stderr}")
            return float(done.stdout.split()[-1])

        return once

    megabytes = interleave({rival: in_process(rival) for rival in RIVALS + TRL_RIVALS}, rounds, warmup=0)
    return {
        "title": "Peak memory of a training step, above the level before it",
        "name": NAME,
        "machine": machine(),
        "rounds": rounds,
        "size": vars(size),
        "lora_dropout": lora_dropout,
        "notes": [
            f"{describe(size)}, patch {size.patch_size}; float32",
            f"{size.batch_size} rows, half of them with an image, prompt about {size.prompt_tokens} and answer about "
            f"{size.answer_tokens} tokens; resident memory of a fresh process, in 10^6 bytes",
        ],
        "results": {"training step": summary(megabytes, GOALS, unit="megabytes")},
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given.pop("threads"))
    print(measure(**{**given, "size": Size(**given["size"])}))
