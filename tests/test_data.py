"""`lavin data`: LaVIN's text, rows of TRL in Parquet, bad entries, nothing stale, and what `trl sft` makes of them."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image
from test_processing import assistant, llama, picture, render, user  # noqa: F401
from test_processing import folders as folders
from training import light, sft  # noqa: F401

from lavin.recipes.cli import main
from lavin.recipes.data.instructions import Instructions, user_turn
from lavin.recipes.data.prepare import prepare
from lavin.recipes.data.records import find, json_rows, keep
from lavin.recipes.data.scienceqa import INPUTS, OUTPUTS, ScienceQA, format_answer, format_question, scienceqa_rows


ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared/scienceqa"  # its licence: not in the repository
FIXTURE = json.loads((ROOT / "tests/fixtures/llama_tokenisation.json").read_text(encoding="utf-8"))


def problem(number: int, **changes) -> dict:
    """A record with all that trips a reader: quotes, braces, several alphabets, newlines."""
    return {
        "question": f'Which {{"{number}"}} é 漢 is it?', "choices": ["a cat", "ein Hund ]", "3"][: 2 + number % 2],
        "answer": number % 2, "hint": ["", "A hint \\ with\nlines."][number % 2],
        "image": "image.png" if number % 3 else None, "task": "closed choice", "grade": "grade3",
        "subject": "natural science", "topic": "t", "category": f"C{number % 2}", "skill": "s",
        "lecture": ["Look.\nTwice.", ""][number // 2 % 2], "solution": ["It is  so.", ""][number // 4 % 2],
        "split": "train", **changes,
    }  # fmt: skip


def colour(path: Path, rgb: tuple = (200, 30, 60), size=(9, 7), mode: str = "RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, rgb).convert(mode).save(path)


def write_scienceqa(root: Path, problems: dict[str, dict], **splits: list[str]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "problems.json").write_text(json.dumps(problems, indent=1, ensure_ascii=False), encoding="utf-8")
    (root / "pid_splits.json").write_text(json.dumps({"val": [], "train": list(problems), **splits}))
    for pid, entry in problems.items():
        if entry.get("image"):
            modes = ["RGB", "P", "L", "RGBA", "1"]
            colour(root / "images" / entry["split"] / pid / "image.png", (10 * int(pid) % 256, 9, 9),
                   mode=modes[int(pid) % 5])  # fmt: skip
    return root


@pytest.fixture
def sqa(tmp_path):
    """A hundred problems, a third without an image; captions for some."""
    root = write_scienceqa(tmp_path / "sqa", {str(n): problem(n) for n in range(1, 101)}, val=["3", "4"])
    captions = {str(n): f"A picture of {n}." for n in range(1, 101, 2)}
    (root / "captions.json").write_text(json.dumps({"version": 1, "captions": captions}))
    return root


def load(pattern: str | Path, cache: Path):
    return load_dataset("parquet", data_files=str(pattern), split="train", cache_dir=str(cache))


def command(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    """`lavin` in a fresh process."""
    line = [sys.executable, "-m", "lavin.recipes.cli", "data", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == code, done.stderr
    return done


def turn_text(row: dict, column: str = "prompt", turn: int = -1) -> str:
    return row[column][turn]["content"][-1]["text"]


# ---- ScienceQA: the text


def published_text(entry: dict, inputs: str, outputs: str, caption: str = "") -> tuple[str, str]:
    """Written from the formats' descriptions alone; a "BECAUSE:" with nothing behind it is dropped."""
    context = (entry["hint"] + " " + caption).strip() or "N/A"
    options = " ".join("({}) {}".format("ABCDE"[i], text) for i, text in enumerate(entry["choices"]))
    lecture, solution = (entry[key].replace("\n", "\\n") for key in ("lecture", "solution"))
    told = {"QCML": lecture, "QCLM": lecture, "QCME": solution, "QCEM": solution,
            "QCMLE": f"{lecture} {solution}", "QCLEM": f"{lecture} {solution}"}.get(inputs, "")  # fmt: skip
    head = {"C": f"Context: {context}\nQuestion: {entry['question']}\n"}.get(
        inputs[0], f"Question: {entry['question']}\nContext: {context}\n"
    )
    because = f"BECAUSE: {told}\n" if told.strip() else ""
    middle = because + f"Options: {options}\n" if inputs[2] in "LE" else f"Options: {options}\n" + because
    letter = f"The answer is {'ABCDE'[entry['answer']]}."
    reason = {"A": "", "AL": lecture, "LA": lecture, "AE": solution, "EA": solution,
              "ALE": f"{lecture} {solution}", "LEA": f"{lecture} {solution}",
              "AEL": f"{solution} {lecture}", "ELA": f"{solution} {lecture}"}[outputs]  # fmt: skip
    answer = f"{letter} BECAUSE: {reason}" if outputs[0] == "A" else f"{reason} {letter}"
    answer = answer if reason.strip() else letter
    return tuple(text.replace("  ", " ").strip() for text in (head + middle + "Response:", answer))


