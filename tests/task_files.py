"""Small data sets in the forms in which captions, questions and boxes are published."""

import json
from pathlib import Path

from PIL import Image


def picture(path: Path, size=(40, 20), colour=(200, 40, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def lines(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def coco_captions(folder: Path) -> Path:
    """Two images; the captions of both are mixed, as in COCO's files."""
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012}.jpg", "width": 40, "height": 20} for n in (9, 25)]
    for image in images:
        picture(folder / "val2014" / image["file_name"])
    said = [(25, "Two dogs on  a\n lawn. "), (9, "A red square."), (25, "Dogs play."), (9, "It is red.")]
    notes = [{"image_id": image, "id": n, "caption": text} for n, (image, text) in enumerate(said)]
    return write(folder / "captions_val2014.json", {"info": {"images": []}, "images": images, "annotations": notes})


def karpathy(folder: Path) -> Path:
    """An image of each split."""
    images = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        name = f"COCO_val2014_{number:012}.jpg"
        picture(folder / "val2014" / name)
        sentences = [{"raw": f"Caption {k} of {split}.", "tokens": [], "imgid": number} for k in (1, 2)]
        images.append(
            {"filepath": "val2014", "filename": name, "split": split, "cocoid": number, "sentences": sentences}
        )
    return write(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def vqa(folder: Path) -> tuple[Path, Path]:
    """Questions and answers of VQAv2, in two files and two orders."""
    said = {  # what ten people answered
        100: ("What colour is it?", 9, "other", ["red"] * 6 + ["dark red"] * 4),
        101: ("Is it red?", 9, "yes/no", ["yes"] * 10),
        102: ("How many are there?", 25, "number", ["2"] * 4 + ["two"] * 4 + ["3"] * 2),
    }
    for image in (9, 25):
        picture(folder / "images" / "val2014" / f"COCO_val2014_{image:012}.jpg")
    questions = [{"question_id": q, "image_id": said[q][1], "question": said[q][0]} for q in said]
    notes = [
        {"question_id": q, "image_id": said[q][1], "answer_type": said[q][2], "question_type": "what",
         "multiple_choice_answer": said[q][3][0],
         "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(said[q][3], 1)]}
        for q in reversed(said)
    ]  # fmt: skip
    return (
        write(folder / "v2_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": questions}),
        write(folder / "v2_mscoco_val2014_annotations.json", {"license": {}, "annotations": notes}),
    )


def gqa(folder: Path) -> Path:
    picture(folder / "2370799.jpg")
    asked = {"question": "Is it red?", "imageId": "2370799", "answer": "yes", "fullAnswer": "Yes, it is."}
    return write(folder / "testdev_balanced_questions.json", {"05451384": asked})


def textvqa(folder: Path) -> Path:
    picture(folder / "0a1b.jpg")
    asked = {"question": "What does it say?", "image_id": "0a1b", "question_id": 34602,
             "answers": ["nokia"] * 7 + ["Nokia."] * 3}  # fmt: skip
    return write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [asked]})


def ocrvqa(folder: Path) -> Path:
    books = {}
    for number, split in (("0001", 1), ("0002", 3)):
        picture(folder / f"{number}.png")
        asked, said = ["Who wrote this book? ", "Is it old?"], ["Jane Roe", "No"]
        books[number] = {
            "imageURL": f"http://images/{number}-x.png",
            "split": split,
            "questions": asked,
            "answers": said,
        }
    return write(folder / "dataset.json", books)


def mdetr(folder: Path, boxes=((4.0, 5.0, 16.0, 10.0), (0, 0, 40, 20))) -> Path:
    """A phrase per image entry; the boxes are x, y, width, height of a 40 x 20 image."""
    picture(folder / "COCO_train2014_000000581857.jpg")
    images = [
        {"file_name": "COCO_train2014_000000581857.jpg", "width": 40, "height": 20, "id": n, "caption": phrase}
        for n, phrase in enumerate(["the lady in red", "all of it"])
    ]
    notes = [{"id": 7 - n, "image_id": n, "bbox": list(box), "area": 1.0} for n, box in enumerate(boxes)]
    return write(folder / "finetune_refcoco_testA.json", {"images": images, "annotations": notes[::-1]})


def qwen(folder: Path) -> Path:
    """The same phrase, corner to corner."""
    picture(folder / "COCO_train2014_000000581857.jpg")
    entry = {"image": "COCO_train2014_000000581857.jpg", "sent": "the lady in red", "bbox": [4, 5, 20, 15],
             "height": 20, "width": 40}  # fmt: skip
    return lines(folder / "refcoco_testB.jsonl", [entry])


def pope(folder: Path, name: str = "random", labels=("yes", "no", "yes", "no")) -> Path:
    picture(folder / "COCO_val2014_000000310196.jpg")
    asked = [
        {"question_id": n, "image": "COCO_val2014_000000310196.jpg", "text": f"Is there a thing {n} in the image?",
         "label": label} for n, label in enumerate(labels, 1)
    ]  # fmt: skip
    return lines(folder / f"coco_pope_{name}.json", asked)
