"""Whether `trl sft` finds a LaVIN folder: with TRL's own functions, in a process that has not imported `lavin`."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from .report import FAIL, SKIP, Finding


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


def start_trl(folder: Path) -> subprocess.Popen | None:
    """Starts it early, because it imports everything once more; `None` where there is no TRL."""
    if find_spec("trl") is None:
        return None
    arguments = ["--model_name_or_path", folder.name, "--trust_remote_code", "true", "--dataset_name", "rows"]
    arguments += ["--model_init_kwargs", '{"mma": {}}', "--bf16", "false", "--report_to", "none"]
    arguments += ["--output_dir", "out"] + ([] if torch.accelerator.is_available() else ["--use_cpu", "true"])
    # The code it copies goes with the folder. Nothing of it needs the Hub.
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=folder.parent, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def check_trl(process: subprocess.Popen | None) -> str:
    if find_spec("trl") is None:
        raise Finding(SKIP, 'TRL is not installed (`pip install -c constraints.txt -e ".[train]"` brings it)')
    command = Path(sys.executable).with_name("trl")
    if not command.exists():
        do = f"`{sys.executable} -m pip install --force-reinstall --no-deps trl` writes it."
        raise Finding(FAIL, f"TRL is installed, and its command is not there ({command})", do)
    output, _ = process.communicate(timeout=PATIENCE)
    if process.returncode or "FOUND" not in output:
        last = [line for line in output.splitlines() if line.strip()][-1:] or ["no output"]
        raise RuntimeError(f"exit code {process.returncode}: {last[0]}")
    found = output.rpartition("FOUND ")[2].split()[0]
    return f"finds the folder and its code in a fresh process: {found}"