def all_problems() -> list[dict]:
    real = json.loads((REAL / "problems.json").read_text(encoding="utf-8")) if REAL.is_dir() else {}
    return [*(problem(n) for n in range(16)), *real.values()]


@pytest.mark.parametrize("inputs", INPUTS)
def test_every_order_of_inputs_and_outputs(inputs):
    assert len(INPUTS) == 8 and len(OUTPUTS) == 9
    for outputs in OUTPUTS:
        for entry in all_problems():
            for caption in ("", "A caption."):
                found = format_question(entry, inputs, caption), format_answer(entry, outputs)
                assert found == published_text(entry, inputs, outputs, caption)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real problems are not here")
def test_text_is_that_of_the_reference_letter_for_letter():
    problems = json.loads((REAL / "problems.json").read_text(encoding="utf-8"))
    captions = json.loads((REAL / "captions.json").read_text())["captions"]
    rows = [row for row in FIXTURE if row["id"] in problems]
    assert len(rows) == 14
    for row in rows:
        inputs, outputs = row["format"].split("-")
        entry = problems[row["id"]]
        wanted = [format_question(entry, inputs, caption) for caption in ("", captions.get(row["id"], ""))]
        assert row["prompt"] in wanted and row["answer"] == format_answer(entry, outputs)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real problems are not here")
def test_the_real_problems(tmp_path):
    """They come without their images, which is a fault to report; text rows are as they are."""
    made = prepare(ScienceQA(REAL, "train"), tmp_path / "out", "train", skip_bad=True)
    source = json.loads((REAL / "problems.json").read_text(encoding="utf-8"))
    train = json.loads((REAL / "pid_splits.json").read_text())["train"]
    pictured = [pid for pid in train if source[pid]["image"]]
    assert dict(made.skipped) == {"image missing": len(pictured)}
    rows = load(made.pattern, tmp_path / "cache")
    assert sorted(rows["id"]) == sorted(set(train) - set(pictured))
    for row in rows:
        entry = source[row["id"]]
        assert (row["choices"], row["answer"]) == (entry["choices"], entry["answer"])
        text = turn_text(row), turn_text(row, "completion")
        assert text == published_text(entry, "QCM", "ALE")


# ---- ScienceQA: the command


@pytest.mark.slow
def test_scienceqa_command_writes_rows_of_trl(sqa, tmp_path):
    done = command("scienceqa", "--root", sqa, "--split", "train", "--format", "CQM-LEA", "--captions", "--output",
                   tmp_path / "out", "--num-proc", 2)  # fmt: skip
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-00000-of-00001.parquet"]
    assert f"data_files: {tmp_path / 'out'}/train-*.parquet" in done.stdout and "100 rows" in done.stdout
    assert "Preparing train: 100%" in done.stderr
    rows = load(tmp_path / "out/train-*.parquet", tmp_path / "cache")
    assert rows.column_names == ["prompt", "completion", "images", "id", "answer", "choices", "category"]
    assert sorted(map(int, rows["id"])) == list(range(1, 101)) != list(map(int, rows["id"]))
    for row in rows:
        number = int(row["id"])
        entry = problem(number)
        caption = f"A picture of {number}." if number % 2 else ""
        question, answer = published_text(entry, "CQM", "LEA", caption)
        images = [{"type": "image", "text": None}] if entry["image"] else []
        assert row["prompt"] == [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]
        assert row["completion"] == [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        assert [image.size for image in row["images"]] == [(9, 7)] * len(images)
        assert (row["answer"], row["choices"], row["category"]) == (
            entry["answer"], entry["choices"], entry["category"],
        )  # fmt: skip
    # A folder with a list of skipped entries beside the Parquet loads as a whole, too.
    (tmp_path / "out/train-skipped.tsv").write_text("id\tplace\treason\tdetail\n")
    assert len(load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))) == 100


def ids(made, cache) -> list[str]:
    return list(load(made.pattern, cache)["id"])


