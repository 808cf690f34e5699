"""Loads a LaVIN to answer with, for `lavin ask`, `eval`, `serve` and lmms-eval alike."""

import os
from pathlib import Path

import torch

from lavin import LavinConfig, LavinForConditionalGeneration, LavinProcessor
from lavin.files_lavin import find_file


DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_processor(name: str | os.PathLike, revision: str | None = None) -> LavinProcessor:
    """
    The processor of a LaVIN folder or Hub name.

    Raises:
        `OSError`, `ValueError`: if there is no LaVIN, or it has no processor.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        _check_folder(Path(name))
    elif name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ValueError(f"There is no folder {name}. Name a LaVIN folder (the output of `trl sft`) or a Hub name.")
    else:
        for file in ("config.json", "processor_config.json", "tokenizer.json"):
            find_file(name, file, {"revision": revision})  # says which is missing where the Hub is out of reach
    return LavinProcessor.from_pretrained(name, revision=revision)


def load_model(
    name: str | os.PathLike,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[LavinForConditionalGeneration, LavinProcessor]:
    """
    Loads model and processor, ready to answer.

    Args:
        name (`str` or `os.PathLike`): A LaVIN folder or its name on the Hub.
        device (`str`, *optional*): By default the GPU where there is one, else the CPU.
        dtype (`str` or `torch.dtype`, *optional*): Of the frozen towers; what was trained stays float32. By default
            bfloat16 on a GPU and float32 on a CPU; `"auto"` is the checkpoint's.
        revision (`str`, *optional*): Branch, tag or commit of a Hub name.

    Returns:
        `tuple(LavinForConditionalGeneration, LavinProcessor)`: the model in eval mode.

    Raises:
        `OSError`, `ValueError`: if it cannot be loaded; the message says why.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    processor = load_processor(name, revision)
    device = default_device() if device is None else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"There is no device {device!r} for torch here: {str(error).splitlines()[0]}") from error
    dtype = default_dtype(device) if dtype is None else dtype
    model = LavinForConditionalGeneration.from_pretrained(name, revision=revision, dtype=dtype)
    check_agreement(model.config, processor, name)
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0]
        raise ValueError(f"The memory of {device} does not hold {name}: {reason}") from error


def check_agreement(config: LavinConfig, processor: LavinProcessor, name: str | os.PathLike):
    """
    Raises:
        `ValueError`: if model and processor differ in the image tokens of an image.
    """
    if processor.num_image_tokens != config.num_image_tokens:
        raise ValueError(
            f"The processor of {name} writes {processor.num_image_tokens} tokens for each image, and the model makes "
            f"{config.num_image_tokens}. Load the processor in Python, set `processor.num_image_tokens = "
            f"{config.num_image_tokens}`, and save it with a model of that setting (`save_pretrained`)."
        )


def is_full(error: BaseException) -> bool:
    """Whether it is the memory that did not suffice, a device's or the machine's: each allocator has its own error."""
    said = str(error).lower()
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return full or "out of memory" in said or "can't allocate memory" in said


def default_device() -> str:
    """`"cuda"` where there is a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is slow."""
    return "float32" if str(device).startswith("cpu") else "bfloat16"


def eos_token_ids(model, processor) -> list[int]:
    """
    The tokens that end an answer: those of the generation config, and the tokenizer's, which training wrote at the end
    of an answer and of which a base model's generation config may know nothing.
    """
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, (list, tuple)) else [known]
    return sorted({*known, processor.tokenizer.eos_token_id} - {None})


def _check_folder(folder: Path):
    if not (folder / "config.json").is_file():
        checkpoints = sorted(folder.glob("checkpoint-*"))
        way_out = f"It holds {checkpoints[-1].name}: name that" if checkpoints else "Name the output of `trl sft`"
        raise ValueError(f"{folder} is no LaVIN folder: it has no config.json. {way_out}.")
    if not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"{folder} has no processor (processor_config.json): copy the processor's files from the folder that "
            "training started from, or save it there with `LavinProcessor.save_pretrained`."
        )
