"""COCO captions and Karpathy's split of them, as rows of TRL."""

from pathlib import Path

from .examples import Joined, all_questions, check_paths, load, make_rows, need
from .records import json_rows, keep
from .rows import BadRow


PROMPT = "Describe the image in one sentence."  # ours: InfMLLM's is not published


class Captions:
    """
    Captions of images.

    Args:
        annotations (`str` or `Path`): COCO's `captions_*.json` (`images`, `annotations`), or Karpathy's
            `dataset_coco.json` (`images` with `sentences` and `split`).
        image_root (`str` or `Path`): What the images' names are relative to.
        split (`str`, *optional*, defaults to `"train"`): Of Karpathy's file: `train` (with `restval`, as usual),
            `val`, `test`. COCO has a file for each split.
        prompt (`str`, *optional*, defaults to `"Describe the image in one sentence."`): What is asked.

    Raises:
        `OSError`, `ValueError`: if a file or the folder is not there, or the file is something else.
    """

    def __init__(self, annotations: str | Path, image_root: str | Path, split: str = "train", prompt: str = PROMPT):
        check_paths(image_root, annotations)
        self.file, self.root, self.split, self.prompt = Path(annotations), Path(image_root), split, prompt
        first = next(json_rows(self.file, "images[]"), None)
        self.karpathy = first is not None and "sentences" in load(first["entry"])

    def index(self, scratch: Path):
        """Reads the file once (COCO's twice, for images and captions)."""
        if self.karpathy:
            wanted = ("train", "restval") if self.split == "train" else (self.split,)
            self.images = keep(_of_split, scratch, path=self.file, splits=wanted)
            if not len(self.images):
                raise ValueError(f"{self.file} has no images of split {self.split!r}: it knows train, val and test.")
            return
        self.images = keep(json_rows, scratch, path=self.file, at="images[]", key="id")
        notes = keep(json_rows, scratch, path=self.file, at="annotations[]", key="image_id")
        self.captions = Joined(self.images, notes)

    def __len__(self) -> int:
        return len(self.images)

    def place(self, index: int) -> str:
        """File and number of an image in its split, from 0."""
        return f"{self.file.name}, image {index}"

    def name(self, index: int) -> str:
        """The image's id: COCO's number."""
        return str(self.images[index]["key"])

    def _read(self, index: int) -> tuple[Path, list[str]]:
        image = load(self.images[index]["entry"])
        if self.karpathy:
            path = self.root / image.get("filepath", "") / need(image, "filename")
            path = path if path.is_file() else self.root / image["filename"]
            said = [need(sentence, "raw") for sentence in need(image, "sentences", list)]
        else:
            path = self.root / need(image, "file_name")
            said = [need(note, "caption") for note in self.captions.of(index)]
        if not said:
            raise BadRow("no captions")
        return path, [" ".join(caption.split()) for caption in said]

    def rows(self, index: int) -> list[dict]:
        """An image's rows, one for each caption; ids are the image's and the caption's number."""
        path, said = self._read(index)
        name = self.name(index)
        return make_rows(
            [
                {"id": f"{name}-{number}", "prompt": self.prompt, "image": path, "answer": caption}
                for number, caption in enumerate(said, 1)
            ]
        )

    def ask(self, index: int) -> list[dict]:
        """One question; all captions are expected."""
        path, said = self._read(index)
        return [{"id": self.name(index), "prompt": self.prompt, "images": [path], "expected": said, "group": None}]

    def questions(self) -> list[dict]:
        """See [`all_questions`]."""
        return all_questions(self)


def _of_split(path: Path, splits: tuple[str, ...]):
    for row in json_rows(path, "images[]"):
        image = load(row["entry"])
        if image.get("split") in splits:
            yield {"key": str(image.get("cocoid", image.get("imgid"))), "entry": row["entry"]}