def test_order_depends_on_the_seed_alone(sqa, tmp_path):
    orders = [
        ids(prepare(ScienceQA(sqa, "train"), tmp_path / f"{i}", "train", seed, processes), tmp_path / "cache")
        for i, (seed, processes) in enumerate([(0, 1), (0, 3), (1, 1)])
    ]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[1]) == sorted(orders[2])


def write_hub_form(sqa: Path, folder: Path) -> list[dict]:
    """The same problems in two Parquet files, as the Hub has them."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    rows = []
    for pid, entry in json.loads((sqa / "problems.json").read_text(encoding="utf-8")).items():
        path = sqa / "images/train" / pid / "image.png"
        image = {"bytes": path.read_bytes(), "path": None} if entry["image"] else None
        rows.append({**{k: v for k, v in entry.items() if k != "split"}, "image": image})
    (folder / "data").mkdir(parents=True)
    for part, some in enumerate((rows[:70], rows[70:])):
        table = Dataset.from_list(some).cast_column("image", ImageFeature())
        table.to_parquet(folder / "data" / f"validation-{part:05}-of-00002-0123456789abcdef.parquet")
    return rows


def test_the_form_on_the_hub_gives_the_same_rows(sqa, tmp_path, capsys):
    root = tmp_path / "hub [1]"  # no pattern
    write_hub_form(sqa, root)
    made = prepare(ScienceQA(root, "val"), tmp_path / "out", "val", num_proc=2)
    rows = {row["id"]: row for row in load(made.pattern, tmp_path / "cache")}
    assert sorted(rows) == sorted(f"validation-{n}" for n in range(100)) and made.files[0].name.startswith("val-")
    for number, official in enumerate(scienceqa_rows(sqa, "train")):
        row = rows[f"validation-{number}"]
        assert len(row["images"]) == len(official["images"])
        for key in set(official) - {"id", "images"}:
            assert row[key] == official[key]
    for more, words in (
        (["--split", "val", "--captions"], "no captions"),
        (["--split", "test"], "it has validation"),
        (["--split", "val", "--format", "QCM"], "QCM-ALE"),
    ):
        assert main(["data", "scienceqa", "--root", str(root), "--output", str(tmp_path / "x"), *more]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("x/*"))


# ---- instructions


def talk(*values: str, **more) -> dict:
    """A LLaVA-Instruct entry; the speakers take turns."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {**more, "conversations": turns}


def instruction_rows(folder: Path, *entries: dict) -> list[dict]:
    colour(folder / "images/cat.jpg")
    colour(folder / "images/dog.jpg", (0, 0, 90))
    (folder / "in.json").write_text(json.dumps(entries))
    source = Instructions([folder / "in.json"], folder / "images")
    source.index(folder)
    return [row for index in range(len(source)) for row in source.rows(index)]


def test_instruction_text_is_that_of_the_reference(tmp_path):
    wanted = [row for row in FIXTURE if row["format"] == "instruction"]
    assert len(wanted) == 3
    rows = instruction_rows(
        tmp_path,
        {"instruction": "Give three tips for staying healthy.", "input": "", "output": "Eat well.\nSleep.\nMove.\n"},
        talk("What is the man holding?\n<image>", " The man is holding a red umbrella.", image="cat.jpg", id="0"),
        {"instruction": "Rewrite the sentence.", "input": "He ran, quickly.", "output": "He ran — fast."},
    )
    for row, expected in zip(rows, wanted, strict=True):
        assert (turn_text(row), turn_text(row, "completion")) == (expected["prompt"], expected["answer"])
        assert len(row["images"]) == expected["has_image"]
    assert [row["id"] for row in rows] == ["in-0", "0", "in-2"]


SLOT = {"type": "image", "text": None}


@pytest.mark.parametrize(
    "text, slots, said",
    [
        ("<image>\nWhat?", 1, "What?"),
        ("What?\n<image>", 1, "What?"),
        ("<image> What?", 1, "What?"),
        ("What? <image>\n", 1, "What?"),
        ("Look.\n<image>\nWhat?", 1, "Look.\nWhat?"),
        ("<image>\n<image>\nWhat?", 2, "What?"),
        ("<image><image>What  else?", 2, "What  else?"),
    ],
)
def test_image_slots_stand_before_the_text(text, slots, said):
    assert user_turn(text)["content"] == [SLOT] * slots + [
        {"type": "text", "text": f"Instruction: {said} \nResponse:"}
    ]


