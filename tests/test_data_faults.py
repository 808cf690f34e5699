"""`lavin data` on bad entries, broken files, dying workers and folders that hold something already."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_data import colour, ids, load, problem, sqa, talk, turn_text, write_scienceqa  # noqa: F401  (a fixture)
from test_processing import assistant, llama, picture, render, user  # noqa: F401
from test_processing import folders as folders

from lavin.recipes.cli import main
from lavin.recipes.data.instructions import Instructions
from lavin.recipes.data.prepare import prepare
from lavin.recipes.data.records import json_rows, keep, line_rows
from lavin.recipes.data.rows import ShardWriter
from lavin.recipes.data.scienceqa import ScienceQA


def broken_scienceqa(fault: str, root: Path):
    """One faulty problem, number 5, among six."""
    problems = {str(n): problem(n) for n in range(1, 7)}
    changes = {
        "answer out of range": {"answer": 3}, "no choices": {"choices": []}, "missing keys": {"hint": None},
        "not a text": {"lecture": 3}, "too many choices": {"choices": list("ABCDEFGHIJK")},
    }  # fmt: skip
    problems["5"].update(changes.get(fault, {}))
    write_scienceqa(root, problems)
    image = root / "images/train/5/image.png"
    if fault == "image missing":
        image.unlink()
    elif fault == "image unreadable":
        colour(image, size=(300, 300))
        image.write_bytes(image.read_bytes()[:-40])  # the header is whole
    elif fault == "not in problems.json":
        (root / "problems.json").write_text(json.dumps({k: v for k, v in problems.items() if k != "5"}))
    return ["scienceqa", "--root", str(root)]


def broken_instructions(fault: str, root: Path):
    bad = {
        "empty answer": talk("<image>\nA?", " ", image="cat.jpg"),
        "empty question": talk("<image>", "a", image="cat.jpg"),
        "turns do not alternate": talk("A?", "a", "B?"),
        "unknown speaker": {"conversations": [{"from": "x", "value": ""}]},
        "images and <image> differ": talk("<image>\nA?", "a"),
        "not an object": ["A?"],
        "image missing": talk("<image>\nA?", "a", image="none.jpg"),
        "missing keys": {"instruction": "A?"},
        "not a text": talk("A?", "half a character: \ud83d"),
    }
    entries = [talk("A?", "a", id=str(n)) for n in range(1, 7)]
    entries[4] = {**bad[fault], "id": "5"} if isinstance(bad[fault], dict) else bad[fault]
    colour(root / "cat.jpg")
    (root / "in.json").write_text(json.dumps(entries))
    return ["instructions", "--input", str(root / "in.json"), "--image-root", str(root)]


SCIENCEQA_FAULTS = [
    "answer out of range", "no choices", "missing keys", "not a text", "too many choices", "image missing",
    "image unreadable", "not in problems.json",
]  # fmt: skip


INSTRUCTION_FAULTS = [
    "empty answer", "empty question", "turns do not alternate", "unknown speaker", "images and <image> differ",
    "not an object", "image missing", "missing keys", "not a text",
]  # fmt: skip


@pytest.mark.parametrize(
    "broken, fault",
    [*((broken_scienceqa, f) for f in SCIENCEQA_FAULTS), *((broken_instructions, f) for f in INSTRUCTION_FAULTS)],
)
def test_a_bad_entry_stops_or_is_listed(broken, fault, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["data", *broken(fault, tmp_path), "--output", str(out)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    pid = "in-4" if fault == "not an object" else "5"
    assert f"entry {pid} (" in error and fault in error and "--skip-bad" in error and "Traceback" not in error
    assert not list(out.iterdir())
    assert main([*arguments, "--skip-bad", "--num-proc", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"Skipped 1 of 6 entries: 1 {fault}" in shown and f"{pid} (" in shown
    listed = [line.split("\t") for line in (out / "train-skipped.tsv").read_text().splitlines()]
    assert listed[0] == ["id", "place", "reason", "detail"] and [listed[1][0], listed[1][2]] == [pid, fault]
    assert sorted(load(out / "train-*.parquet", tmp_path / "cache")["id"]) == sorted("123456".replace("5", ""))


def test_many_bad_entries_are_all_listed_and_none_left_is_an_error(tmp_path, capsys):
    root = write_scienceqa(
        tmp_path / "sqa", {str(n): problem(n, image=None, answer=9 * (n > 2)) for n in range(1, 50)}
    )
    arguments = ["data", "scienceqa", "--root", str(root), "--output", str(tmp_path / "out"), "--skip-bad"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("answer out of range: 9") == 20 and "... and 27 more" in shown
    assert len((tmp_path / "out/train-skipped.tsv").read_text().splitlines()) == 48
    # Repaired: the list of the earlier run is gone. Nothing left: an error, and the earlier run's rows are kept.
    write_scienceqa(root, {str(n): problem(n, image=None) for n in range(1, 50)})
    assert main(arguments) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-00000-of-00001.parquet"]
    write_scienceqa(root, {str(n): problem(n, image=None, answer=9) for n in range(1, 50)})
    assert main(arguments) == 2
    assert "None of the 49 entries" in capsys.readouterr().err
    assert len(load(tmp_path / "out/train-*.parquet", tmp_path / "cache")) == 49


@pytest.mark.parametrize("text", ['{"1": {"question": "a', '{"1": {"a": 1} "2": 3}', "[1, 2]", "nothing", ""])
def test_broken_files_are_explained(text, sqa, tmp_path, capsys):
    (sqa / "problems.json").write_text(text)
    assert main(["data", "scienceqa", "--root", str(sqa), "--output", str(tmp_path / "out")]) == 2
    assert "problems.json" in capsys.readouterr().err
    (tmp_path / "in.json").write_text(text)
    if text != "[1, 2]":
        assert (
            main(["data", "instructions", "--input", str(tmp_path / "in.json"), "--output", str(tmp_path / "o")]) == 2
        )
        assert "in.json" in capsys.readouterr().err


def test_a_worker_that_dies_is_an_error_and_leaves_nothing(sqa, tmp_path, monkeypatch):
    monkeypatch.setattr(ScienceQA, "rows", lambda self, index: os._exit(9))
    with pytest.raises(OSError, match="--num-proc"):
        prepare(ScienceQA(sqa, "train"), tmp_path / "out", "train", num_proc=2)
    assert not list((tmp_path / "out").iterdir())


def test_moved_and_changed_sources(sqa, tmp_path):
    """Prepared again, the changed image and text are loaded, from the same cache; then without the source."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    arguments = ScienceQA(sqa, "train"), out, "train"
    pattern = prepare(*arguments).pattern
    first = {row["id"]: row for row in load(pattern, cache)}
    colour(sqa / "images/train/2/image.png", (1, 2, 3))
    problems = json.loads((sqa / "problems.json").read_text(encoding="utf-8"))
    problems["4"]["question"] = "Something else?"
    (sqa / "problems.json").write_text(json.dumps(problems))
    prepare(*arguments)
    shutil.rmtree(sqa)
    second = {row["id"]: row for row in load(pattern, cache)}
    assert first["2"]["images"][0].getpixel((0, 0)) != (1, 2, 3) == second["2"]["images"][0].getpixel((0, 0))
    assert "Something else?" in turn_text(second["4"]) and "Something else?" not in turn_text(first["4"])
    assert first["5"]["images"][0].tobytes() == second["5"]["images"][0].tobytes()
    out.rename(tmp_path / "moved")
    moved = load(tmp_path / "moved/train-*.parquet", tmp_path / "cache2")
    assert all(image.size == (9, 7) for row in moved for image in row["images"])


