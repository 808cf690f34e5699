"""A LaVIN folder or repository: its files, and how to write again what is damaged."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache

import lavin
from lavin import LavinConfig
from lavin.files_lavin import ADAPTER_NAME, BASE_WEIGHTS, find_file, read_json
from lavin.towers_lavin import shards_of

from .report import SKIP, Finding


MAKE = "`lavin init --vision NAME --text NAME --output DIR` makes a LaVIN folder."
AGAIN = "Save the model again with `save_pretrained`, or download the folder again."
ADAPTER_AGAIN = (
    f"Copy `{ADAPTER_NAME}/` from a whole `checkpoint-N` of the run, or download it again; without the folder "
    f"`{ADAPTER_NAME}/` the model loads as it is without an adapter."
)
PROCESSOR = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass
class Folder:
    """
    Args:
        name (`str`): Path or Hub name.
        known ([`LavinConfig`], *optional*): Its configuration, once it has been read.
    """

    name: str
    known: LavinConfig | None = None

    @property
    def config(self) -> LavinConfig:
        if self.known is None:
            raise Finding(SKIP, "not checked: it needs a config.json that can be read")
        return self.known

    @property
    def is_local(self) -> bool:
        return os.path.isdir(self.name)

    def find(self, file: str) -> str | None:
        """A file's local path; one of the Hub is downloaded."""
        return find_file(self.name, file, {})

    def read(self, file: str) -> dict:
        """A JSON file; empty where there is none."""
        path = self.find(file)
        return read_json(path) if path else {}

    def missing_of_processor(self) -> list[str]:
        """Which of the processor's files are not there. Older folders have the chat template inside another one."""
        missing = [file for file in PROCESSOR if self.find(file) is None]
        held = [self.read(file).get("chat_template") for file in PROCESSOR if file not in ("tokenizer.json", *missing)]
        return missing if self.find("chat_template.jinja") or any(held) else [*missing, "chat_template.jinja"]

    def base_index(self) -> dict[str, set[str] | None]:
        """The files of a full folder's base weights, each with the tensors it must hold; empty of a light folder."""
        held = next((file for file in BASE_WEIGHTS if has_file(self.name, None, file)), None)
        if held is None or not held.endswith(".json"):
            return {held: None} if held else {}
        files = {file: set() for file in shards_of(self.find(held))}
        for tensor, file in self.read(held)["weight_map"].items():
            files[file].add(tensor)
        return files

    def processor_again(self) -> str:
        """How to write its processor, tokenizer and chat template anew."""
        config = self.config
        if not (config.vision_checkpoint and config.text_checkpoint):
            return "Copy the processor's files from the folder that the training began with, or download it again."
        names = f"{config.vision_checkpoint['name']!r}, {config.text_checkpoint['name']!r}"
        where, upload = (f"{self.name!r}", "") if self.is_local else ("'DIR'", f" Then `hf upload {self.name} DIR .`")
        return (
            '`python -c "from lavin import LavinProcessor; LavinProcessor.from_vision_text_pretrained('
            f"{names}, num_image_tokens={config.num_image_tokens}, image_size={config.image_size})"
            f'.save_pretrained({where})"` writes it anew.{upload}'
        )

    def code_again(self, file: str) -> str:
        ours = Path(lavin.__file__).parent / file
        return f"`cp {ours} {self.name}`" if self.is_local else f"`hf upload {self.name} {ours} {file}`"

    def generation_again(self) -> str:
        if not (self.is_local and self.config.text_checkpoint):
            return AGAIN
        return (
            '`python -c "from transformers import GenerationConfig; GenerationConfig.from_pretrained('
            f'{self.config.text_checkpoint["name"]!r}).save_pretrained({self.name!r})"`'
        )

    def base_again(self) -> str:
        """How to get a damaged file of base weights anew."""
        if not self.is_local:
            return f"`hf upload {self.name} DIR .` with the file in it; if it is there, `hf download {self.name}`."
        return (
            f"Download the folder again (`hf download NAME --local-dir {self.name}`), or save the model again with "
            "`save_pretrained(DIR, full=True)`."
        )


def local_file(name: str, revision: str | None, file: str) -> str | None:
    """A file in a folder, or of a repository in the cache: nothing is downloaded."""
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    path = None if os.path.isabs(name) else try_to_load_from_cache(name, file, revision=revision)
    return path if isinstance(path, str) else None


def has_file(name: str, revision: str | None, file: str) -> bool:
    """
    Whether a file is there, in the cache, or on the Hub.

    Raises:
        `OSError`: if the Hub is asked and does not answer.
    """
    if local_file(name, revision, file):
        return True
    if os.path.isdir(name) or os.path.isabs(name) or constants.HF_HUB_OFFLINE:
        return False
    try:
        return HfApi().file_exists(name, file, revision=revision)
    except Exception as error:  # the client's own errors, of several libraries
        raise OSError(f"the Hub cannot be asked for {file} of {name}: {error}") from error
