"""`lavin eval own`: a YAML names Parquet, prompt and metric; plain columns, and the rows that `lavin data` writes."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image
from test_evaluate import data, fails, lavin_folder  # noqa: F401  (fixtures)

from lavin.recipes import cli
from lavin.recipes.cli import main
from lavin.recipes.data.rows import write_parquet
from lavin.recipes.data.scienceqa import scienceqa_rows
from lavin.recipes.evaluate.own import FIELDS, METRICS, is_right, load_questions, read_config


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def task(tmp_path):
    """Writes a task and its Parquet, and returns the YAML's path."""

    def write(rows, **config):
        if rows is not None:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({"data": "rows.parquet", **config}))
        return file

    return write


def test_plain_columns_with_a_template(task, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "b.png").write_bytes(png("blue"))
    rows = [
        {
            "question": "What?",
            "choices": ["red", "blue"],
            "right": "B",
            "picture": {"bytes": png("red"), "path": None},
        },
        {"question": "Who?", "choices": ["x", "y", "z"], "right": "2", "picture": None},
        {"question": "Why?", "choices": ["q"], "right": "A", "picture": {"bytes": None, "path": "pictures/b.png"}},
    ]
    config = read_config(task(rows, metric="letter", prompt="Q: {question}\nOptions: {options}\nResponse:",
                              answer="right", images="picture", group="question"))  # fmt: skip
    first, second, third = load_questions(config)
    assert first["prompt"] == "Q: What?\nOptions: (A) red (B) blue\nResponse:"
    assert first["images"] == [png("red")] and second["images"] == [] and first["group"] == "What?"
    assert third["images"] == [tmp_path / "pictures" / "b.png"]
    assert [q["expected"] for q in (first, second, third)] == [1, 2, 0] and second["choices"] == 3
    assert config["name"] == "mine" and len({q["id"] for q in (first, second, third)}) == 3


@pytest.mark.parametrize(
    "metric, answer, expected, right",
    [
        ("exact", " A red  circle.\n", "a Red circle", True),
        ("exact", "A red circle, I think", "A red circle", False),
        ("contains", "I see a red circle here.", "Red circle", True),
        ("contains", "I see a red circled thing.", "red circle", False),
        ("contains", "C++? C++!", "c++", True),
        ("letter", "The answer is B.", 1, True),
        ("letter", "B", 1, False),
    ],
)
def test_metrics(metric, answer, expected, right):
    assert is_right(answer, {"expected": expected, "choices": 2}, metric) is right


def test_rows_of_lavin_data(lavin_folder, data, task, tmp_path, capsys):  # noqa: F811
    """The rows that training takes, asked again: the score is that of `lavin eval scienceqa`, by category."""
    write_parquet(scienceqa_rows(data, "test"), tmp_path / "rows.parquet")
    file = task(None, metric="letter", group="category", max_new_tokens=12)
    options = ["--model", str(lavin_folder), "--output"]
    assert main(["eval", "own", "--config", str(file), *options, str(tmp_path / "own")]) == 0
    shown = capsys.readouterr().out
    assert "mine, 30 questions, percent right (letter)" in shown and "answers name no choice" in shown
    own = json.loads((tmp_path / "own" / "results.json").read_text())
    root = ["--root", str(data), "--max-new-tokens", "12"]
    assert main(["eval", "scienceqa", *root, *options, str(tmp_path / "sqa")]) == 0
    scienceqa = json.loads((tmp_path / "sqa" / "results.json").read_text())
    assert list(own["scores"]) == ["digit", "drawing", "text", "AVG"]
    assert own["scores"]["AVG"] == scienceqa["scores"]["AVG"] and own["unparsable"] == scienceqa["unparsable"]
    by_id = [
        {r["id"]: r["answer"] for r in map(json.loads, (tmp_path / name / "predictions.jsonl").open()) if "id" in r}
        for name in ("own", "sqa")
    ]
    assert by_id[0] == by_id[1] and len(by_id[0]) == 30
    # A pattern stands for its files; rows that share an id, as the turns of a talk do, are told apart.
    rows = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    (tmp_path / "shards").mkdir()
    for name in "ab":
        table = pyarrow.Table.from_pylist(rows[:3])
        pyarrow.parquet.write_table(table, tmp_path / "shards" / f"{name}.parquet")
    shards = load_questions(read_config(task(None, metric="letter", data="shards/?.parquet")))
    assert [question["id"] for question in shards] == list("012345") and shards[0]["images"] == shards[3]["images"]
    # Without another word the whole completion is what is expected: its text, word for word.
    exact = load_questions(read_config(task(None, metric="exact")))
    assert exact[0]["expected"].startswith("The answer is ") and "BECAUSE" in exact[0]["expected"]


