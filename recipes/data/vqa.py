"""Questions on images as VQAv2, OK-VQA, GQA, TextVQA and OCR-VQA publish them, as rows of TRL."""

import json
from collections import Counter
from pathlib import Path

from .examples import Joined, all_questions, check_paths, images_by_number, load, make_rows, need
from .records import json_rows, keep
from .rows import BadRow


PROMPT = "Question:{} Short answer:"  # InfMLLM's
OCR_SPLITS = {"train": 1, "val": 2, "test": 3}


class VQA:
    """
    Questions with short answers.

    Args:
        questions (`str` or `Path`): Of VQAv2 and OK-VQA the questions' JSON (`questions`); of TextVQA its JSON
            (`data`); of GQA its JSON (an object from id to question, with `imageId`); of OCR-VQA `dataset.json` (an
            object from book to `questions` and `answers`).
        image_root (`str` or `Path`): The images' folder. VQAv2 and OK-VQA: anywhere below it, by COCO's numbers.
        annotations (`str` or `Path`, *optional*): Of VQAv2 and OK-VQA the answers' JSON (`annotations`).
        split (`str`, *optional*, defaults to `"train"`): Of OCR-VQA: `train`, `val` or `test`. The others have a file
            for each split.

    Raises:
        `OSError`, `ValueError`: if a file or the folder is not there, or a file is something else.
    """

    def __init__(
        self,
        questions: str | Path,
        image_root: str | Path,
        annotations: str | Path | None = None,
        split: str = "train",
    ):
        check_paths(image_root, questions, annotations)
        self.file, self.root, self.split = Path(questions), Path(image_root), split
        self.annotations = None if annotations is None else Path(annotations)
        self.kind = kind_of(self.file)
        if (self.kind == "VQA") != (annotations is not None):
            raise ValueError(
                "VQAv2 and OK-VQA keep answers in a file of their own: --annotations v2_mscoco_..._annotations.json."
                if annotations is None
                else f"{questions} is {self.kind}, whose answers are in the file itself: leave --annotations out."
            )
        if self.kind == "OCR-VQA" and split not in OCR_SPLITS:
            raise ValueError(f"OCR-VQA has the splits {', '.join(OCR_SPLITS)}, got {split!r}.")
        self.title = self.kind if self.kind != "VQA" else self.file.stem.removesuffix("_questions")

    def index(self, scratch: Path):
        """Reads the files once."""
        if self.kind == "VQA":
            self.entries = keep(json_rows, scratch, path=self.file, at="questions[]", key="question_id")
            notes = keep(json_rows, scratch, path=self.annotations, at="annotations[]", key="question_id")
            self.answers, self.images = Joined(self.entries, notes), images_by_number(self.root)
        elif self.kind == "TextVQA":
            self.entries = keep(json_rows, scratch, path=self.file, at="data[]", key="question_id")
        elif self.kind == "GQA":
            self.entries = keep(json_rows, scratch, path=self.file, at="")
        else:
            self.entries = keep(_of_split, scratch, path=self.file, number=OCR_SPLITS[self.split])

    def __len__(self) -> int:
        return len(self.entries)

    def place(self, index: int) -> str:
        """File and number of an entry in its split, from 0."""
        return f"{self.file.name}, entry {index}"

    def name(self, index: int) -> str:
        """The question's id; of OCR-VQA the book's."""
        return str(self.entries[index]["key"])

    def _read(self, index: int) -> list[dict]:
        """Each question's `id`, `prompt`, `image`, `expected` (what people answered), `answer` (to learn), `group`."""
        entry, name = load(self.entries[index]["entry"]), self.name(index)
        group = learnt = None
        if self.kind == "OCR-VQA":
            asked, said = need(entry, "questions", list), need(entry, "answers", list)
            if len(asked) != len(said):
                raise BadRow("questions and answers differ", f"{len(asked)} questions, {len(said)} answers")
            path = self.root / f"{name}{Path(entry.get('imageURL', '')).suffix or '.jpg'}"
            several = [(f"{name}-{n}", q, [a]) for n, (q, a) in enumerate(zip(asked, said, strict=True), 1)]
        elif self.kind == "VQA":
            number = need(entry, "image_id", (int, str))
            path = self.images.get(int(number), self.root / f"{number}.jpg")
            notes = self.answers.of(index)
            if len(notes) != 1:
                raise BadRow("no answers", f"{len(notes)} annotations for this question")
            answers = [answer.get("answer") for answer in need(notes[0], "answers", list)]
            group, learnt = notes[0].get("answer_type"), notes[0].get("multiple_choice_answer")
            several = [(name, entry.get("question"), answers)]
        elif self.kind == "TextVQA":
            path = self.root / f"{need(entry, 'image_id')}.jpg"
            several = [(name, entry.get("question"), need(entry, "answers", list))]
        else:
            path = self.root / f"{need(entry, 'imageId', (str, int))}.jpg"
            several = [(name, entry.get("question"), [entry.get("answer")])]
        made = []
        for one, question, given in several:
            if not isinstance(question, str) or not question.strip():
                raise BadRow("empty question")
            # Of ten people one may have said nothing: the scorer counts them, and nobody learns it.
            said = [answer for answer in given if isinstance(answer, str) and answer.strip()]
            if not said or not all(isinstance(answer, str) for answer in given):
                raise BadRow("empty answer")
            answer = learnt or Counter(said).most_common(1)[0][0]
            made.append(
                {"id": one, "prompt": PROMPT.format(question.strip()), "image": path, "expected": given,
                 "answer": answer.strip(), "group": group}
            )  # fmt: skip
        return made

    def rows(self, index: int) -> list[dict]:
        """
        An entry's rows. Where several people have answered, the answer to learn is the one that the file names
        (`multiple_choice_answer`), or the most frequent one, the first of them where several are.
        """
        return make_rows(self._read(index))

    def ask(self, index: int) -> list[dict]:
        """An entry's questions; all answers are expected."""
        return [
            {"id": one["id"], "prompt": one["prompt"], "images": [one["image"]], "expected": one["expected"],
             "group": one["group"]}
            for one in self._read(index)
        ]  # fmt: skip

    def questions(self) -> list[dict]:
        """See [`all_questions`]."""
        return all_questions(self)


def kind_of(path: Path) -> str:
    """`"VQA"` (VQAv2 and OK-VQA), `"TextVQA"`, `"GQA"` or `"OCR-VQA"`, by what a file holds."""
    first = next(json_rows(path, ""), {"entry": b"{}"})  # of a large file the beginning, where that is enough
    entry = json.loads(first["entry"])
    if isinstance(entry, dict) and "imageId" in entry:
        return "GQA"
    if isinstance(entry, dict) and "questions" in entry:
        return "OCR-VQA"
    for kind, at in (("VQA", "questions[]"), ("TextVQA", "data[]")):
        try:
            next(json_rows(path, at), None)
            return kind
        except ValueError as error:
            if "holds no" not in str(error):
                raise
    raise ValueError(f"{path} is none of VQAv2, OK-VQA, TextVQA, GQA and OCR-VQA, as they are published.")


def _of_split(path: Path, number: int):
    for row in json_rows(path, ""):
        if load(row["entry"]).get("split") == number:
            yield row
