"""ScienceQA's scores: the official table by hand, letters and indices, predictions that do not fit."""

import json
import subprocess
from pathlib import Path

import pytest
from test_evaluate import COLUMNS, COMMAND, fails, score_arguments

from lavin.recipes.cli import main
from lavin.recipes.data.scienceqa import read_scienceqa
from lavin.recipes.evaluate.scienceqa import parse_letter, score_scienceqa, to_choice


REAL = Path(__file__).parents[2] / "shared" / "scienceqa"
# The worked example: eight questions and their groups, counted by hand from tools/evaluate_acc.py's definitions.
#    subject   grade  hint image choices answer
EXAMPLE = {
    "11": ("natural science", "grade1", "h", None, 2, 0),
    "12": ("natural science", "grade6", "", "image.png", 4, 2),
    "13": ("natural science", "grade7", "h", "image.png", 3, 1),
    "14": ("social science", "grade12", "", None, 2, 1),
    "15": ("social science", "grade10", "", "image.png", 4, 3),
    "16": ("language science", "grade2", "", None, 5, 4),
    "17": ("language science", "grade11", "h", None, 2, 0),
    "18": ("natural science", "grade3", "", None, 3, 2),
}


PREDICTED = {
    "11": 0,  # right
    "12": "The answer is C. BECAUSE: the answer is A.",  # right: the first counts
    "13": "The answer is D.",  # a letter outside the three choices
    "14": "1",  # right: an index as text
    "15": 2,  # wrong
    "16": "E",  # no "The answer is"
    "17": "",  # nothing
    "18": "It melts. The answer is C",  # right
}


#   NAT 11 12 -13 18: 3/4; SOC 14 -15: 1/2; LAN -16 -17: 0/2; TXT 11 -13 -17: 1/3; IMG 12 -13 -15: 1/3;
#   NO 14 -16 18: 2/3; G1-6 11 12 -16 18: 3/4; G7-12 -13 14 -15 -17: 1/4; AVG 4/8
BY_HAND = dict(zip(COLUMNS, [75.0, 50.0, 0.0, 33.33, 33.33, 66.67, 75.0, 25.0, 50.0], strict=True))


@pytest.fixture
def example(tmp_path):
    problems = {
        pid: {"subject": s, "grade": g, "hint": h, "image": i, "choices": ["x"] * n, "answer": a, "split": "test",
              "question": "Q?", "lecture": "", "solution": "", "category": "c"}
        for pid, (s, g, h, i, n, a) in EXAMPLE.items()
    }  # fmt: skip
    problems["19"] = {**problems["11"], "split": "train"}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    splits = {"test": list(EXAMPLE), "train": ["19"], "natural": ["11", "18"]}
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    (tmp_path / "predictions.json").write_text(json.dumps(PREDICTED))
    return tmp_path


