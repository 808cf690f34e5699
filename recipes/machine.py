"""What a measurement runs on, and processes that end with the one that started them."""

import os
import platform
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
import transformers


@contextmanager
def one_thread_count(threads: int):
    """Runs torch with so many threads, and gives the caller's number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_model() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict:
    """What the numbers were measured on."""
    return {
        "cpu": cpu_model(),
        "cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if torch.get_num_threads() == 1 else "wall time",
        "platform": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def resident(peak: bool = False) -> float:
    """Resident memory of this process in MB (10^6 bytes): now, or the largest since `forget_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def forget_peak():
    """Lets the kernel start anew with the largest resident memory of this process."""
    Path("/proc/self/clear_refs").write_text("5")


def end_with_parent():
    """Ends this process and what it started when the process that started it has ended, however it did."""

    def wait():
        os.read(0, 1)  # nothing is ever written: this returns when the other end closes
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
