"""`lavin data caption|vqa|grounding|pope`: the published forms become the rows that `trl sft` trains on."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import task_files
from datasets import load_dataset

from lavin.recipes import cli
from lavin.recipes.cli import main


def prepare(capsys, tmp_path, *arguments) -> list[dict]:
    """The rows that a command writes, sorted by their ids."""
    assert main(["data", *map(str, arguments), "--output", str(tmp_path / "out")]) == 0
    pattern = capsys.readouterr().out.split("data_files: ")[1].strip()
    rows = load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["prompt", "completion", "images", "id"]
    for row in rows:
        assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"] and len(row["images"]) == 1
        assert [turn["role"] for turn in [*row["prompt"], *row["completion"]]] == ["user", "assistant"]
    return sorted(rows, key=lambda row: row["id"])


def said(rows: list[dict]) -> list[tuple[str, str, str]]:
    """Id, prompt and answer of each row."""
    return [(r["id"], r["prompt"][0]["content"][1]["text"], r["completion"][0]["content"][0]["text"]) for r in rows]


def test_captions_of_coco(tmp_path, capsys):
    file = task_files.coco_captions(tmp_path)
    arguments = ("caption", "--annotations", file, "--image-root", tmp_path / "val2014")
    asked = "Describe the image in one sentence."
    assert said(prepare(capsys, tmp_path, *arguments)) == [
        ("25-1", asked, "Two dogs on a lawn."), ("25-2", asked, "Dogs play."),
        ("9-1", asked, "A red square."), ("9-2", asked, "It is red."),
    ]  # fmt: skip
    rows = prepare(capsys, tmp_path, *arguments, "--prompt", "A caption:", "--split", "val", "--num-proc", "2")
    assert {prompt for _, prompt, _ in said(rows)} == {"A caption:"}
    assert [path.name for path in (tmp_path / "out").glob("val-*")] == ["val-00000-of-00001.parquet"]


@pytest.mark.parametrize(
    "split, numbers", [("train", ["0-1", "0-2", "1-1", "1-2"]), ("val", ["2-1", "2-2"]), ("test", ["3-1", "3-2"])]
)
def test_captions_of_karpathy(tmp_path, capsys, split, numbers):
    """`train` is `train` and `restval`; the images may lie in their folders or all in one."""
    file = task_files.karpathy(tmp_path)
    root = tmp_path if split == "train" else tmp_path / "val2014"
    rows = prepare(capsys, tmp_path, "caption", "--annotations", file, "--image-root", root, "--split", split)
    assert [name for name, *_ in said(rows)] == numbers
    assert said(rows)[0][2] == f"Caption 1 of {split}."


def test_questions_of_vqa(tmp_path, capsys):
    questions, answers = task_files.vqa(tmp_path)
    rows = prepare(capsys, tmp_path, "vqa", "--questions", questions, "--annotations", answers, "--image-root",
                   tmp_path / "images")  # fmt: skip
    assert said(rows) == [
        ("100", "Question:What colour is it? Short answer:", "red"),
        ("101", "Question:Is it red? Short answer:", "yes"),
        ("102", "Question:How many are there? Short answer:", "2"),
    ]


@pytest.mark.parametrize(
    "make, expected",
    [
        (task_files.gqa, [("05451384", "Question:Is it red? Short answer:", "yes")]),
        (task_files.textvqa, [("34602", "Question:What does it say? Short answer:", "nokia")]),
        (
            task_files.ocrvqa,
            [("0001-1", "Question:Who wrote this book? Short answer:", "Jane Roe"),
             ("0001-2", "Question:Is it old? Short answer:", "No")],
        ),
    ],
)  # fmt: skip
def test_questions_of_other_sets(tmp_path, capsys, make, expected):
    rows = prepare(capsys, tmp_path, "vqa", "--questions", make(tmp_path), "--image-root", tmp_path)
    assert said(rows) == expected


def test_boxes_of_both_forms(tmp_path, capsys):
    """The same box as x, y, width, height and as corners is the same text."""
    arguments = ("grounding", "--input", task_files.mdetr(tmp_path), "--input", task_files.qwen(tmp_path))
    rows = said(prepare(capsys, tmp_path, *arguments, "--image-root", tmp_path))
    lady = ("<ref>the lady in red</ref>", "(0.100,0.250),(0.500,0.750)")
    assert rows == [
        ("finetune_refcoco_testA-0", *lady),
        ("finetune_refcoco_testA-1", "<ref>all of it</ref>", "(0.000,0.000),(1.000,1.000)"),
        ("refcoco_testB-0", *lady),
    ]
    rows = said(prepare(capsys, tmp_path, *arguments, "--image-root", tmp_path, "--decimals", "1"))
    assert rows[0][2] == "(0.1,0.2),(0.5,0.8)"


def test_pope(tmp_path, capsys):
    files = [task_files.pope(tmp_path, name) for name in ("popular", "random")]
    rows = prepare(capsys, tmp_path, "pope", "--input", files[0], "--input", files[1], "--image-root", tmp_path)
    assert said(rows)[0] == ("popular-1", "Instruction: Is there a thing 1 in the image? \nResponse:", "yes")
    assert [answer for *_, answer in said(rows)] == ["yes", "no"] * 4


@pytest.mark.slow
def test_bad_entries_are_left_out_and_listed(tmp_path, capsys):
    """Each fault by its name; the good ones are written."""
    questions, answers = task_files.vqa(tmp_path)
    content, notes = json.loads(questions.read_text()), json.loads(answers.read_text())
    asked = {"question_id": 0, "image_id": 9, "question": "What?"}
    content["questions"] += [
        {**asked, "question_id": 7},
        {**asked, "question_id": 8, "image_id": 99},
        {**asked, "question_id": 9, "image_id": None},
        {**asked, "question_id": 10, "question": " "},
        {**asked, "question_id": 11},
    ]
    given = [{**notes["annotations"][0], "question_id": n} for n in (8, 9, 10)]
    notes["annotations"] += [*given, {"question_id": 11, "answers": [{"answer": ""}]}]
    questions.write_text(json.dumps(content))
    answers.write_text(json.dumps(notes))
    line = ["data", "vqa", "--questions", questions, "--annotations", answers, "--image-root", tmp_path / "images",
            "--output", tmp_path / "out"]  # fmt: skip
    assert main(list(map(str, line))) == 2
    assert "--skip-bad" in capsys.readouterr().err and not list((tmp_path / "out").glob("*"))
    command = [sys.executable, "-m", "lavin.recipes.cli", *map(str, line), "--skip-bad"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    listed = [line.split("\t") for line in (tmp_path / "out/train-skipped.tsv").read_text().splitlines()[1:]]
    assert sorted((int(name), kind) for name, _, kind, _ in listed) == [
        (7, "no answers"), (8, "image missing"), (9, "missing keys"), (10, "empty question"), (11, "empty answer"),
    ]  # fmt: skip
    assert "Wrote 3 rows" in done.stdout


@pytest.mark.parametrize(
    "box, fault",
    [((4, 5, 0, 10), "box not in the image"), ((30, 5, 16, 10), "box not in the image"), (None, "no box")],
)
def test_a_box_that_is_none_is_a_fault(tmp_path, capsys, box, fault):
    file = task_files.mdetr(tmp_path)
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = box
    file.write_text(json.dumps(content))
    arguments = [
        "data",
        "grounding",
        "--input",
        str(file),
        "--image-root",
        str(tmp_path),
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(arguments) == 2
    assert f"finetune_refcoco_testA-1 (finetune_refcoco_testA.json[1]): {fault}" in capsys.readouterr().err


def test_files_that_are_something_else(tmp_path, capsys):
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x04.")
    (tmp_path / "odd.json").write_text('{"pictures": []}')
    questions, _ = task_files.vqa(tmp_path)
    gqa = task_files.gqa(tmp_path)
    for arguments, words in (
        (["grounding", "--input", tmp_path / "refs(unc).p"], "finetune_refcoco_*.json"),
        (["grounding", "--input", tmp_path / "none.json"], "There is no file"),
        (["vqa", "--questions", questions], "--annotations"),
        (["vqa", "--questions", gqa, "--annotations", gqa], "leave --annotations out"),
        (["vqa", "--questions", tmp_path / "odd.json"], "as they are published"),
        (["caption", "--annotations", tmp_path / "odd.json"], "holds no list called 'images'"),
        (["caption", "--annotations", task_files.karpathy(tmp_path), "--split", "x"], "no images of split 'x'"),
    ):
        line = ["data", *map(str, arguments), "--image-root", str(tmp_path), "--output", str(tmp_path / "o")]
        assert main(line) == 2, arguments
        assert words in capsys.readouterr().err


def test_every_command_of_the_readme_is_one():
    readme = (Path(cli.__file__).parent / "data" / "README.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```bash\n(.*?)^```$", readme, flags=re.M | re.S)).replace("\\\n", "").splitlines()
    kinds = [cli.build_parser().parse_args(shlex.split(line)[1:]).kind for line in lines]
    assert kinds == ["scienceqa", "instructions", "caption", "vqa", "grounding", "pope"]