def test_image_slots_within_a_sentence_stay_there(llama, monkeypatch):  # noqa: F811
    """In the rows, and for a model that reads them so."""
    parts = user_turn("Is <image> like <image>?")["content"]
    assert [part["text"] for part in parts] == ["Instruction: Is", None, "like", None, "? \nResponse:"]
    parts = [part | {"image": picture()} if part["type"] == "image" else part for part in parts]
    message = {"role": "user", "content": parts}
    assert "Image: <image><image> Instruction: Is like ? \nResponse:" in render(llama, message)
    monkeypatch.setattr(llama, "image_order", "interleaved")
    assert "Instruction: Is <image> like <image> ? \nResponse:" in render(llama, message)


def test_a_talk_is_one_row_per_answer(tmp_path):
    entry = talk("<image>\nWho?", "A cat.", "And\n<image>?", "A dog.", "Why?", "<image> knows.",
                 image=["cat.jpg", "dog.jpg"], id=7)  # fmt: skip
    entry["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    rows = instruction_rows(tmp_path, entry)
    assert [row["id"] for row in rows] == ["7-1", "7-2", "7-3"]
    assert [len(row["images"]) for row in rows] == [1, 2, 2]
    assert [turn["role"] for turn in rows[2]["prompt"]] == ["system", *["user", "assistant"] * 2, "user"]
    assert rows[2]["prompt"][:-1] == [*rows[1]["prompt"], *rows[1]["completion"]]
    assert turn_text(rows[2], "completion") == "<image> knows."  # an answer's words are words


def test_a_talk_through_trls_own_tokenisation(llama, tmp_path):  # noqa: F811
    """Prompt and completion apart give the ids of the whole talk; only the last answer and EOS are learnt."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    rows = instruction_rows(
        tmp_path, talk("<image>\nWho?", "A cat.", "Where?", "On a mat.", image="cat.jpg"), talk("Hi.", "Hello.")
    )
    examples = [{**row, "images": [Image.open(io.BytesIO(image["bytes"])) for image in row["images"]]} for row in rows]
    collator = DataCollatorForVisionLanguageModeling(processor=llama, completion_only_loss=True)
    batch = collator([{**example} for example in examples])
    whole = render(
        llama, user(picture(), "Instruction: Who? \nResponse:"), assistant("A cat."),
        user("Instruction: Where? \nResponse:"), assistant("On a mat."),
    )  # fmt: skip
    assert whole == (
        "<s> Image: <image> Instruction: Who? \nResponse:A cat.</s> Instruction: Where? \nResponse:On a mat.</s>"
    )
    expected = llama(text=[whole], images=[[picture()]], add_special_tokens=False)["input_ids"][0]
    found = batch["input_ids"][1][batch["attention_mask"][1] == 1].tolist()
    assert found == expected
    learnt = [[label for label in labels.tolist() if label != -100] for labels in batch["labels"]]
    for labels, answer in zip(learnt, ("A cat.", "On a mat.", "Hello."), strict=True):
        assert llama.decode(labels) == f"{answer}</s>"
    assert len(batch["pixel_values"]) == 2


@pytest.mark.slow
def test_instructions_command_mixes_files_and_formats(tmp_path):
    colour(tmp_path / "images/cat.jpg")
    (tmp_path / "alpaca.json").write_text(
        json.dumps([{"instruction": "Write <image> in HTML.", "input": "", "output": "<img>"}])
    )
    lines = [talk("<image>\nA?", "a", "B?", "b", image="cat.jpg", id="é"), talk("No mention?", "c", image="cat.jpg")]
    (tmp_path / "llava.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    arguments = ["--input", tmp_path / "alpaca.json", "--input", tmp_path / "llava.jsonl"]
    arguments += ["--output", tmp_path / "out"]
    assert "--image-root" in command("instructions", *arguments, code=2).stderr
    command("instructions", *arguments, "--image-root", tmp_path / "images")
    rows = {row["id"]: row for row in load(tmp_path / "out/train-*.parquet", tmp_path / "cache")}
    assert sorted(rows) == ["alpaca-0", "llava-1", "é-1", "é-2"]
    assert rows["alpaca-0"]["images"] == [] and "Write <image> in" in turn_text(rows["alpaca-0"])
    unmentioned = rows["llava-1"]
    assert unmentioned["prompt"][0]["content"][0] == SLOT and unmentioned["images"][0].size == (9, 7)
    assert set(rows["é-1"]) == {"prompt", "completion", "images", "id"}


# ---- what is in the folder before and after


def test_rows_of_one_talk_share_their_image_in_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    Image.effect_noise((200, 200), 90).save(tmp_path / "images/cat.jpg")
    size = (tmp_path / "images/cat.jpg").stat().st_size
    values = [f"{i}?" for i in range(20)]
    (tmp_path / "in.json").write_text(json.dumps([talk(*values, image="cat.jpg")]))
    made = prepare(Instructions([tmp_path / "in.json"], tmp_path / "images"), tmp_path / "out", "train")
    assert made.images == 10 and made.files[0].stat().st_size < 2 * size


# ---- memory


def test_entries_are_what_json_reads(sqa, tmp_path):
    content = json.loads((sqa / "problems.json").read_text(encoding="utf-8"))
    table = keep(json_rows, tmp_path / "scratch", path=sqa / "problems.json", at="")
    assert {row["key"]: json.loads(row["entry"]) for row in table} == content and table.cache_files
    at = find(table, np.array(["7", "none", "100"]))
    assert at[1] == -1 and [json.loads(table[int(n)]["entry"]) for n in at[[0, 2]]] == [content["7"], content["100"]]
    captions = list(json_rows(sqa / "captions.json", at="captions"))
    assert {row["key"]: json.loads(row["entry"]) for row in captions} == json.loads(
        (sqa / "captions.json").read_text()
    )["captions"]
    # Letters and numbers of all sorts, behind a byte order mark; of two entries with one key the last counts.
    text = ' [-3.5e1, 0.1, 1.234567890123456789, 1e400, -0.0, 12345678901234567890, "\\u00e9\\"]\\ud83d", [],{"a":{}}]'
    (tmp_path / "list.json").write_text(text, encoding="utf-8-sig")
    found = [json.loads(row["entry"]) for row in json_rows(tmp_path / "list.json")]
    assert repr(found) == repr(json.loads(text))
    (tmp_path / "twice.json").write_text('{"a": 1, "b": 2, "a": 3}')
    table = keep(json_rows, tmp_path / "scratch", path=tmp_path / "twice.json", at="")
    assert find(table, np.array(["b", "a"])).tolist() == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scienceqa", "instructions"])
def test_memory_does_not_grow_with_the_rows(kind, tmp_path):
    """The script that the README's numbers come from, smaller: 45,000 rows more, held as objects, are over 100 MB."""
    line = [sys.executable, "-m", "lavin.recipes.data.memory", "--kinds", kind, "--rows", "5000", "50000",
            "--num-proc", "1", "--folder", str(tmp_path), "--json"]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout.splitlines()[-1])
    assert (small["rows"], large["rows"]) == (5000, 50000) and small["peak_mb"] > 100
    assert large["peak_mb"] - small["peak_mb"] < 40


