"""The quickstart's data: ScienceQA's format, seeded, disjoint; its tiny towers: small, and trained apart."""

import hashlib
import json

import pytest
from PIL import Image

from lavin.recipes.data.rows import write_parquet
from lavin.recipes.data.scienceqa import (
    OUTPUTS,
    format_answer,
    format_question,
    image_path,
    read_scienceqa,
    scienceqa_rows,
)
from lavin.recipes.quickstart.data import question_key, write_dataset
from lavin.recipes.quickstart.quickstart import TAPS, TINY
from lavin.recipes.quickstart.world import digit_scans, split_scans


SIZES = {"train": (30, 20, 10, 10), "val": (6, 6, 3, 3), "test": (12, 12, 6, 6)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), SIZES)


def digest(folder) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_format_is_scienceqa(dataset):
    problems = json.loads((dataset / "problems.json").read_text())
    splits = json.loads((dataset / "pid_splits.json").read_text())
    assert {split: len(ids) for split, ids in splits.items()} == {s: sum(n) for s, n in SIZES.items()}
    assert sorted(sum(splits.values(), [])) == sorted(problems)
    for pid, problem in problems.items():
        assert 0 <= problem["answer"] < len(problem["choices"]) == len(set(problem["choices"])) <= 5
        assert {"question", "hint", "image", "lecture", "solution", "split", "subject", "grade"} <= set(problem)
        if path := image_path(dataset, pid, problem):
            assert path.relative_to(dataset).parts == ("images", problem["split"], pid, "image.png")
            assert Image.open(path).size == (64, 64)
    test = read_scienceqa(dataset, "test").values()
    assert any(p["hint"] and not p["image"] for p in test) and any(not p["hint"] and not p["image"] for p in test)
    assert set(json.loads((dataset / "captions.json").read_text())["captions"]) == {
        p for p in problems if problems[p]["image"]
    }


def test_same_seed_same_files(dataset, tmp_path):
    assert digest(write_dataset(tmp_path / "again", SIZES)) == digest(dataset)
    assert digest(write_dataset(tmp_path / "other", SIZES, seed=1)) != digest(dataset)


def test_splits_share_no_image(dataset):
    images = {split: digest(dataset / "images" / split) for split in SIZES}
    seen = [value for split in images.values() for value in set(split.values())]
    assert len(seen) == len(set(seen))
    scans, _ = digit_scans()
    parts = split_scans()
    assert sorted(sum((list(part) for part in parts.values()), [])) == list(range(len(scans)))
    by_content = [{scans[i].tobytes() for i in part} for part in parts.values()]
    assert not (by_content[0] & by_content[1]) and not (by_content[0] & by_content[2])


def test_splits_share_no_text_question(tmp_path):
    folder = write_dataset(tmp_path, {"train": (0, 0, 300, 300), "test": (0, 0, 100, 100)})
    train, test = (
        {question_key(problem) for problem in read_scienceqa(folder, split).values()} for split in ("train", "test")
    )
    assert train and test and not train & test


def test_unknown_names_are_explained(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="problems.json"):
        read_scienceqa(tmp_path, "train")
    with pytest.raises(ValueError, match="train, val, test"):
        read_scienceqa(dataset, "minitest")
    problem = next(iter(read_scienceqa(dataset, "test").values()))
    with pytest.raises(ValueError, match="QCM"):
        format_question(problem, "XYZ")
    with pytest.raises(ValueError, match="ALE"):
        format_answer(problem, "XYZ")


def test_prompt_formats():
    problem = {"question": "Who?", "choices": ["me", "you"], "answer": 1, "hint": "", "lecture": "Look.\nTwice.",
               "solution": "It is  you."}  # fmt: skip
    assert format_question(problem) == "Question: Who?\nContext: N/A\nOptions: (A) me (B) you\nResponse:"
    assert format_question(problem, "CQM", "A cat.").startswith("Context: A cat.\nQuestion: Who?\nOptions:")
    assert "BECAUSE: Look.\\nTwice. It is you.\n" in format_question(problem, "QCMLE")
    assert format_answer(problem) == "The answer is B. BECAUSE: Look.\\nTwice. It is you."
    assert format_answer(problem, "LEA") == "Look.\\nTwice. It is you. The answer is B."
    for outputs in OUTPUTS:
        assert "BECAUSE" not in format_answer({**problem, "lecture": "", "solution": ""}, outputs)


def test_parquet_holds_the_images(dataset, tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "moved" / "test.parquet"
    rows = list(scienceqa_rows(dataset, "test"))
    assert write_parquet(rows, path) == len(rows) == 36
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    for row, original in zip(loaded, rows, strict=True):
        assert len(row["images"]) == len(original["images"])
        kinds = [part["type"] for part in row["prompt"][0]["content"]]
        assert kinds == ["image"] * len(row["images"]) + ["text"]
        assert all(image.size == (64, 64) for image in row["images"])
        letter = "ABCDE"[row["answer"]]
        assert row["completion"][0]["content"][0]["text"].startswith(f"The answer is {letter}.")
        assert f"({letter}) {row['choices'][row['answer']]}" in row["prompt"][0]["content"][-1]["text"]


def test_letters_are_parsed_and_controls_differ():
    from lavin.recipes.quickstart.evaluate import other_images, parse_letter, percent

    texts = "The answer is B.", " The answer is (A)", "B", "The answer is"
    assert [parse_letter(text) for text in texts] == [1, 0, None, None]
    assert percent([True, False, False]) == 33.33 and percent([]) is None
    asked = [{"problem": {"category": "ab"[i % 2]}, "image": i} for i in range(10)]
    swapped = other_images(asked)
    assert all(new != old["image"] and new % 2 == old["image"] % 2 for new, old in zip(swapped, asked, strict=True))


def test_own_image_is_put_on_white_paper(tmp_path):
    from lavin.recipes.quickstart.quickstart import main, read_own_image

    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_own_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "broken.png").write_text("no image")
    for wrong in ("broken.png", "missing.png"):
        with pytest.raises(SystemExit):
            main(["--image", str(tmp_path / wrong), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_tiny_towers_are_small_and_load():
    from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 8 * 2**20
    vision, text = CLIPVisionModel.from_pretrained(TINY / "vision"), LlamaForCausalLM.from_pretrained(TINY / "text")
    assert vision.config.num_hidden_layers >= max(TAPS) and len(TAPS) == 6
    tokenizer = AutoTokenizer.from_pretrained(TINY / "text")
    assert len(tokenizer) <= text.config.vocab_size
    apart = [tokenizer(part, add_special_tokens=False).input_ids for part in ("Response:", " The answer is A.")]
    assert tokenizer("Response:The answer is A.", add_special_tokens=False).input_ids == apart[0] + apart[1]
    assert tokenizer.decode(apart[1]) == "The answer is A."


@pytest.mark.slow
def test_pretraining_runs(tmp_path):
    from lavin.recipes.quickstart.pretrain import main

    main(["--output", str(tmp_path), "--quick"])
    for kind in ("vision", "text"):
        made, kept = (json.loads((folder / kind / "config.json").read_text()) for folder in (tmp_path, TINY))
        assert made["dtype"] == "float16"
        other = {"transformers_version", "vocab_size"}  # the tokenizer's trainer breaks ties differently every time
        assert {k: v for k, v in made.items() if k not in other} == {k: v for k, v in kept.items() if k not in other}
