"""`lavin eval scienceqa`: the official table, and answers that depend on nothing but model and question."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import AutoModel, GenerationConfig

from lavin.recipes import load
from lavin.recipes.ask import ask
from lavin.recipes.cli import main
from lavin.recipes.data.scienceqa import LETTERS, read_scienceqa
from lavin.recipes.evaluate import answers as core
from lavin.recipes.evaluate.answers import answer, read_image, render
from lavin.recipes.evaluate.letters import letter_batches
from lavin.recipes.evaluate.run import ask_model
from lavin.recipes.evaluate.scienceqa import load_questions
from lavin.recipes.harness import TASKS
from lavin.recipes.init import init_folder
from lavin.recipes.load import default_device, default_dtype, eos_token_ids, load_model
from lavin.recipes.quickstart.data import write_dataset
from lavin.recipes.quickstart.quickstart import TAPS, TINY
from lavin.recipes.serve.answer import AnswerText
from lavin.recipes.serve.batch import Row
from lavin.recipes.serve.batcher import Batcher


COLUMNS = ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "AVG"]
COMMAND = [sys.executable, "-m", "lavin.recipes.cli", "eval"]


@pytest.fixture(scope="module")
def lavin_folder(tmp_path_factory):
    """The quickstart's two towers, which know some answers without an image, and an adapter of seeded noise."""
    folder = init_folder(TINY / "vision", TINY / "text", tmp_path_factory.mktemp("lavin"), vision_feature_layers=TAPS)
    model = AutoModel.from_pretrained(folder, mma={}, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.empty(parameter.shape).normal_(generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions with drawings, with scans, with a hint, with neither; and a split without any."""
    folder = write_dataset(tmp_path_factory.mktemp("data"), {"test": (7, 5, 9, 9)})
    splits = json.loads((folder / "pid_splits.json").read_text())
    (folder / "pid_splits.json").write_text(json.dumps({**splits, "none": []}))
    return folder


def arguments(lavin_folder, data, output, *more) -> list[str]:
    return [
        "eval",
        "scienceqa",
        "--model",
        str(lavin_folder),
        "--root",
        str(data),
        "--output",
        str(output),
        *map(str, more),
    ]


def score_arguments(root, split="test", file="predictions.json"):
    return ["eval", "scienceqa", "--root", str(root), "--split", split, "--predictions", str(root / file)]


def fails(capsys, arguments, *words):
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert "lavin eval: error: " in captured.err and "Traceback" not in captured.err and not captured.out
    for word in words:
        assert word in captured.err, captured.err


def test_any_batch_size_gives_the_answers_of_one_by_one(lavin_folder, data):
    model, processor = load_model(lavin_folder)
    assert model.dtype == torch.float32 and not model.training
    questions = load_questions(data, "test")
    prompts, images = [q["prompt"] for q in questions], [q["images"] for q in questions]
    expected = []
    for prompt, row in zip(prompts, images, strict=True):
        pictures = [[Image.open(path) for path in row]] if row else None
        inputs = processor(
            text=[render(processor, prompt, len(row))], images=pictures, return_tensors="pt", add_special_tokens=False
        )
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        expected.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert len(set(expected)) > 8
    for batch_size in (1, 4, 64):
        assert answer(model, processor, prompts, images, batch_size, max_new_tokens=16) == expected
    # Images may be bytes or PIL images as well, and prompts messages.
    i = next(i for i, row in enumerate(images) if row)
    content = [{"type": "text", "text": prompts[i]}]
    chat = [{"role": "user", "content": [{"type": "image"}, *content]}]
    for image in (images[i][0].read_bytes(), Image.open(images[i][0])):
        assert answer(model, processor, [chat, prompts[0]], [[image], images[0]], max_new_tokens=16) == [
            expected[i],
            expected[0],
        ]


def test_generation_stops_at_the_tokenizers_eos_and_ignores_sampling(lavin_folder, data):
    model, processor = load_model(lavin_folder)
    question = next(q for q in load_questions(data, "test") if not q["images"])
    (whole,) = answer(model, processor, [question["prompt"]], max_new_tokens=12)
    ids = processor.tokenizer(whole, add_special_tokens=False).input_ids
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=None)
    assert answer(model, processor, [question["prompt"]], max_new_tokens=12) == [whole]
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(ids[4])
    (cut,) = answer(model, processor, [question["prompt"]], max_new_tokens=12)
    assert whole.startswith(cut.rstrip()) and len(cut) < len(whole)


def test_ask_eval_and_serve_give_the_same_tokens(lavin_folder, data, tmp_path, capsys):
    """Whatever a base's generation config says of repetition, and with an end of its own beside the tokenizer's."""
    question = next(q["prompt"] for q in load_questions(data, "test") if not q["images"])
    model, processor = load_model(lavin_folder)
    (whole,) = answer(model, processor, [question], max_new_tokens=12)
    ids = processor.tokenizer(whole, add_special_tokens=False).input_ids
    base = shutil.copytree(lavin_folder, tmp_path / "base")
    odd = {"repetition_penalty": 9.0, "suppress_tokens": ids[:1], "min_new_tokens": 12, "no_repeat_ngram_size": 1}
    GenerationConfig(**odd, eos_token_id=ids[6]).save_pretrained(base)
    model, processor = load_model(base)
    before = model.generation_config.to_dict()
    assert eos_token_ids(model, processor) == sorted({ids[6], processor.tokenizer.eos_token_id})
    (said,) = answer(model, processor, [question], max_new_tokens=12)
    assert whole.startswith(said) and len(said) < len(whole) and model.generation_config.to_dict() == before
    capsys.readouterr()
    assert main(["ask", str(base), question, "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == said.strip() + "\n"
    prompt = processor(text=[render(processor, question, 0)], return_tensors="pt", add_special_tokens=False)
    heard = []
    row = Row(prompt["input_ids"][0], None, 12, AnswerText(processor.tokenizer), heard.append)
    batcher = Batcher(model, set(eos_token_ids(model, processor)))
    batcher.submit(row)
    while not row.ended:
        batcher.step()
    assert row.tokens == ids[: ids.index(ids[6]) + 1]
    # The token that ends an answer is no part of its text, here a usual word.
    assert said == processor.decode(row.tokens[:-1], skip_special_tokens=True)
    assert "".join(event for event in heard if isinstance(event, str)) == said.strip() == row.text.raw.strip()


def test_device_and_dtype(lavin_folder, tmp_path, monkeypatch):
    """Most checkpoints are in half precision, which is slow on a CPU: float32 there unless asked for."""
    half = shutil.copytree(lavin_folder, tmp_path / "half")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert load_model(half)[0].dtype == torch.float32
    assert load_model(half, dtype="auto")[0].dtype == torch.bfloat16
    assert load_model(half, dtype="float16")[0].dtype == torch.float16
    for asked, words in (({"dtype": "int8"}, "--dtype must be"), ({"device": "gpu"}, "no device 'gpu'")):
        with pytest.raises(ValueError, match=words):
            ask(lavin_folder, "What?", **asked)
    assert default_dtype("cpu") == "float32" and default_dtype("cuda:1") == "bfloat16"
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert default_device() == ("cuda" if there else "cpu")


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    upright = Image.new("RGB", (8, 4), "red")
    upright.paste("blue", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    file = tmp_path / "photo.jpg"
    for image in (file, str(file), file.read_bytes(), Image.open(file)):
        found = read_image(image)
        assert found.size == (8, 4) and found.mode == "RGB"
        assert found.getpixel((0, 2))[2] > 200 and found.getpixel((7, 2))[0] > 200
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(ValueError, match="photo.jpg cannot be read"):
        read_image(file)


def test_letters_mode_takes_the_most_likely_letter(lavin_folder, data):
    """Against the log-probability of each whole answer's letter, one row at a time."""
    model, processor = load_model(lavin_folder)
    questions = load_questions(data, "test")[:12]
    prompts, images = [q["prompt"] for q in questions], [q["images"] for q in questions]
    choices = [q["choices"] for q in questions]
    found = {}
    for rows, scores in letter_batches(model, processor, prompts, images, choices, batch_size=5):
        found.update(zip(rows, scores, strict=True))
    for i, question in enumerate(questions):
        text = render(processor, question["prompt"], len(question["images"])) + "The answer is"
        for letter, score in zip(LETTERS[: choices[i]], found[i], strict=True):
            whole = processor(
                text=[f"{text} {letter}"], images=[[Image.open(p) for p in images[i]]] if images[i] else None,
                return_tensors="pt", add_special_tokens=False,
            )  # fmt: skip
            with torch.no_grad():
                logits = model(**whole).logits[0, -2]
            assert logits.log_softmax(-1)[whole["input_ids"][0, -1]].item() == pytest.approx(score, abs=1e-4)
        assert len(found[i]) == choices[i]
    # Where every question has one choice, that is the most likely.
    ((_, alone),) = letter_batches(model, processor, prompts[:2], images[:2], [1, 1], batch_size=2)
    assert alone == [pytest.approx(found[i][:1], abs=1e-4) for i in _]


def test_scienceqa_end_to_end_and_again(lavin_folder, data, tmp_path, capsys, monkeypatch):
    assert main(arguments(lavin_folder, data, tmp_path / "a", "--max-new-tokens", 12, "--batch-size", 4)) == 0
    shown = capsys.readouterr()
    assert "answers name no choice" in shown.out and "samples/s" in shown.out and "30/30" in shown.err
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert list(results["scores"]) == COLUMNS and results["dataset"]["questions"] == 30
    # Not the benchmark: nobody may take it for that.
    assert results["dataset"]["hub"] is None and "30 questions in ScienceQA's format" in results["dataset"]["name"]
    # What it wrote can be scored alone, and gives the same.
    file = tmp_path / "a" / "predictions.jsonl"
    assert main([*score_arguments(data)[:-1], str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results["scores"]
    # Another batch size: the same file, to the last letter.
    assert main(arguments(lavin_folder, data, tmp_path / "b", "--max-new-tokens", 12, "--batch-size", 30)) == 0
    assert (tmp_path / "b" / "predictions.jsonl").read_bytes() == file.read_bytes()
    assert (tmp_path / "b" / "results.md").read_bytes() == (tmp_path / "a" / "results.md").read_bytes()
    # The letters' logits instead: nothing can be unparsable, and the most likely of the choices is taken.
    assert main(arguments(lavin_folder, data, tmp_path / "c", "--mode", "letters", "--batch-size", 8)) == 0
    lines = (tmp_path / "c" / "predictions.jsonl").read_text().splitlines()[1:]
    said = {record["id"]: record for record in map(json.loads, lines)}
    right = 0
    for pid, problem in read_scienceqa(data, "test").items():
        scores = said[pid]["scores"]
        assert len(scores) == len(problem["choices"])
        right += scores.index(max(scores)) == problem["answer"]
    letters = json.loads((tmp_path / "c" / "results.json").read_text())
    assert letters["scores"]["AVG"] == pytest.approx(100 * right / 30, abs=0.005) and letters["unparsable"] == 0
    # Again: nothing is left to ask, so the model is not even loaded.
    monkeypatch.setattr(load, "load_model", lambda *_: pytest.fail("the model was loaded"))
    capsys.readouterr()
    assert main(arguments(lavin_folder, data, tmp_path / "a", "--max-new-tokens", 12, "--json")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == results["scores"] and "Every answer was there already" in captured.err


def test_the_data_sets_form_on_the_hub(lavin_folder, data, tmp_path, capsys):
    """Parquet with a row per question instead of the official files: the same questions, answers and table."""
    rows = [
        {**problem, "image": {"bytes": Path(question["images"][0]).read_bytes()} if question["images"] else None}
        for problem, question in zip(read_scienceqa(data, "test").values(), load_questions(data, "test"), strict=True)
    ]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    for root, name in ((data, "official"), (tmp_path / "hub", "parquet")):
        assert main(arguments(lavin_folder, root, tmp_path / name, "--max-new-tokens", 8)) == 0
    tables = [(tmp_path / name / "results.md").read_text() for name in ("official", "parquet")]
    assert tables[0] == tables[1]
    official, parquet = (
        [json.loads(line)["answer"] for line in (tmp_path / name / "predictions.jsonl").open().readlines()[1:]]
        for name in ("official", "parquet")
    )
    assert official == parquet and len(official) == 30
    # Not the rows that are made of it.
    rows = tmp_path / "rows"
    assert main(["data", "scienceqa", "--root", str(data), "--split", "test", "--output", str(rows)]) == 0
    capsys.readouterr()
    said = "no column question, image", "`lavin data` wrote it: name the folder that it was made from"
    fails(capsys, arguments(lavin_folder, rows, tmp_path / "out"), *said)


def test_a_stopped_run_goes_on_and_gives_the_same(lavin_folder, data, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole" / "predictions.jsonl", tmp_path / "cut" / "predictions.jsonl"
    run = ["--max-new-tokens", 12, "--batch-size", 4]
    assert main(arguments(lavin_folder, data, whole.parent, *run)) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.parent.mkdir()
    asked = []
    generate = core.generate_batches
    monkeypatch.setattr(
        core, "generate_batches", lambda m, p, prompts, *a: asked.append(len(prompts)) or generate(m, p, prompts, *a)
    )
    # Stopped in the middle of a line, of the header, or before it; and after the last answer.
    for kept, half in ((9, b'{"id": "1'), (5, b""), (0, lines[0][:30]), (0, b""), (31, b"")):
        cut.write_bytes(b"".join(lines[:kept]) + half)
        assert main(arguments(lavin_folder, data, cut.parent, *run)) == 0
        assert cut.read_bytes().splitlines(keepends=True)[: max(1, kept)] == lines[: max(1, kept)]
        assert sorted(cut.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
        assert (cut.parent / "results.md").read_bytes() == (whole.parent / "results.md").read_bytes()
    assert asked == [22, 26, 30, 30]


def test_answers_of_another_run_are_not_mixed_in(lavin_folder, data, tmp_path, capsys):
    output, run = tmp_path / "out", ["--max-new-tokens", 2, "--batch-size", 30]
    assert main(arguments(lavin_folder, data, output, *run)) == 0
    before = (output / "predictions.jsonl").read_bytes()
    capsys.readouterr()
    way_out = "Name another --output, or remove that file"
    longer = arguments(lavin_folder, data, output, "--max-new-tokens", 3)
    fails(capsys, longer, "settings.max_new_tokens: 2 there, 3 now", way_out)
    fails(capsys, arguments(lavin_folder, data, output, *run, "--format", "CQM-ALE"), "settings.format", "questions: ")
    fails(capsys, arguments(lavin_folder, data, output, *run, "--mode", "letters"), "settings.mode")
    other = tmp_path / "other"
    model = AutoModel.from_pretrained(lavin_folder, mma={}, dtype=torch.float32)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(0.1)
    model.save_pretrained(other)
    fails(capsys, arguments(other, data, output, *run), "model.adapter")
    # A changed image is another question.
    path = next(data.glob("images/test/*/image.png"))
    kept = path.read_bytes()
    Image.new("RGB", (64, 64)).save(path)
    fails(capsys, arguments(lavin_folder, data, output, *run), "questions: ")
    path.write_bytes(kept)
    # A line that is broken in the middle is no half-written end.
    (output / "predictions.jsonl").write_bytes(before.replace(b'{"id"', b'{"id', 1))
    fails(capsys, arguments(lavin_folder, data, output, *run), "line 2", "remove the file")
    (output / "predictions.jsonl").write_bytes(before)
    assert main(arguments(lavin_folder, data, output, *run)) == 0
    # The same model in another place is the same model.
    assert main(arguments(lavin_folder.rename(lavin_folder.with_name("moved")), data, output, *run)) == 0
    lavin_folder.with_name("moved").rename(lavin_folder)


def test_bad_input_is_explained(lavin_folder, data, tmp_path, capsys):
    out = tmp_path / "out"
    fails(capsys, arguments(tmp_path / "nothing", data, out), "There is no folder", "nothing")
    fails(capsys, arguments(tmp_path, data, out), "is no LaVIN folder", "no config.json")
    fails(capsys, arguments(TINY / "text", data, out), "no processor", "processor_config.json")
    (tmp_path / "run" / "checkpoint-8").mkdir(parents=True)
    fails(capsys, arguments(tmp_path / "run", data, out), "It holds checkpoint-8")
    fails(capsys, arguments(lavin_folder, tmp_path, out), "is no ScienceQA data set", "problems.json")
    fails(capsys, arguments(lavin_folder, data, out, "--split", "none"), "'none'", "no questions")
    fails(capsys, arguments(lavin_folder, data, out, "--format", "ABC-A"), "QCM")
    fails(capsys, arguments(lavin_folder, data, out, "--device", "gpu"), "no device 'gpu'")
    fails(capsys, arguments(lavin_folder, data, out, "--batch-size", 0), "--batch-size must be at least 1")
    path = next(data.glob("images/test/*/image.png"))
    kept = path.read_bytes()
    path.unlink()
    fails(capsys, arguments(lavin_folder, data, out), "Missing images: 1", str(path), f"question {path.parent.name}")
    path.write_text("no image")
    fails(capsys, arguments(lavin_folder, data, out), f"question {path.parent.name}, {path}, cannot be read")
    path.write_bytes(kept)
    capsys.readouterr()
    assert main(arguments(lavin_folder, data, out, "--max-new-tokens", 1)) == 0
    with pytest.raises(ValueError, match="same id"):
        ask_model(lavin_folder, [{"id": "1", "prompt": "a", "images": []}] * 2, out, "x", {})
    with pytest.raises(SystemExit):
        main(["eval", "scienceqa", "--root", str(data)])  # neither a model nor predictions


@pytest.mark.slow
def test_killed_in_earnest_and_resumed(lavin_folder, data, tmp_path):
    """The real command, SIGKILL after some answers, the real command again: as if nothing had happened."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "lavin.recipes.cli"]
    options = ["--max-new-tokens", "40", "--batch-size", "1"]
    process = subprocess.Popen([*run, *arguments(lavin_folder, data, tmp_path / "cut", *options)], env=env)
    file = tmp_path / "cut" / "predictions.jsonl"
    while not file.is_file() or file.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    had = file.read_bytes().count(b"\n") - 1
    assert 0 < had < 30
    results = []
    for folder in ("cut", "whole"):
        command = [*run, *arguments(lavin_folder, data, tmp_path / folder, *options)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / folder / "results.json").read_text()))
    assert results[0]["scores"] == results[1]["scores"] and results[0]["asked"] == 30 - had
    assert (tmp_path / "whole" / "predictions.jsonl").read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_model_of_the_hub(lavin_folder, data, hub, tmp_path):
    """Loaded by its name; what it said is known again, and is what the folder said."""
    env = {**os.environ, **hub, "HF_HOME": str(tmp_path / "cache")}
    push = "import sys; from huggingface_hub import HfApi as A; A().create_repo('org/tuned'); "
    push += "A().upload_folder(repo_id='org/tuned', folder_path=sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", push, str(lavin_folder)], env=env).returncode == 0
    options = ["--max-new-tokens", "8", "--batch-size", "10"]
    command = [*COMMAND, *arguments("org/tuned", data, tmp_path / "out", *options)[1:]]
    for words in ("30 samples in", "Every answer was there already"):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and words in done.stdout, done.stderr
    assert main(arguments(lavin_folder, data, tmp_path / "local", *options)) == 0
    said = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("out", "local")]
    assert said[0] == said[1]
    command = [word.replace("org/tuned", "org/nothing") for word in command]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "org/nothing" in done.stderr and "Traceback" not in done.stderr


def test_the_harness_task_needs_its_rows_only_when_they_are_loaded(tmp_path, monkeypatch):
    """lmms-eval imports it with `--include_path` for any task, and reads the rows of those it runs."""
    monkeypatch.setenv("LAVIN_SCIENCEQA", str(tmp_path / "rows"))
    task = runpy.run_path(str(TASKS / "utils.py"))
    with pytest.raises(FileNotFoundError, match="Unable to find .*/rows/test-00000"):
        datasets.load_dataset("parquet", data_files=task["DATA_FILES"], cache_dir=str(tmp_path / "cache"))
