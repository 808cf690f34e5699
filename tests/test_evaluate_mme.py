"""`lavin eval mme`: both layouts, the benchmark's own rules, the published totals."""

import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image
from test_evaluate import fails, lavin_folder  # noqa: F401  (a fixture)

from lavin.recipes.cli import main
from lavin.recipes.evaluate.mme import COGNITION, PERCEPTION, load_questions, parse_yes_no, score_mme, totals


# LaVIN-13B's published scores, and how many images each subtask has.
PUBLISHED = {
    "existence": (185.00, 30), "count": (88.33, 30), "position": (63.33, 30), "color": (75.00, 30),
    "posters": (79.59, 147), "celebrity": (47.35, 170), "scene": (136.75, 200), "landmark": (93.50, 200),
    "artwork": (87.25, 200), "OCR": (107.50, 20), "commonsense_reasoning": (87.14, 70),
    "numerical_calculation": (65.00, 20), "text_translation": (47.50, 20), "code_reasoning": (50.00, 20),
}  # fmt: skip


def test_published_scores_add_up():
    """
    Answers are made up so that each subtask scores as published, and go through the whole scorer. A subtask of n
    images scores 100 (a / 2n + p / n), for a right answers and p images with both right.
    """
    questions, answers = [], {}
    for subtask, (score, n) in PUBLISHED.items():
        points = round(score / 100 * 2 * n)  # a + 2p: four for an image with both right, one for an image with one
        both = max(0, -(-(points - n) // 3))
        rights = [2] * both + [1] * (points - 4 * both)
        for image, right in enumerate(rights + [0] * (n - len(rights))):
            for line, expected in enumerate(("yes", "no")):
                name = f"{subtask}/{image}.jpg/{line + 1}"
                questions.append({"id": name, "subtask": subtask, "image": f"{image}.jpg", "expected": expected})
                answers[name] = expected if line < right else "no" if expected == "yes" else "Yes."
    assert len(questions) == 2374
    scores = {subtask: row["score"] for subtask, row in score_mme(questions, answers).items()}
    assert {name: round(score, 2) for name, score in scores.items()} == {name: s for name, (s, _) in PUBLISHED.items()}
    assert {name: round(total, 2) for name, total in totals(scores).items()} == {
        "perception": 963.61, "cognition": 249.64,
    }  # fmt: skip
    # And the published numbers themselves, which are rounded.
    sums = totals({name: score for name, (score, _) in PUBLISHED.items()})
    assert sums["perception"] == pytest.approx(963.61, abs=0.02)
    assert sums["cognition"] == pytest.approx(249.64, abs=0.02)
    assert totals({"count": 90.0}) == {"perception": None, "cognition": None}


@pytest.mark.parametrize(
    "text, expected",
    [("Yes", "yes"), ("yes, it is.", "yes"), (" No.", "no"), ("NO", "no"), ("Not at all", "no"), ("oh yes", "other"),
     ("It is. Yes", "other"), ("", "other"), ("maybe no", "other")],
)  # fmt: skip
def test_yes_and_no_within_the_first_four_characters(text, expected):
    assert parse_yes_no(text) == expected


@pytest.fixture
def mme(tmp_path):
    """`count` side by side, `celebrity` in two folders, and what else may lie there."""
    side, apart = tmp_path / "count", tmp_path / "celebrity"
    (apart / "images").mkdir(parents=True)
    (apart / "questions_answers_YN").mkdir()
    side.mkdir()
    (tmp_path / "eval_tool").mkdir()
    for i, suffix in enumerate((".jpg", ".png")):
        Image.new("RGB", (9, 9), (100 * i, 50, 0)).save(side / f"{i}{suffix}")
        Image.new("RGB", (9, 9), (0, 50, 100 * i)).save(apart / "images" / f"tt{i}{suffix}")
        yes, no = f"Are there {i}?  Please answer yes or no.\tYes\n", f"Is it {i}? Please answer yes or no.\tNo"
        (side / f"{i}.txt").write_text(yes + no)
        (apart / "questions_answers_YN" / f"tt{i}.txt").write_text(yes + no + "\n")
    return tmp_path


def test_both_layouts_and_a_worked_example(mme, tmp_path, capsys):
    questions = load_questions(mme)
    assert "eval_tool" in capsys.readouterr().err
    assert [question["id"] for question in questions] == [
        "count/0.jpg/1", "count/0.jpg/2", "count/1.png/1", "count/1.png/2",
        "celebrity/tt0.jpg/1", "celebrity/tt0.jpg/2", "celebrity/tt1.png/1", "celebrity/tt1.png/2",
    ]  # fmt: skip
    assert questions[0]["prompt"] == "Instruction: Are there 0? Please answer yes or no.\nResponse:"
    assert questions[6]["images"] == [mme / "celebrity" / "images" / "tt1.png"]
    said = ["Yes", "no", "Yes", "It is", "no", "no", "yes.", "Yes"]
    # count: three of four right, one of two images: 75 + 50. celebrity: two of four, no image: 50 + 0.
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps(dict(zip([question["id"] for question in questions], said, strict=True))))
    command = ["eval", "mme", "--root", str(mme), "--predictions", str(file)]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    scores = json.loads(captured.out)
    assert scores == {"perception": None, "cognition": None, "count": 125.0, "celebrity": 50.0}
    assert "1 answers are neither yes nor no" in captured.err
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "No total: existence, position" in table
    assert re.search(r"^\| -+ \| -+: \| -+: \| -+: \| -+: \| -+: \|$", table, flags=re.M)  # numbers on the right
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    assert ["count", "75.00", "50.00", "125.00", "1", "4"] in rows
    assert ["celebrity", "50.00", "0.00", "50.00", "0", "4"] in rows
    file.write_text(json.dumps({"count/0.jpg/1": "Yes"}))
    fails(capsys, command, "7 of 8 questions", "count/0.jpg/2")
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--batch-size", "2"])
    assert "--batch-size would do nothing" in capsys.readouterr().err


def test_all_subtasks_have_totals():
    questions = [
        {"id": f"{subtask}{i}", "subtask": subtask, "image": "a.jpg", "expected": "yes"}
        for subtask in (*PERCEPTION, *COGNITION)
        for i in range(2)
    ]
    rows = score_mme(questions, {question["id"]: "yes" for question in questions})
    assert totals({name: row["score"] for name, row in rows.items()}) == {"perception": 2000, "cognition": 800}


def test_what_is_not_mme(mme, tmp_path, capsys):
    def command(root):
        return ["eval", "mme", "--model", "none/such", "--root", root]

    fails(capsys, command(tmp_path / "nothing"), "is no MME", "existence")
    fails(capsys, command(mme / "eval_tool"), "is no MME")
    (mme / "count" / "9.jpg").write_bytes((mme / "count" / "0.jpg").read_bytes())
    with pytest.raises(FileNotFoundError, match="9 has no .txt"):
        load_questions(mme)
    (mme / "count" / "9.txt").write_text("Is it? Yes")
    with pytest.raises(ValueError, match="9.txt must have two lines"):
        load_questions(mme)
    (mme / "count" / "9.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="9 has no image"):
        load_questions(mme)


@pytest.mark.slow
def test_mme_in_a_fresh_process(lavin_folder, mme, tmp_path):  # noqa: F811
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lavin.recipes.cli", "eval", "mme", "--model", lavin_folder, "--root", mme]
    done = subprocess.run([*map(str, command), "--output", tmp_path / "out"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["asked"] == 8 and results["settings"]["max_new_tokens"] == 20
    assert "neither yes nor no" in done.stdout and "samples/s" in done.stdout
    # Each answer is the one that `lavin ask` gives to the same question.
    records = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[1:]]
    question = next(q for q in load_questions(mme) if q["id"] == records[0]["id"])
    from lavin.recipes.ask import ask

    assert ask(lavin_folder, question["prompt"], question["images"], max_new_tokens=20) == records[0]["answer"].strip()