# ---- `trl sft`


@pytest.mark.slow
def test_trl_trains_on_the_output_of_each_command(light, tmp_path):  # noqa: F811
    root = write_scienceqa(tmp_path / "sqa", {str(n): problem(n) for n in range(1, 17)})
    command("scienceqa", "--root", root, "--output", tmp_path / "sqa-rows")
    colour(tmp_path / "cat.jpg")
    entries = [talk("<image>\nWho?", "A cat.", "Why?", "So.", image="cat.jpg"), talk("Hi.", "Hello.")] * 4
    (tmp_path / "in.json").write_text(json.dumps(entries))
    command("instructions", "--input", tmp_path / "in.json", "--image-root", tmp_path, "--output", tmp_path / "rows")
    shutil.rmtree(root)
    one, two = (str(tmp_path / name / "train-*.parquet") for name in ("sqa-rows", "rows"))
    for name, patterns in (("scienceqa", [one]), ("instructions", [two]), ("both", [one, two])):
        sources = [{"path": "parquet", "data_files": pattern} for pattern in patterns]
        losses, _ = sft(light, tmp_path / name, Path(one), datasets=sources, max_steps=2)
        assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


@pytest.mark.slow
def test_messages_rows_need_no_preparation(light, tmp_path):  # noqa: F811
    from datasets import Dataset, List
    from datasets import Image as ImageFeature

    rows = [
        {
            "messages": [user(*[None] * (n % 2), "Who?\nResponse:"), assistant("A cat.")],
            "images": [picture()] * (n % 2),
        }
        for n in range(8)
    ]
    for row in rows:
        row["messages"][0]["content"] = [
            {"type": p["type"], "text": p.get("text")} for p in row["messages"][0]["content"]
        ]
    path = tmp_path / "messages.parquet"
    Dataset.from_list(rows).cast_column("images", List(ImageFeature())).to_parquet(path)
    losses, _ = sft(light, tmp_path / "run", path, max_steps=2, assistant_only_loss=True)
    assert len(losses) == 2
