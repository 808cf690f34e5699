"""The checks of a machine: what is installed, a tiny LaVIN, the accelerator, the cache, the Hub and `trl sft`."""

import contextlib
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import BitsAndBytesConfig
from transformers.utils.hub import HF_MODULES_CACHE

from ..report import readable
from .hub import HubLook, check_hub
from .report import FAIL, OK, SKIP, WARN, Finding, Line, said
from .tiny import Tiny, backpropagate
from .trl_sft import check_trl, start_trl
from .versions import check_versions


MODEL_SPACE, LEAST_SPACE = 20 * 2**30, 2**30  # LLaMA-7B with CLIP ViT-L/14 is 15 GB; an adapter's checkpoint 45 MB
REPORT = "Install the versions that a FAIL above names. Where none does, report this with `pip freeze`'s output."
FLASH_AGAIN = (
    "Build it for this PyTorch: `pip install --force-reinstall --no-deps --no-build-isolation flash-attn`; or "
    "`pip uninstall flash-attn`: PyTorch's own attention does the same."
)


@contextlib.contextmanager
def machine_checks() -> Iterator[list[tuple[str, Callable, str]]]:
    """All checks of this machine, in the order of their lines. The Hub and TRL are asked while others run."""
    tiny, looks = Tiny(), {"hub": None, "trl": None}
    pip = "`pip install -c constraints.txt"
    with tempfile.TemporaryDirectory(prefix="lavin-doctor-") as place:

        def build() -> str:
            looks["hub"] = None if constants.HF_HUB_OFFLINE else HubLook()
            found = tiny.build(Path(place))
            looks["trl"] = start_trl(tiny.folder)
            return found

        def trl() -> str:
            tiny.folder  # noqa: B018  (skipped where there is none)
            return check_trl(looks["trl"])

        try:
            yield [
                ("versions", check_versions, f"Install LaVIN with pip ({pip} -e .`): the ranges are read from there."),
                ("tiny model", build, REPORT),
                ("forward", tiny.forward, REPORT),
                ("backward", tiny.backward, REPORT),
                ("generate", tiny.generate, REPORT),
                ("save and load", tiny.save_and_load, REPORT),
                ("GPU", check_gpu, "Does `nvidia-smi` run, and does its driver fit this build of PyTorch?"),
                ("bf16", lambda: check_bf16(tiny), "Train with `--bf16 false --dtype float32`, and report it."),
                ("flash attention", lambda: check_flash(tiny), FLASH_AGAIN),
                ("4-bit", lambda: check_4bit(tiny), f"{pip} -U bitsandbytes`, or train without `load_in_4bit`."),
                ("DeepSpeed", check_deepspeed, f"{pip} -U deepspeed`, or uninstall it: only ZeRO needs it."),
                ("cache", check_cache, "Name a folder that can be written: `export HF_HOME=DIR`."),
                ("disk", check_disk, "Work in a folder that can be written."),
                ("Hub", lambda: check_hub(looks["hub"]), "Set HF_HUB_OFFLINE=1 to work with what is in the cache."),
                ("trl sft", trl, f"{pip} --force-reinstall trl`, without other changes."),
            ]
        finally:
            if looks["trl"] is not None:
                looks["trl"].kill()
                looks["trl"].communicate()


def check_gpu() -> str | list[Line]:
    device = accelerator()
    if device is None:
        unused = _nvidia_gpu() if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") else None
        if unused:
            found = f"{unused} is there, and PyTorch {torch.__version__} cannot use it"
            raise Finding(FAIL, found, "Install a CUDA build of PyTorch for its driver (pytorch.org).")
        raise Finding(SKIP, "none that PyTorch can use: the CPU does it all (a 7B wants a GPU)")
    a = torch.randn(64, 64)
    if not torch.allclose((a.to(device) @ a.to(device)).cpu(), a @ a, atol=0.1):
        raise ValueError("a product of two matrices differs from the CPU's")
    if device.type != "cuda":
        return device.type
    lines = []
    for index in range(torch.cuda.device_count()):
        free, total = map(readable, torch.cuda.mem_get_info(index))
        lines.append(Line(OK, "GPU", f"{index}: {torch.cuda.get_device_name(index)}, {free} of {total} free"))
    return lines


def accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _nvidia_gpu() -> str | None:
    """What `nvidia-smi` sees first, if there is one."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].partition(" (UUID")[0]
    return None


@torch.no_grad()
def check_bf16(tiny: Tiny) -> str:
    device = accelerator()
    if device is not None and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        older = "Add `--bf16 false --fp16 true --dtype float16` to `trl sft`."
        raise Finding(WARN, "this GPU is older than Ampere and has none", older)
    model, inputs = tiny.reload(device or "cpu", dtype=torch.bfloat16)
    loss = tiny.compare_loss(model(**inputs).loss.item(), 0.05)
    return f"on the {device.type if device else 'CPU'}: {loss}"


@torch.no_grad()
def check_flash(tiny: Tiny) -> str:
    if find_spec("flash_attn") is None:
        raise Finding(SKIP, "flash-attn is not installed; PyTorch's own attention (sdpa) is used")
    importlib.import_module("flash_attn")  # its library must have been built for this PyTorch
    device = accelerator()
    if device is None or device.type != "cuda":
        raise Finding(SKIP, "installed, but there is no GPU to use it on; sdpa is used")
    model, inputs = tiny.reload(device, dtype=torch.bfloat16, attn_implementation="flash_attention_2")
    return tiny.compare_loss(model(**inputs).loss.item(), 0.05)


def _absent(package: str) -> Finding:
    return Finding(SKIP, f'{package} is not installed (`pip install -c constraints.txt -e ".[gpu]"` brings it)')


def check_4bit(tiny: Tiny) -> str:
    if find_spec("bitsandbytes") is None:
        raise _absent("bitsandbytes")
    import bitsandbytes

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model, inputs = tiny.reload(accelerator() or "cpu", mma={}, dtype=torch.float32, quantization_config=config)
    if not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()):
        raise ValueError("no layer was quantised")
    # As it is trained: bitsandbytes' inference on CPUs takes no layer of a width that is no multiple of 64.
    loss = tiny.compare_loss(backpropagate(model.train(), inputs), 0.5)
    return f"on the {model.device.type}: {loss}; gradients reach the adapter"


def check_deepspeed() -> str:
    if find_spec("deepspeed") is None:
        raise _absent("DeepSpeed, which only ZeRO needs,")
    version = importlib.import_module("deepspeed").__version__
    missing = [] if find_spec("ninja") or shutil.which("ninja") else ["ninja"]
    if shutil.which((os.environ.get("CXX") or "g++").split()[0]) is None and shutil.which("c++") is None:
        missing.append("a C++ compiler")
    if missing:
        found = f"{version}, without {' and '.join(missing)}: no offloading, no training on CPUs"
        raise Finding(WARN, found, "`pip install ninja`; a compiler comes with the system (g++).")
    return f"{version}, with ninja and a compiler"


def check_cache() -> str:
    """The Hub's cache, and the one where transformers puts a folder's code."""
    places = {"HF_HOME": constants.HF_HOME, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    for variable, folder in {**places, "HF_MODULES_CACHE": HF_MODULES_CACHE}.items():
        if error := _not_writable(folder):
            do = f"Check its permissions, or name another folder: `export {variable}=DIR`."
            raise Finding(FAIL, f"{folder} cannot be written ({error})", do)
    return _space(constants.HF_HUB_CACHE, MODEL_SPACE, "Free some, or `export HF_HOME=DIR` on a larger disk.")


def check_disk() -> str:
    """The folder the command runs in, where outputs usually go."""
    if error := _not_writable("."):
        raise Finding(WARN, f"{Path.cwd()} cannot be written ({error})", "Give outputs another folder.")
    return _space(".", LEAST_SPACE, "Free some, or write to another disk; `save_total_limit: 2` keeps fewer.")


def _space(folder: str, wanted: int, do: str) -> str:
    free = shutil.disk_usage(_existing(folder)).free
    found = f"{Path(folder).absolute()}: can be written, {readable(free)} free"
    if free < LEAST_SPACE:
        raise Finding(FAIL, found, do)
    if free < wanted:
        raise Finding(WARN, f"{found}; LLaMA-7B with its tower takes 15 GB", do)
    return found


def _existing(folder: str | os.PathLike) -> Path:
    path = Path(folder).absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _not_writable(folder: str | os.PathLike) -> str | None:
    """Why a file cannot be written into a folder, or into the one where it would be made."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b"x")
    except OSError as error:
        return error.strerror or said(error)
    return None
