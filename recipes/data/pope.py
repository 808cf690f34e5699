"""POPE (arXiv 2305.10355): is there such a thing in the image?"""

from pathlib import Path

from .examples import Several, all_questions, check_paths, load, make_rows, need
from .instructions import format_instruction
from .records import keep, line_rows
from .rows import BadRow


CATEGORIES = ("random", "popular", "adversarial")


class POPE:
    """
    Questions with yes or no.

    Args:
        inputs (`list[str]` or `list[Path]`): `coco_pope_random.json`, `coco_pope_popular.json`,
            `coco_pope_adversarial.json`: JSON Lines of `question_id`, `image`, `text`, `label`.
        image_root (`str` or `Path`): The images' folder (COCO's val2014).

    Raises:
        `OSError`, `ValueError`: if a file or the folder is not there, or two files are of one category.
    """

    def __init__(self, inputs: list[str | Path], image_root: str | Path):
        check_paths(image_root, *inputs)
        self.files, self.root = [Path(path) for path in inputs], Path(image_root)
        self.names = [next((c for c in CATEGORIES if c in path.stem), path.stem) for path in self.files]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"Two files are of the same category: {', '.join(self.names)}.")

    def index(self, scratch: Path):
        """Reads the files once."""
        self.tables = [keep(line_rows, scratch, path=path) for path in self.files]
        self.several = Several(self.files, [len(table) for table in self.tables], "questions")

    def __len__(self) -> int:
        return len(self.several)

    def place(self, index: int) -> str:
        """File and number of a question, from 0."""
        return self.several.place(index)

    def name(self, index: int) -> str:
        """The category and the number of the question in its file, from 1, as in its `question_id`."""
        file, number = self.several.locate(index)
        return f"{self.names[file]}-{number + 1}"

    def _read(self, index: int) -> dict:
        file, number = self.several.locate(index)
        entry = load(self.tables[file][number]["entry"])
        label = need(entry, "label")
        if label not in ("yes", "no"):
            raise BadRow("neither yes nor no", label)
        return {"id": self.name(index), "prompt": format_instruction(need(entry, "text")), "answer": label,
                "image": self.root / need(entry, "image"), "group": self.names[file]}  # fmt: skip

    def rows(self, index: int) -> list[dict]:
        """One row for each question."""
        return make_rows([self._read(index)])

    def ask(self, index: int) -> list[dict]:
        """One question; `"yes"` or `"no"` is expected."""
        one = self._read(index)
        return [{"id": one["id"], "prompt": one["prompt"], "images": [one["image"]], "expected": one["answer"],
                 "group": one["group"]}]  # fmt: skip

    def questions(self) -> list[dict]:
        """See [`all_questions`]."""
        return all_questions(self)
