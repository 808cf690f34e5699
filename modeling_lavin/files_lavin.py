"""Files of folders and of the Hub: finding them, writing them whole, and seeing that an adapter is what was saved."""

import contextlib
import hashlib
import importlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from transformers.utils import cached_file, logging


logger = logging.get_logger(__name__)
# The oldest and the newest minor version that the tests ran with.
RAN_WITH = {"torch": ("2.6", "2.15"), "transformers": ("5.18", "5.24"), "peft": ("0.21", "0.21")}
ADAPTER_NAME = "mma"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")
NO_VARIANT = (
    "LaVIN folders have no `variant`: load and save without it. `from_pretrained(..., dtype=...)` chooses the dtype "
    "of weights; those of another dtype go to a folder of their own."
)
DIGEST = "sha256"  # in the header of an adapter's file: of everything after the header
DAMAGED = (
    "{file} cannot be read ({cause}): it is cut off, damaged or of another kind. Copy it again from where it is "
    "whole; of a training run, take an earlier `checkpoint-N`."
)


def find_file(name, files: str | tuple[str, ...], hub: dict) -> str | None:
    """
    The local path of the first of these files (each relative to the root) that a folder or Hub repository has, or
    `None` where it is known to have none of them.

    Raises:
        `OSError`: if the Hub cannot be reached and the cache does not show whether there is such a file. The message
            says which file, and what to do.
    """
    files = (files,) if isinstance(files, str) else files
    if os.path.isdir(name):
        return next((path for path in (os.path.join(name, file) for file in files) if os.path.isfile(path)), None)
    unknown = None
    for file in files:
        folder, _, leaf = file.rpartition("/")
        try:
            if path := cached_file(name, leaf, subfolder=folder, **hub):
                return path
        except OSError as error:
            if isinstance(error.__cause__, LocalEntryNotFoundError):
                unknown = unknown or (None if _known_absent(name, file, hub) else file)
            elif error.errno is not None or error.__cause__ is not None:  # other than that the repository has none
                raise
    if unknown:
        at = f" --revision {hub['revision']}" if hub.get("revision") not in (None, "main") else ""
        raise OSError(
            f"{unknown} of {name} is not in the cache ({hub.get('cache_dir') or constants.HF_HUB_CACHE}), and the Hub "
            f"cannot be reached{' (HF_HUB_OFFLINE is set)' if constants.HF_HUB_OFFLINE else ''}. Where it can, "
            f"`hf download {name}{at}` gets all there is."
        )
    return None


def _known_absent(name, file: str, hub: dict) -> bool:
    """Whether the cache shows that a repository has no such file: by a note, or because all of it was downloaded."""
    where = {"cache_dir": hub.get("cache_dir"), "revision": hub.get("revision")}
    if try_to_load_from_cache(str(name), file, **where) is _CACHED_NO_EXIST:
        return True
    return isinstance(try_to_load_from_cache(str(name), "README.md", **where), str)  # loading never fetches that


@contextlib.contextmanager
def staged(folder):
    """
    A folder to write to. At the end its files move into `folder`, each of them whole: who is killed while writing, or
    finds the disk full, leaves what was there before; two who write at once leave each file as one of them wrote it.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="_saving-") as place:
        yield Path(place)
        for file in sorted(path for path in Path(place).rglob("*") if path.is_file()):
            target = Path(folder, file.relative_to(place))
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def replace_text(file: Path, text: str):
    """Writes a file of text that is never half there."""
    with staged(file.parent) as place:
        (place / file.name).write_text(text, encoding="utf-8")


def write_adapter(tensors: dict[str, torch.Tensor], file: Path):
    """Writes an adapter's weights as safetensors, with a digest by which a changed byte is seen."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.name} cannot be written: {error}") from error
    header, data = _parts(file.read_bytes())
    header["__metadata__"][DIGEST] = hashlib.sha256(data).hexdigest()  # not by safetensors: its order is random
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_adapter(file: str) -> dict[str, torch.Tensor]:
    """
    Raises:
        `ValueError`: if the file is damaged.
    """
    content = Path(file).read_bytes()  # once: another process may put a new file there at any moment
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(DAMAGED.format(file=file, cause=error)) from error
    header, data = _parts(content)
    saved = header.get("__metadata__", {}).get(DIGEST)
    if saved is not None and saved != hashlib.sha256(data).hexdigest():
        raise ValueError(DAMAGED.format(file=file, cause="its bytes are not those that were saved"))
    return tensors


def _parts(content: bytes) -> tuple[dict, memoryview]:
    """A safetensors file's header and what follows it."""
    content = memoryview(content)
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(bytes(content[8:end])), content[end:]


def read_text(file) -> str:
    """
    Raises:
        `OSError`: if there is no such file.
        `ValueError`: if it is no UTF-8; the message says which file, and where.
    """
    data = Path(file).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file} is no UTF-8 text: byte 0x{data[error.start]:02x} in line {line}. Save it as UTF-8."
        ) from error


def read_json(file: str) -> dict:
    """
    Raises:
        `ValueError`: if it is no JSON object.
    """
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:  # the latter of brackets in brackets without end
        raise ValueError(DAMAGED.format(file=file, cause=error)) from error
    if not isinstance(content, dict):
        raise ValueError(DAMAGED.format(file=file, cause="it holds no JSON object"))
    return content


def check_versions():
    """Says in one line, once, which installed versions this code was never run with."""
    strange = []
    for name, (oldest, newest) in RAN_WITH.items():
        installed = Version(version(name))
        if not Version(oldest).release <= installed.release[:2] <= Version(newest).release:
            strange.append(f"{name} {installed} ({oldest} to {newest})")
    if strange:
        logger.warning_once(
            f"This LaVIN's code was never run with {', '.join(strange)}: should anything be wrong, install a version "
            "in this range."
        )


def one_line(error: Exception) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


def installed(module: str):
    """
    A module of the installed package that makes new LaVINs, and does not travel with a folder.

    Raises:
        `ImportError`: if `lavin` is not installed.
    """
    try:
        return importlib.import_module(f"lavin.{module}")
    except ImportError as error:
        raise ImportError(
            f"To make a new LaVIN of two checkpoints, install `lavin` ({error}). To load, train and save one needs no "
            "installation."
        ) from error
