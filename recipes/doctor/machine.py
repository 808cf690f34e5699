"""The checks of a machine: what is installed, a tiny LaVIN, the accelerator, the cache, the Hub and `trl sft`."""

import contextlib
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import BitsAndBytesConfig
from transformers.utils.hub import HF_MODULES_CACHE

from lavin.recipes.doctor import tiny as tiny_lavin
from lavin.recipes.doctor.hub import HubLook, check_hub
from lavin.recipes.doctor.report import FAIL, OK, SKIP, WARN, Check, Line, said
from lavin.recipes.doctor.tiny import Tiny, backpropagate, compare_loss, no_tiny, reload
from lavin.recipes.doctor.trl_sft import TrlLook, check_trl
from lavin.recipes.doctor.versions import check_versions
from lavin.recipes.train.checks import readable


MODEL_SPACE, LEAST_SPACE = 20 * 2**30, 2**30  # LLaMA-7B with CLIP ViT-L/14 is 15 GB; an adapter's checkpoint 45 MB


def machine_checks(stack: contextlib.ExitStack) -> list[Check]:
    """All checks of this machine, in the order of their lines. The Hub and TRL are asked while others run."""
    tiny, trl, hub = Tiny(), TrlLook(), HubLook()
    stack.callback(trl.stop)
    report = "Install the versions that a FAIL above names. Where none does, report this with `pip freeze`'s output."

    def build_tiny() -> Iterator[Line]:
        hub.start()
        yield from tiny_lavin.build(tiny, stack)
        trl.start(tiny.folder)

    steps = {
        "tiny model": build_tiny,
        "forward": partial(tiny_lavin.forward, tiny),
        "backward": partial(tiny_lavin.backward, tiny),
        "generate": partial(tiny_lavin.generate, tiny),
        "save and load": partial(tiny_lavin.save_and_load, tiny),
    }
    return [
        Check(
            "versions",
            check_versions,
            "Install LaVIN with pip (`pip install -c constraints.txt -e .`): the ranges are read from there.",
        ),
        *(Check(name, step, report) for name, step in steps.items()),
        Check("GPU", check_gpu, "Does `nvidia-smi` run, and does its driver fit this build of PyTorch?"),
        Check("bf16", partial(check_bf16, tiny), "Train with `--bf16 false --dtype float32`, and report it."),
        Check("flash attention", partial(check_flash, tiny), FLASH_AGAIN),
        Check(
            "4-bit",
            partial(check_4bit, tiny),
            "`pip install -c constraints.txt -U bitsandbytes`, or train without `load_in_4bit`.",
        ),
        Check(
            "DeepSpeed",
            check_deepspeed,
            "`pip install -c constraints.txt -U deepspeed`, or uninstall it: only ZeRO needs it.",
        ),
        Check("cache", check_cache, "Name a folder that can be written: `export HF_HOME=DIR`."),
        Check("disk", check_disk, "Work in a folder that can be written."),
        Check("Hub", partial(check_hub, hub), "Set HF_HUB_OFFLINE=1 to work with what is in the cache."),
        Check(
            "trl sft",
            partial(check_trl, trl),
            "`pip install -c constraints.txt --force-reinstall trl`, without other changes.",
        ),
    ]


def check_gpu() -> Iterator[Line]:
    device = accelerator()
    if device is None:
        unused = _nvidia_gpu() if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") else None
        if unused:
            found = f"{unused} is there, and PyTorch {torch.__version__} cannot use it"
            yield Line(FAIL, "GPU", found, "Install a CUDA build of PyTorch for its driver (pytorch.org).")
        else:
            yield Line(SKIP, "GPU", "none that PyTorch can use: the CPU does it all (a 7B wants a GPU)")
        return
    a = torch.randn(64, 64)
    if not torch.allclose((a.to(device) @ a.to(device)).cpu(), a @ a, atol=0.1):
        raise ValueError("a product of two matrices differs from the CPU's")
    if device.type != "cuda":
        yield Line(OK, "GPU", device.type)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Line(OK, "GPU", f"{index}: {name}, {readable(free)} of {readable(total)} free")


def accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _nvidia_gpu() -> str | None:
    """What `nvidia-smi` sees first, if there is one."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].partition(" (UUID")[0]
    return None


def check_bf16(tiny: Tiny) -> Iterator[Line]:
    device = accelerator()
    if device is not None and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        older = "Add `--bf16 false --fp16 true --dtype float16` to `trl sft`."
        yield Line(WARN, "bf16", "this GPU is older than Ampere and has none", older)
        return
    if tiny.saved is None or tiny.loss is None:
        yield no_tiny("bf16")
        return
    model, inputs = reload(tiny, device or "cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        loss = model(**inputs).loss.item()
    yield Line(OK, "bf16", f"on the {device.type if device else 'CPU'}: {compare_loss(tiny, loss, 0.05)}")


FLASH_AGAIN = (
    "Build it for this PyTorch: `pip install --force-reinstall --no-deps --no-build-isolation flash-attn`; or "
    "`pip uninstall flash-attn`: PyTorch's own attention does the same."
)


def check_flash(tiny: Tiny) -> Iterator[Line]:
    if find_spec("flash_attn") is None:
        yield Line(SKIP, "flash attention", "flash-attn is not installed; PyTorch's own attention (sdpa) is used")
        return
    importlib.import_module("flash_attn")  # its library must have been built for this PyTorch
    device = accelerator()
    if device is None or device.type != "cuda":
        yield Line(SKIP, "flash attention", "installed, but there is no GPU to use it on; sdpa is used")
        return
    if tiny.saved is None or tiny.loss is None:
        yield no_tiny("flash attention")
        return
    chosen = {"dtype": torch.bfloat16, "attn_implementation": "flash_attention_2"}
    model, inputs = reload(tiny, device, **chosen)
    with torch.no_grad():
        loss = model(**inputs).loss.item()
    yield Line(OK, "flash attention", compare_loss(tiny, loss, 0.05))


def check_4bit(tiny: Tiny) -> Iterator[Line]:
    if find_spec("bitsandbytes") is None:
        yield Line(
            SKIP, "4-bit", 'bitsandbytes is not installed (`pip install -c constraints.txt -e ".[gpu]"` brings it)'
        )
        return
    import bitsandbytes

    if tiny.saved is None or tiny.loss is None:
        yield no_tiny("4-bit")
        return
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model, inputs = reload(tiny, accelerator() or "cpu", mma={}, dtype=torch.float32, quantization_config=config)
    if not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()):
        raise ValueError("no layer was quantised")
    # As it is trained: bitsandbytes' inference on CPUs takes no layer of a width that is no multiple of 64.
    loss = compare_loss(tiny, backpropagate(model.train(), inputs), 0.5)
    yield Line(OK, "4-bit", f"on the {model.device.type}: {loss}; gradients reach the adapter")


def check_deepspeed() -> Iterator[Line]:
    if find_spec("deepspeed") is None:
        yield Line(
            SKIP,
            "DeepSpeed",
            'not installed (`pip install -c constraints.txt -e ".[gpu]"` brings it); only ZeRO needs it',
        )
        return
    deepspeed = importlib.import_module("deepspeed")
    missing = [] if find_spec("ninja") or shutil.which("ninja") else ["ninja"]
    if shutil.which((os.environ.get("CXX") or "g++").split()[0]) is None and shutil.which("c++") is None:
        missing.append("a C++ compiler")
    if missing:
        found = f"{deepspeed.__version__}, without {' and '.join(missing)}: no offloading, no training on CPUs"
        yield Line(WARN, "DeepSpeed", found, "`pip install ninja`; a compiler comes with the system (g++).")
    else:
        yield Line(OK, "DeepSpeed", f"{deepspeed.__version__}, with ninja and a compiler")


def check_cache() -> Iterator[Line]:
    """The Hub's cache, and the one where transformers puts a folder's code."""
    places = {
        "HF_HOME": constants.HF_HOME,
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_MODULES_CACHE": HF_MODULES_CACHE,
    }
    for variable, folder in places.items():
        if error := _not_writable(folder):
            do = f"Check its permissions, or name another folder: `export {variable}=DIR`."
            yield Line(FAIL, "cache", f"{folder} cannot be written ({error})", do)
            return
    yield _space("cache", constants.HF_HUB_CACHE, MODEL_SPACE, "Free some, or `export HF_HOME=DIR` on a larger disk.")


def check_disk() -> Iterator[Line]:
    """The folder the command runs in, where outputs usually go."""
    if error := _not_writable("."):
        yield Line(WARN, "disk", f"{Path.cwd()} cannot be written ({error})", "Give outputs another folder.")
        return
    yield _space("disk", ".", LEAST_SPACE, "Free some, or write to another disk; `save_total_limit: 2` keeps fewer.")


def _space(name: str, folder: str, wanted: int, do: str) -> Line:
    free = shutil.disk_usage(_existing(folder)).free
    found = f"{Path(folder).absolute()}: can be written, {readable(free)} free"
    if free < LEAST_SPACE:
        return Line(FAIL, name, found, do)
    if free < wanted:
        return Line(WARN, name, f"{found}; LLaMA-7B with its tower takes 15 GB", do)
    return Line(OK, name, found)


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