def test_the_official_table_by_hand(example, capsys):
    assert main([*score_arguments(example), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1 and json.loads(captured.out) == BY_HAND
    assert list(json.loads(captured.out)) == COLUMNS
    assert "3 of 8 answers name no choice; they count as wrong." in captured.err
    assert main([*score_arguments(example), "--output", str(example / "out")]) == 0
    table = capsys.readouterr().out
    assert "| 75.00 | 50.00 | 0.00 | 33.33 | 33.33 | 66.67 | 75.00 | 25.00 | 50.00 |" in table
    assert (example / "out" / "results.md").read_text() == table
    assert json.loads((example / "out" / "results.json").read_text())["scores"] == BY_HAND


def test_predictions_that_do_not_fit(example, capsys):
    file = example / "other.json"

    def write(content):
        file.write_text(json.dumps(content))
        return score_arguments(example, file="other.json")

    fails(capsys, write({pid: 0 for pid in EXAMPLE if pid != "14"}), "1 of 8 questions", "the first is 14")
    fails(capsys, write({**PREDICTED, "99": 0}), "belong to no question", "'99'")
    fails(capsys, write([0, 1]), "one JSON object", "list")
    file.write_text("{")
    fails(capsys, score_arguments(example, file="other.json"), "is no JSON")
    fails(capsys, score_arguments(example, file="nothing.json"), "There is no file")
    fails(capsys, score_arguments(example, split="val"), "no split 'val'")
    # Answers of another split of the same data do no harm; neither does the form of ScienceQA's own tools.
    assert main(write({"results": {**PREDICTED, "19": 1}})) == 0
    # A group without questions has no accuracy. (The official scorer divides by zero.)
    assert main([*score_arguments(example, split="natural"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["SOC"] is None and scores["NAT"] == 100.0
    # A score that Python wrote as NaN names no choice.
    assert main([*write({**PREDICTED, "12": float("nan")}), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["AVG"] == 37.5 and "4 of 8 answers name no choice" in captured.err
    # Nothing is asked: what says how to ask is no use.
    for option in ("--mode letters", "--format QCM-A", "--captions", "--batch-size 2", "--dtype float32",
                   "--max-new-tokens 9"):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main([*score_arguments(example), *option.split()])
        assert f"{option.split()[0]} would do nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, choices, expected",
    [
        ("The answer is A.", 2, 0),
        (" The answer is B. BECAUSE: The answer is A.", 2, 1),
        ("Sun and moon. The answer is (C).", 3, 2),
        ("The answer is C.", 2, None),
        ("The answer is Because", 5, None),
        ("The answer is", 5, None),
        ("the answer is A.", 5, None),
        ("A", 5, None),
        ("", 5, None),
    ],
)
def test_letters(text, choices, expected):
    assert parse_letter(text, choices) == expected == to_choice(text, choices)


@pytest.mark.parametrize("value, expected", [(1, 1), ("1", 1), (1.0, 1), (2, None), (-1, None), (None, None),
                                             (True, None), (0.5, None), ([1], None), (float("nan"), None),
                                             (float("inf"), None), ("9" * 5000, None)])  # fmt: skip
def test_indices(value, expected):
    assert to_choice(value, 2) == expected


@pytest.mark.skipif(not REAL.is_dir(), reason="needs real ScienceQA problems beside the checkout")
@pytest.mark.parametrize("split", ["test", "train"])
def test_real_problems(split):
    """Against plain counting over the real records: every third prediction is wrong, every seventh names nothing."""
    problems = read_scienceqa(REAL, split)
    predictions, right = {}, []
    for i, (pid, problem) in enumerate(problems.items()):
        n, a = len(problem["choices"]), problem["answer"]
        predictions[pid] = (
            "I do not know." if i % 7 == 0 else (a + 1) % n if i % 3 == 0 else f"The answer is {'ABCDE'[a]}."
        )
        right.append(i % 7 != 0 and (i % 3 != 0 or n == 1))
    records = list(problems.values())

    def count(*keep):
        return f"{100 * sum(r for r, k in zip(right, keep, strict=True) if k) / sum(keep):.2f}"

    hint, image = [p["hint"] != "" for p in records], [p["image"] is not None for p in records]
    grade, subject = [int(p["grade"][5:]) for p in records], [p["subject"].split()[0] for p in records]
    expected = [count(*(s == name for s in subject)) for name in ("natural", "social", "language")]
    expected += [count(*hint), count(*image), count(*(not (h or i) for h, i in zip(hint, image, strict=True)))]
    expected += [count(*(g <= 6 for g in grade)), count(*(g > 6 for g in grade)), count(*([True] * len(grade)))]
    scores, unparsable = score_scienceqa(problems, predictions)
    assert [f"{scores[name]:.2f}" for name in COLUMNS] == expected
    assert unparsable == -(-len(problems) // 7)


@pytest.mark.slow
def test_scoring_in_a_fresh_process(example):
    command = [*COMMAND, *score_arguments(example)[1:], "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == BY_HAND and done.stdout.count("\n") == 1