def test_what_a_task_may_not_say(task, tmp_path, capsys):
    rows = [{"question": "What?", "answer": "x"}]
    prompt = "{question}"

    def command(*arguments, **config):
        return ["eval", "own", "--model", "none/such", "--config", task(*arguments, **config)]

    fails(capsys, command(rows), "metric must be given")
    fails(capsys, command(rows, metric="bleu"), "exact, letter, contains", "'bleu'")
    fails(capsys, command(rows, metric="exact", promt="x"), "unknown promt")
    fails(capsys, command(rows, metric="exact", data="no.parquet"), "there is no file", "no.parquet")
    fails(capsys, command(rows, metric="exact"), "no column 'prompt'", "template")
    fails(capsys, command(rows, metric="exact", prompt="{questoin}"), "cannot be filled", "questoin")
    fails(capsys, command(rows, metric="exact", prompt=prompt, answer="right"), "no column 'right'")
    fails(capsys, command(rows, metric="letter", prompt=prompt), "no column 'choices'")
    fails(capsys, [*command(rows, metric="exact", prompt=prompt), "--mode", "letters"], "is for the metric `letter`")
    wrong = [{**rows[0], "choices": ["a"]}]
    fails(capsys, command(wrong, metric="letter", prompt=prompt), "'x' is no letter or index of 1 choices")
    many = [{**rows[0], "choices": ["a"] * 11, "answer": 0}]
    fails(capsys, command(many, metric="letter", prompt=prompt), "row 0: 11 choices", "letters for 10")
    fails(capsys, command(many, metric="exact", prompt="{options}"), "row 0: 11 choices")
    unknown = [{**wrong[0], "answer": "A"}, {**rows[0], "choices": None}]
    fails(capsys, command(unknown, metric="letter", prompt=prompt), "row 1: it has no choices")
    fails(capsys, command(wrong, metric="letter", prompt=prompt, choices=None), "row 0: it has no choices")
    for answer in (None, " "):
        for metric in ("exact", "contains", "letter"):
            silent = [{**wrong[0], "answer": "A"}, {**wrong[0], "answer": answer}]
            fails(capsys, command(silent, metric=metric, prompt=prompt), "row 1: the expected answer is empty")
    empty = pyarrow.Table.from_pylist(rows).slice(0, 0)
    pyarrow.parquet.write_table(empty, tmp_path / "rows.parquet")
    fails(capsys, command(None, metric="exact", prompt=prompt), "no rows")
    (tmp_path / "mine.yaml").write_text("a: [")
    fails(capsys, ["eval", "own", "--model", "none/such", "--config", tmp_path / "mine.yaml"], "is no YAML")


@pytest.mark.slow
def test_own_task_in_a_fresh_process(lavin_folder, task, tmp_path):  # noqa: F811
    rows = [{"question": f"Which digit is {i}?", "answer": "it"} for i in range(3)]
    file = task(rows, metric="contains", prompt="Question: {question}\nContext: N/A\nResponse:", max_new_tokens=8)
    command = [sys.executable, "-m", "lavin.recipes.cli", "eval", "own", "--model", lavin_folder, "--config", file]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "mine, 3 questions, percent right (contains)" in done.stdout
    assert (tmp_path / "outputs" / "eval" / "mine" / "results.json").is_file()


def test_what_the_readme_says_is_understood():
    """Its YAML has known keys only, and each of its commands is one."""
    readme = (Path(cli.__file__).parent / "evaluate" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", readme, flags=re.M | re.S)
    assert set(yaml.safe_load(block)) <= set(FIELDS) and yaml.safe_load(block)["metric"] in METRICS
    lines = "".join(re.findall(r"^```bash\n(.*?)^```$", readme, flags=re.M | re.S)).replace("\\\n", "").splitlines()
    assert len(lines) == 10
    for line in lines:
        cli.build_parser().parse_args(shlex.split(line)[1:])
