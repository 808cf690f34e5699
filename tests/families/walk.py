"""Goes through families, each in a folder of its own; what one of them breaks, the next one does not see."""

import gc
import os
import tempfile
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from .shrink import randomised
from .texts import COLUMNS as TEXT_COLUMNS
from .texts import text_row, write_text
from .towers import COLUMNS as TOWER_COLUMNS
from .towers import tower_row
from .verdicts import WRONG, Row, nothing_said, place


CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


KINDS = {"text": (text_row, TEXT_COLUMNS, "clip"), "tower": (tower_row, TOWER_COLUMNS, "llama")}


class Walk:
    """A context that makes rows: `row("text", "llama")`."""

    def __enter__(self):
        self.temporary = tempfile.TemporaryDirectory()
        # Names relative to it, so that what is said does not depend on where it is.
        self.before, self.threads = os.getcwd(), torch.get_num_threads()
        os.chdir(self.temporary.name)
        torch.set_num_threads(1)
        with nothing_said():
            torch.manual_seed(0)
            randomised(CLIPVisionModel(CLIPVisionConfig(**CLIP))).save_pretrained("clip")
            write_text("llama", "llama")
        return self

    def __exit__(self, *error):
        torch.set_num_threads(self.threads)
        os.chdir(self.before)
        self.temporary.cleanup()

    def row(self, kind: str, family: str) -> tuple[Row, float]:
        """A family's row, and how long it took."""
        started = time.perf_counter()
        make, columns, other = KINDS[kind]
        with nothing_said(), tempfile.TemporaryDirectory(prefix="row-", dir=".") as folder:
            folder = Path(os.path.basename(folder))
            try:
                row = make(family, Path(other), folder)
            except Exception as error:
                row = Row(family)
                row.set(columns, WRONG, place(error))
            row.clean(str(folder), self.temporary.name)
        gc.collect()
        return row, time.perf_counter() - started