def test_earlier_files_are_replaced_foreign_ones_refused(sqa, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("lavin.recipes.data.prepare.ShardWriter", lambda name: ShardWriter(name, shard_bytes=4000))
    monkeypatch.setattr("lavin.recipes.data.rows.ROW_GROUP", 2000)
    many = prepare(ScienceQA(sqa, "train"), out, "train")
    assert len(many.files) > 3 and many.files[-1].name.endswith(f"-of-{len(many.files):05}.parquet")
    ordered = ids(many, tmp_path / "cache")
    monkeypatch.undo()
    one = prepare(ScienceQA(sqa, "train"), out, "train")
    prepare(ScienceQA(sqa, "val"), out, "val")
    assert sorted(path.name for path in out.iterdir()) == [
        "train-00000-of-00001.parquet", "val-00000-of-00001.parquet",
    ]  # fmt: skip
    assert ids(one, tmp_path / "cache") == ordered
    foreign = load(one.pattern, tmp_path / "cache")
    foreign.to_parquet(str(out / "train-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match="was not written by `lavin data`"):
        prepare(ScienceQA(sqa, "train"), out, "train")
    assert len(load(one.pattern, tmp_path / "cache")) == 100


@pytest.mark.slow
def test_a_killed_run_leaves_no_rows_that_look_complete(sqa, tmp_path):
    out = tmp_path / "out"
    code = """
        import os, sys
        from lavin.recipes.data import prepare
        from lavin.recipes.data.scienceqa import ScienceQA
        batches = []
        whole = prepare.work
        prepare.BATCH = 8
        prepare.work = lambda *a: (batches.append(1), len(batches) > 5 and os._exit(9), whole(*a))[-1]
        prepare.prepare(ScienceQA(sys.argv[1], "train"), sys.argv[2], "train")
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(sqa), str(out)], capture_output=True)
    assert done.returncode == 9
    assert [path.name for path in out.iterdir()] == [".train.partial"] and not list(out.glob("*.parquet"))
    made = prepare(ScienceQA(sqa, "train"), out, "train")
    assert made.rows == 100 and [path.name for path in out.iterdir()] == ["train-00000-of-00001.parquet"]


def test_empty_and_broken_parts(sqa, tmp_path):
    """A list without entries is one; a broken line is a bad entry; a broken list is a broken file, and where."""
    (tmp_path / "empty.json").write_text("[]")
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(b'{"instruction": "A?", "output": "a"}\n\n{"instruction": \n{"id": "\xff"}\n')
    source = Instructions([tmp_path / "empty.json", lines, lines])
    source.index(tmp_path / "scratch")
    assert [source.place(n) for n in (0, 2, 3)] == ["lines.jsonl[0]", "lines.jsonl[2]", "lines.jsonl[0]"]
    made = prepare(source, tmp_path / "out", "train", skip_bad=True)
    assert (made.rows, dict(made.skipped)) == (2, {"not JSON": 4}) and len(list(line_rows(lines))) == 3
    (sqa / "captions.json").write_text('{"captions": {}}')
    assert prepare(ScienceQA(sqa, "train", use_caption=True), tmp_path / "out", "train").rows == 100
    (sqa / "captions.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="captions.json holds no object called 'captions'"):
        prepare(ScienceQA(sqa, "train", use_caption=True), tmp_path / "out", "train")
    (tmp_path / "in.json").write_text(f'[{"0, " * 40000}{{"a" 1}}]')
    with pytest.raises(ValueError, match=r"in\.json is no JSON file.* at 12000\d"):
        keep(json_rows, tmp_path / "scratch", path=tmp_path / "in.json")
