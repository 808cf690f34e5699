"""Whether `trl sft` finds a LaVIN folder: with TRL's own functions, in a process that has not imported `lavin`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from lavin.recipes.doctor.report import FAIL, OK, SKIP, Line
from lavin.recipes.doctor.tiny import no_tiny


PATIENCE = 120  # seconds, for a machine that is busy; it takes about 6
# What `trl sft` does before it trains, by the functions it does it with.
SCRIPT = """
import sys
from trl.scripts.sft import make_parser
_, training, model, _ = make_parser(prog="trl sft").parse_args_and_config(sys.argv[1:])
from transformers import AutoProcessor
from trl.trainer.utils import create_model_from_path
found = create_model_from_path(model.model_name_or_path, trust_remote_code=True, **training.model_init_kwargs)
AutoProcessor.from_pretrained(model.model_name_or_path, trust_remote_code=True)
assert "lavin" not in sys.modules and found.__module__.startswith("transformers_modules."), found.__module__
assert any(parameter.requires_grad for parameter in found.parameters()), "nothing would be trained"
print("FOUND", type(found).__name__)
"""


class TrlLook:
    """A process that is started early, because it imports everything once more."""

    process: subprocess.Popen | None = None

    def start(self, folder: Path):
        if find_spec("trl") is None:
            return
        arguments = ["--model_name_or_path", folder.name, "--trust_remote_code", "true", "--dataset_name", "rows"]
        arguments += ["--model_init_kwargs", '{"mma": {}}', "--bf16", "false", "--report_to", "none"]
        arguments += ["--output_dir", "out"] + ([] if torch.accelerator.is_available() else ["--use_cpu", "true"])
        # The code it copies goes with the folder. Nothing of it needs the Hub.
        environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments], cwd=folder.parent, env=environment, text=True, **pipes
        )

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


def check_trl(trl: TrlLook) -> Iterator[Line]:
    if find_spec("trl") is None:
        yield Line(SKIP, "trl sft", 'TRL is not installed (`pip install -c constraints.txt -e ".[train]"` brings it)')
        return
    command = Path(sys.executable).with_name("trl")
    if not command.exists():
        do = f"`{sys.executable} -m pip install --force-reinstall --no-deps trl` writes it."
        yield Line(FAIL, "trl sft", f"TRL is installed, and its command is not there ({command})", do)
        return
    if trl.process is None:
        yield no_tiny("trl sft")
        return
    try:
        output, _ = trl.process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"no answer within {PATIENCE} s") from error
    if trl.process.returncode or "FOUND" not in output:
        last = [line for line in output.splitlines() if line.strip()][-1:] or ["no output"]
        raise RuntimeError(f"exit code {trl.process.returncode}: {last[0]}")
    found = output.rpartition("FOUND ")[2].split()[0]
    yield Line(OK, "trl sft", f"finds the folder and its code in a fresh process: {found}")
