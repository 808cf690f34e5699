"""Phrases and their boxes (RefCOCO, RefCOCO+, RefCOCOg), as rows of TRL."""

from pathlib import Path

from ..evaluate.boxes import box_text
from .examples import Joined, Several, all_questions, check_paths, load, make_rows, need
from .records import json_rows, keep, line_rows
from .rows import BadRow


PROMPT = "<ref>{}</ref>"  # InfMLLM's


class Grounding:
    """
    Phrases, each with the one box it means.

    Args:
        inputs (`list[str]` or `list[Path]`): MDETR's JSON in COCO's form (`finetune_refcoco_*.json`: `images`, each
            with a phrase as its `caption`, and `annotations` with `bbox`, x, y, width, height) or Qwen-VL's JSON
            Lines (`refcoco_*.jsonl`: `image`, `sent`, `bbox` x1, y1, x2, y2, `width`, `height`); all in pixels.
        image_root (`str` or `Path`): What the images' names are relative to.
        decimals (`int`, *optional*, defaults to 3): Of a coordinate, see [`box_text`].

    Raises:
        `OSError`, `ValueError`: if a file or the folder is not there, or a file is a pickle or something else, or two
            have the same name.
    """

    def __init__(self, inputs: list[str | Path], image_root: str | Path, decimals: int = 3):
        check_paths(image_root, *inputs)
        if not 1 <= decimals <= 6:
            raise ValueError(f"--decimals must be 1 to 6, got {decimals}.")
        self.files, self.root, self.decimals = [Path(path) for path in inputs], Path(image_root), decimals
        stems = [path.stem for path in self.files]
        if twice := [stem for stem in stems if stems.count(stem) > 1]:
            raise ValueError(f"Two files are called {twice[0]}, by which their phrases are told apart: rename one.")

    def index(self, scratch: Path):
        """Reads the files once (MDETR's twice, for phrases and boxes)."""
        self.tables = []  # of each file: its entries, and the boxes of MDETR's
        for path in self.files:
            if path.suffix == ".jsonl":
                self.tables.append((keep(line_rows, scratch, path=path), None))
                continue
            images = keep(json_rows, scratch, path=path, at="images[]", key="id")
            notes = keep(json_rows, scratch, path=path, at="annotations[]", key="image_id")
            self.tables.append((images, Joined(images, notes)))
        self.several = Several(self.files, [len(table) for table, _ in self.tables], "phrases")

    def __len__(self) -> int:
        return len(self.several)

    def place(self, index: int) -> str:
        """File and number of a phrase, from 0."""
        return self.several.place(index)

    def name(self, index: int) -> str:
        """The file's name and MDETR's id, or the phrase's number."""
        file, number = self.several.locate(index)
        key = self.tables[file][0][number]["key"]
        return f"{self.files[file].stem}-{number if key is None else key}"

    def _read(self, index: int) -> dict:
        file, number = self.several.locate(index)
        table, boxes = self.tables[file]
        entry = load(table[number]["entry"])
        if boxes is None:
            phrase, path, box = need(entry, "sent"), need(entry, "image"), _numbers(entry)
        else:
            notes = boxes.of(number)
            if len(notes) != 1:
                raise BadRow("not one box", f"{len(notes)} annotations for this phrase")
            phrase, path, (x, y, w, h) = need(entry, "caption"), need(entry, "file_name"), _numbers(notes[0])
            box = (x, y, x + w, y + h)
        width, height = (need(entry, key, (int, float)) for key in ("width", "height"))
        # A pixel beyond the border is a matter of rounding.
        if not (-1 <= box[0] < box[2] <= width + 1 and -1 <= box[1] < box[3] <= height + 1):
            raise BadRow("box not in the image", f"{box} of {width} x {height}")
        truth = tuple(min(1.0, max(0.0, value / side)) for value, side in zip(box, (width, height) * 2, strict=True))
        return {"id": self.name(index), "prompt": PROMPT.format(phrase), "image": self.root / path, "phrase": phrase,
                "answer": box_text(truth, self.decimals), "truth": truth, "group": self.files[file].stem}  # fmt: skip

    def rows(self, index: int) -> list[dict]:
        """One row for each phrase."""
        return make_rows([self._read(index)])

    def ask(self, index: int) -> list[dict]:
        """One question for each phrase; its box is expected, relative to the image."""
        one = self._read(index)
        return [
            {"id": one["id"], "prompt": one["prompt"], "images": [one["image"]], "expected": one["truth"],
             "phrase": one["phrase"], "group": one["group"]}
        ]  # fmt: skip

    def questions(self) -> list[dict]:
        """See [`all_questions`]."""
        return all_questions(self)


def _numbers(entry: dict) -> tuple[float, float, float, float]:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
        raise BadRow("no box", f"bbox is {box!r}"[:80])
    return tuple(box)
