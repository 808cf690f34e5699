"""`lavin train`: what it refuses, how it resumes, what is left when a run is stopped, diverges or fills the disk."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import test_trl
import torch
import yaml
from conftest import tiny_peft
from datasets import Dataset, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from test_trl import DDP, ZERO3, adapter, distance
from transformers import AutoModel, AutoProcessor

from lavin import LavinProcessor
from lavin.recipes.train import checkpoints, checks, launch, record, settings, train
from lavin.recipes.train.rows import check_columns, check_rows, load_rows, measure


light, rows = test_trl.light, test_trl.rows  # a light folder, and 32 mixed rows
BASE = {
    "trust_remote_code": True,
    "model_init_kwargs": {"mma": {"dropout": 0.1}},
    "max_length": None,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 24,
    "save_steps": 2,
    "save_total_limit": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
}
LAVIN = [str(Path(sys.executable).with_name("lavin")), "train"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def recipe(folder: Path, light: Path, rows: Path, output: Path | None = None, **changes) -> list[str]:
    """Writes a recipe and returns the command that trains it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"datasets": [{"path": "parquet", "data_files": str(rows)}], "model_name_or_path": str(light)}
    values = {**BASE, **data, "output_dir": str(output or folder / "run"), **changes}
    values = {key: value for key, value in values.items() if value is not ...}
    (folder / "sft.yaml").write_text(yaml.safe_dump(values))
    return [*LAVIN, "--config", str(folder / "sft.yaml")]


def run(command: list[str], code: int = 0, **env) -> str:
    """Runs a command to its end; returns what it wrote, standard output before standard error."""
    done = subprocess.run(
        command, capture_output=True, text=True, env={**ENVIRONMENT, **env}, stdin=subprocess.DEVNULL, timeout=1800
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def losses(output: Path) -> list[float]:
    newest = checkpoints.list_checkpoints(output)[0]
    return [entry["loss"] for entry in checkpoints.read_state(newest)["log_history"] if "loss" in entry]


# Recipes


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "no recipe"), ("a: [1", "not valid YAML"), ("- 1", "key: value"), ("env: 3", "NAME: value")],
)
def test_recipe_that_is_none(tmp_path, text, said):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=said):
        settings.read_yaml(file)


@pytest.fixture(scope="module")
def worker():
    """A process that parses with TRL's parser, which is slow to import and touches the process it runs in."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def parsed(worker, folder: Path, values: dict, *overrides: str) -> settings.Settings:
    (folder / "x.yaml").write_text(yaml.safe_dump(values))
    arguments = ["--config", str(folder / "x.yaml"), *overrides]
    return worker.submit(settings.parse, arguments, list(values)).result()


CPU = {"use_cpu": True, "bf16": False, "output_dir": "out"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "overrides", "said"),
    [
        ({**CPU, "learning_rat": 1}, [], "`learning_rat` .did you mean `learning_rate`"),
        (CPU, ["--warmup_step", "3", "--packin_g", "1"], "`--packin_g` .did you mean `--packing`"),
        ({**CPU, "learning_rate": "fast"}, [], "learning_rate.*'fast'"),
        (CPU, ["word"], "'word' for the script"),
        ({**CPU, "multi_gpu": True}, [], "'True' for the script"),
        (CPU, ["--num_processes", "2"], "2 processes are asked for.*MULTI_GPU"),
        ({**CPU, "accelerate_config": "zero2"}, ["--accelerate_config", "zero3"], "twice"),
        (CPU, ["--accelerate_config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_recipe_mistakes_are_named(worker, tmp_path, values, overrides, said):
    with pytest.raises(ValueError, match=said):
        parsed(worker, tmp_path, values, *overrides)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_recipe_without_gpu_gives_flags_that_work(worker, tmp_path):
    with pytest.raises(ValueError, match="no GPU") as error:
        parsed(worker, tmp_path, {"output_dir": "out", "dtype": "bfloat16"})
    flags = re.search(r"on the CPU add `(.*?)`", str(error.value))[1].split()
    found = parsed(worker, tmp_path, {"output_dir": "out", "dtype": "bfloat16"}, *flags)
    assert found["dtype"] == "float32" and found["use_cpu"] and not found["bf16"]


@pytest.mark.slow
def test_recipe_is_read_as_trl_reads_it(worker, tmp_path):
    """Also what the launcher adds is understood, and abbreviated options count as given."""
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(DDP))
    found = parsed(
        worker, tmp_path, {**CPU, "accelerate_config": str(tmp_path / "a.yaml"), "learning_rate": 1.0},
        "--learning_rate", "2e-3", "--report_t", "tensorboard", "--logging_nan_inf_filter", "false",
        "--max_length", "null", "--model_init_kwargs", '{"mma": {"r": 4}}',
    )  # fmt: skip
    assert found.processes == 2 and not found.deepspeed
    assert (found["learning_rate"], found["max_length"], found["logging_nan_inf_filter"]) == (2e-3, None, False)
    assert found["model_init_kwargs"] == {"mma": {"r": 4}}
    assert {"report_to", "max_length", "learning_rate", "use_cpu"} <= found.given
    assert not {"max_steps", "packing"} & found.given


# Settings. DEFAULTS are TRL's (`test_defaults_are_trls`).

DEFAULTS = {
    "model_name_or_path": None, "model_revision": "main", "trust_remote_code": False, "model_init_kwargs": None,
    "use_peft": False, "packing": False, "eval_packing": None, "padding_free": False, "load_best_model_at_end": False,
    "load_in_4bit": False, "load_in_8bit": False, "logging_nan_inf_filter": True, "save_only_model": False,
    "save_strategy": "steps", "save_steps": 500, "save_total_limit": None, "num_train_epochs": 3.0, "max_steps": -1,
    "push_to_hub": False, "hub_strategy": "every_save", "hub_private_repo": None, "dataset_name": None,
    "dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test", "dataset_streaming": False,
    "datasets": [], "streaming": False, "test_split_size": None, "eval_strategy": "no", "max_length": 1024,
    "trackio_static_space_id": None, "trackio_space_id": None, "report_to": [], "assistant_only_loss": False,
    "completion_only_loss": None, "pad_to_multiple_of": None, "chat_template_path": None, "dataset_num_proc": None,
    "resume_from_checkpoint": None, "dataloader_drop_last": False, "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 8, "hub_model_id": None, "metric_for_best_model": None,
}  # fmt: skip


def said(processes: int = 1, deepspeed: bool = False, **values) -> settings.Settings:
    return settings.Settings([], {**DEFAULTS, **values}, set(values), processes, deepspeed=deepspeed)


GOOD = {"model_name_or_path": "x", "trust_remote_code": True, "model_init_kwargs": {"mma": {}}}


@pytest.mark.slow
def test_defaults_are_trls(worker, tmp_path):
    found = parsed(worker, tmp_path, CPU)
    assert {key: found[key] for key in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_name_or_path": None}, "no model"),
        ({"trust_remote_code": False}, "trust_remote_code: true"),
        ({"model_init_kwargs": None}, r"model_init_kwargs: \{mma: \{\}\}"),
        ({"use_peft": True}, "use_peft"),
        ({"packing": True}, "packing"),
        ({"padding_free": True}, "padding_free"),
    ],
)
def test_settings_that_would_go_wrong_are_refused(change, match):
    assert checks.check_options(said(**GOOD)) == []
    with pytest.raises(ValueError, match=match):
        checks.check_options(said(**{**GOOD, **change}))


def test_doubtful_settings_are_warned_about():
    doubtful = {"logging_nan_inf_filter": True, "save_only_model": True, "save_strategy": "no"}
    warnings = checks.check_options(said(**GOOD, **doubtful))
    assert [next(name for name in doubtful if name in warning) for warning in warnings] == list(doubtful)


def test_pushes_that_nobody_could_use_are_refused(light, tmp_path):
    from lavin import LavinConfig

    config = LavinConfig(text_checkpoint="org/text", vision_checkpoint="org/vision")
    push = {"model_name_or_path": "org/x", "push_to_hub": True, "hub_strategy": "end"}
    checks.check_push(said(**push), config, [])
    with pytest.raises(ValueError, match="on this machine .*/text"):
        checks.check_push(said(**push), LavinConfig.from_pretrained(light), [])
    with pytest.raises(ValueError, match="hub_strategy: end"):
        checks.check_push(said(**{**push, "hub_strategy": "every_save"}), config, [])
    with pytest.raises(ValueError, match="into the card"):
        checks.check_push(said(**push, dataset_name=str(tmp_path)), config, [])
    with pytest.raises(ValueError, match="public Space.*trackio_static_space_id: false"):
        checks.check_push(said(**push), config, ["trackio"])
    checks.check_push(said(**push, trackio_static_space_id=False), config, ["trackio"])


@pytest.mark.parametrize(
    ("installed", "given", "expected"),
    [
        ({"trackio", "tensorboard"}, {}, ["trackio"]),
        ({"tensorboard"}, {}, ["tensorboard"]),
        (set(), {}, []),
        ({"trackio"}, {"report_to": []}, []),
        ({"trackio"}, {"report_to": ["wandb"]}, ["wandb"]),
    ],
)
def test_report_to_is_what_is_installed_unless_given(monkeypatch, installed, given, expected):
    """A folder of that name beside the recipe is found, too, and has no origin: it does not count."""
    folder = SimpleNamespace(origin=None)
    specs = {name: SimpleNamespace(origin="__init__.py") for name in installed}
    monkeypatch.setattr(checks, "find_spec", lambda name: specs.get(name, folder if installed else None))
    assert checks.choose_report_to(said(**given)) == expected


def test_model_folders_that_trl_cannot_load(light, pair, tmp_path):
    config, processor, trained = checks.check_model(said(**{**GOOD, "model_name_or_path": str(light)}))
    assert (config.model_type, type(processor).__name__) == ("lavin", "LavinProcessor")
    model = AutoModel.from_pretrained(light, mma={})
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)

    def refused(folder, match, mma=None):
        with pytest.raises((OSError, ValueError), match=match):
            values = {"model_name_or_path": str(folder), "model_init_kwargs": {"mma": mma or {}}}
            checks.check_model(said(**{**GOOD, **values}))

    refused(tmp_path / "nowhere", "no model folder")
    refused(pair / "text", "is a llama, no LaVIN")
    refused(light, "no field rank", {"rank": 3})
    for name, match in {"processor_config.json": "no processor", "config.json": "no config.json"}.items():
        shutil.copytree(light, tmp_path / name)
        (tmp_path / name / name).unlink()
        refused(tmp_path / name, match)
    for name, change in {
        "map": {"auto_map": None},
        "gone": {"text_checkpoint": {"name": "/gone", "revision": None}},
    }.items():
        shutil.copytree(light, tmp_path / name)
        stored = {**json.loads((light / "config.json").read_text()), **change}
        stored = {key: value for key, value in stored.items() if value is not None}
        (tmp_path / name / "config.json").write_text(json.dumps(stored))
        refused(tmp_path / name, {"map": "auto_map", "gone": "text checkpoint /gone"}[name])


def test_output_that_cannot_hold_the_checkpoints(tmp_path):
    (tmp_path / "file").write_text("")
    free = shutil.disk_usage(tmp_path).free
    run = {"output_dir": str(tmp_path / "new" / "run"), "save_steps": 10, "save_total_limit": 2}
    assert checks.check_output(said(**run), 1000, steps=100) == 4000  # two kept, one while saving, the result
    assert checks.check_output(said(**{**run, "save_total_limit": None}), 1000, steps=100) == 12_000
    with pytest.raises(ValueError, match="cannot be written"):
        checks.check_output(said(**{**run, "output_dir": str(tmp_path / "file" / "run")}), 1, 1)
    with pytest.raises(ValueError, match="free.*save_total_limit"):
        checks.check_output(said(**run), free // 3, steps=100)
    assert not (tmp_path / "new").exists()


# Rows


def user(*content):
    return {
        "role": "user",
        "content": [{"type": "image"} if c is None else {"type": "text", "text": c} for c in content],
    }


def talk(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def picture() -> Image.Image:
    return Image.new("RGB", (32, 32), "red")


def row(prompt, answer: str, images: int | None = 0) -> dict:
    return {"prompt": prompt, "completion": [talk(answer)], "images": None if images is None else [picture()] * images}


def dataset(*entries: dict) -> Dataset:
    return Dataset.from_list(list(entries)).cast_column("images", List(ImageFeature()))


def lengths(data, processor, limit=None, **values):
    columns, image = check_columns("train", data, {**DEFAULTS, **values})
    return measure("train", data, columns, image, processor, limit)


def test_lengths_are_those_of_trls_batches(light, rows):
    """Token by token: TRL's own collator on each row; strings as content, several images, talks; streamed, too."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = LavinProcessor.from_pretrained(light)
    mixed = load_rows({**DEFAULTS, "datasets": [{"path": "parquet", "data_files": str(rows), **SOURCE}]})["train"]
    strings = dataset(
        {"prompt": [{"role": "user", "content": "What?"}], "completion": [{"role": "assistant", "content": "A cat."}],
         "images": [picture()] * 2},
        {"prompt": [{"role": "user", "content": "And now?"}], "completion": [{"role": "assistant", "content": "No."}],
         "images": []},
    )  # fmt: skip
    talks = [user(None, "What?"), talk("A cat."), user("Sure?"), talk("The answer is B.")]
    talks = dataset({"messages": talks, "images": [picture()]}, {"messages": talks[2:], "images": []})
    for data, values in [(mixed, {}), (strings, {}), (talks, {"assistant_only_loss": True})]:
        collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=not values, **values)
        found = lengths(data, processor, **values)
        streamed = lengths(data.to_iterable_dataset(), processor, **values)
        for i, entry in enumerate(data):
            batch = collator([entry])
            assert found["prompt"][i] + found["completion"][i] == batch["attention_mask"].sum()
            assert found["images"][i] == len(entry["images"])
            if not values:
                assert found["completion"][i] == (batch["labels"] != -100).sum()
        assert all((found[key] == streamed[key]).all() for key in found)


SOURCE = {"name": None, "data_dir": None, "split": "train", "columns": None}


def test_lengths_are_the_same_with_several_processes(light, rows):
    data = Dataset.from_parquet(str(rows))
    processor = LavinProcessor.from_pretrained(light)
    one, two = (measure("train", data, ["prompt", "completion"], "images", processor, 30, n) for n in (1, 2))
    assert all((one[key] == two[key]).all() for key in one)


def test_rows_that_would_be_cut_are_counted(light):
    """What is said to be lost is what TRL's collator drops."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = LavinProcessor.from_pretrained(light, image_order="interleaved")  # an image at the end may be cut
    data = dataset(
        row([user(None, "What?\nResponse:")], "No.", 1),
        row([user(None, None, "What is this?\nResponse:")], "The answer is B, the answer is B, the answer is B.", 2),
        row([user("What is this? " * 9, None)], "B", 1),
    )
    whole = lengths(data, processor)
    total = whole["prompt"] + whole["completion"]
    check_rows("train", whole, None, True, int(total.max()))
    limit = int(total[0])
    found = lengths(data, processor, limit=limit)
    cut = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True, max_length=limit)
    batches = [cut([entry]) for entry in data]
    left = np.array([int((batch["labels"] != -100).sum()) for batch in batches])
    pictures = np.array([int((batch["input_ids"] == processor.image_token_id).sum()) for batch in batches])
    assert (whole["completion"] - found["cut_answer"] == left).all() and found["cut_answer"][0] == 0
    assert (whole["images"] * processor.num_image_tokens - found["cut_image"] == pictures).all()
    assert found["cut_image"][2] > 0 and left[2] == 0
    lost = int(found["cut_answer"].sum())
    longest = int(total.argmax())
    message = (
        f"2 of 3 train rows are longer than {limit} .*The longest: row {longest} .{total[longest]} tokens.*lose "
        rf"{lost} answer tokens of 2 rows .the whole answer in \d+. and {found['cut_image'].sum()} image tokens of "
        rf"{(found['cut_image'] > 0).sum()} rows.*max_length: null.*at least {total.max()}"
    )
    with pytest.raises(ValueError, match=message):
        check_rows("train", found, limit, True, None)
    with pytest.raises(ValueError, match="TRL's default"):
        check_rows("train", found, limit, False, None)
    with pytest.raises(ValueError, match=rf"longer than the {limit} tokens .*max_position_embeddings"):
        check_rows("train", whole, None, True, limit)


def test_rows_that_trl_cannot_take_are_named(light):
    processor = LavinProcessor.from_pretrained(light)
    data = dataset(
        row([user(None, "What?")], "A", 1),
        row([user("What?")], "A", 1),
        row([user(None, "What?")], "A", 0),
        row([user("What?")], "A", None),
        row([], "A"),
    )
    with pytest.raises(ValueError) as error:
        check_rows("train", lengths(data, processor), None, True, None)
    text = str(error.value)
    assert "4 of 5 train rows" in text and "row 0" not in text
    for line in (
        r"row 1: .*provided \(1\).*\(0\)",
        r"row 2: .*provided \(0\).*\(1\)",
        r"row 3: .*write `\[\]`",
        "row 4:",
    ):
        assert re.search(line, text), (line, text)
    one = data.select([0, 3]).map(lambda r: {"image": (r["images"] or [None])[0]}, remove_columns="images")
    with pytest.raises(ValueError, match="1 of 2 train rows:\n  row 1: no value in the image column"):
        check_rows("train", lengths(one, processor), None, True, None)
    with pytest.raises(ValueError, match="no train rows"):
        check_rows("train", lengths(data.select([]), processor), None, True, None)


PAIR = {"prompt": [user("What?")], "completion": [talk("A")]}


@pytest.mark.parametrize(
    ("entry", "values", "match"),
    [
        ({"text": "What? A", "images": []}, {}, "`prompt` is missing"),
        ({"prompt": "What?", "completion": "A", "images": []}, {}, "`prompt` .* plain text"),
        ({"messages": [user("What?"), talk("A")], "images": []}, {}, "assistant_only_loss: true"),
        ({**PAIR, "images": []}, {"assistant_only_loss": True}, "`assistant_only_loss` is for `messages`"),
        ({**PAIR, "images": []}, {"completion_only_loss": False}, "image tokens into the labels"),
        ({**PAIR, "images": []}, {"pad_to_multiple_of": 8}, "pad_to_multiple_of"),
        ({**PAIR, "images": "a.png"}, {}, "must be a list per row"),
        ({**PAIR, "images": [{"bytes": b"x", "path": None}]}, {}, "cast_column"),
        ({**PAIR, "images": [], "image": "a.png"}, {}, "`image` and forget `images`"),
    ],
)
def test_columns_that_trl_would_misread(entry, values, match):
    data = Dataset.from_list([entry])
    with pytest.raises(ValueError, match=match):
        check_columns("train", data, {**DEFAULTS, **values})


def test_data_files_that_are_not_there(tmp_path, rows):
    def refused(match, **source):
        with pytest.raises(ValueError, match=match):
            load_rows({**DEFAULTS, "datasets": [{**SOURCE, "path": "parquet", "data_files": None, **source}]})

    (tmp_path / "other.parquet").write_bytes(b"")
    refused(r"no file matches .*trai\*.parquet .*other.parquet", data_files=str(tmp_path / "trai*.parquet"))
    refused("other.parquet is empty", data_files={"train": [str(tmp_path / "other.parquet")]})
    (tmp_path / "other.parquet").write_bytes(rows.read_bytes()[:-100])
    refused("other.parquet. cannot be read: .*Parquet", data_files=str(tmp_path / "other.parquet"))
    with pytest.raises(ValueError, match="names no data"):
        load_rows(DEFAULTS)
    with pytest.raises(ValueError, match="no split 'test'"):
        source = {**SOURCE, "path": "parquet", "data_files": str(rows)}
        load_rows({**DEFAULTS, "datasets": [source], "eval_strategy": "steps"})


def test_a_column_of_paths_and_rows_without_images_are_fine(light):
    processor = LavinProcessor.from_pretrained(light)
    data = Dataset.from_list([{**PAIR, "images": []}] * 2)
    assert lengths(data.cast_column("images", List(Value("string"))), processor)["images"].tolist() == [0, 0]
    assert (
        lengths(data, processor)["completion"] == lengths(data.remove_columns("images"), processor)["completion"]
    ).all()


# The adapter that is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path, value):
    model = tiny_peft().get_base_model()
    model.config.base_checkpoint = {"name": "org/base", "revision": None}
    model.save_pretrained(tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    name, weight = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        weight.view(-1)[-1] = value
    for target in ("run", "new"):
        for full in (False, True):
            with pytest.raises(FloatingPointError, match=name.replace(".mma", "")):
                model.save_pretrained(tmp_path / target, full=full)
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert not (tmp_path / "new").exists()


# Processes

CHILD = """
import os, signal, subprocess, sys, time
if len(sys.argv) == 3:  # a rank in a session of its own, as torchrun starts it
    subprocess.Popen([sys.executable, __file__, sys.argv[1]], start_new_session=True)
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_process_outlives_the_launcher(tmp_path, number):
    (tmp_path / "child.py").write_text(CHILD)
    code = "import sys; from launch import run_watched; sys.exit(run_watched(sys.argv[1:]))"
    child = [sys.executable, str(tmp_path / "child.py"), str(tmp_path / "pids"), "first"]
    command = [sys.executable, "-c", code, *child]
    launcher = subprocess.Popen(
        command, cwd=Path(launch.__file__).parent, start_new_session=True, preexec_fn=heed_signals
    )
    wait_for(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    os.kill(launcher.pid, number)
    assert launcher.wait(60) == (-9 if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not any(alive(pid) for pid in pids), 60)


def heed_signals():
    """As in a terminal: what is started under `nohup`, or in a script's background, ignores these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, seconds: float = 900):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(("code", "expected"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("0", 0)])
def test_exit_code_and_environment_of_the_run(code, expected):
    assert launch.run_watched([sys.executable, "-c", f"import os, sys; {code}"]) == expected
    assert launch.MARK not in os.environ


# Whole runs, with the real command


@pytest.fixture(scope="module")
def finished(light, rows, tmp_path_factory):
    """A run from beginning to end: its folder, its log and its command."""
    folder = tmp_path_factory.mktemp("finished")
    command = recipe(folder, light, rows)
    return folder / "run", run(command), command


@pytest.mark.slow
def test_a_run_says_what_it_does(finished, light):
    output, log, command = finished
    expected = load_file(output / "mma" / "adapter_model.safetensors")
    trained = sum(value.numel() for value in expected.values())
    for line in (
        rf"Trained +{trained:,} values",
        "Train rows +32, 12 with images",
        r"tokens +median \d+, longest \d+ .row \d+.; no max_length",
        r"Batch +1 process x 4 rows x 1 accumulated = 4 rows",
        r"Steps +24, 3 epochs",
        r"Starts +at the beginning",
        r"\$ trl sft --config .*sft.yaml --report_to \w+ --logging_nan_inf_filter false\n",
        r"12/24 \[\d\d:\d\d<\d\d:\d\d",  # time left
        r"'loss': '[\d.]+', 'grad_norm': '[\d.]+', 'learning_rate': '[\d.e-]+'",
        rf"The adapter is in {output}/mma",
        rf"lavin ask {output} ",
    ):
        assert re.search(line, log), line
    card = (output / "README.md").read_text()
    assert "generated_from_trainer" not in card and f"{trained:,}" in card
    assert AutoModel.from_pretrained(output).active_adapters() == ["mma"]
    again = run(command)
    assert "This run is finished" in again and "$ trl" not in again


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_end(finished, light, rows, tmp_path):
    """SIGKILL for all of its processes at once, a random moment after a random step of 24."""
    whole, output = finished[0], tmp_path / "run"
    command = recipe(tmp_path, light, rows)
    after, delay = random.Random().randint(1, 12), random.Random().uniform(0, 0.05)
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, stdin=subprocess.DEVNULL)
    states = [output / f"checkpoint-{step}" / "trainer_state.json" for step in range(after, 25)]
    wait_for(lambda: launcher.poll() is not None or any(state.exists() for state in states))
    time.sleep(delay)
    killed = [launcher, *psutil.Process(launcher.pid).children(recursive=True)]
    for process in killed:
        process.kill()
    launcher.wait()
    step = max(map(checkpoints.step_of, checkpoints.list_checkpoints(output)))
    assert not (output / "mma").exists(), f"it had ended already (after {after}, {delay} s, step {step})"
    log = run(command)
    assert "Starts       at step" in log
    assert losses(output) == pytest.approx(losses(whole), abs=1e-6), (after, delay, step)
    assert len(losses(output)) == 24
    assert distance(output, whole) < 1e-6


WRITTEN = (
    "trainer_state.json",
    "config.json",
    "mma/adapter_config.json",
    "mma/adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_a_half_written_checkpoint_is_seen(finished, tmp_path, name):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    newest, before, *_ = checkpoints.list_checkpoints(output)
    assert checkpoints.last_whole(output) == (newest, {})
    file = newest / name
    size = file.stat().st_size
    for keep in (size - 3, size // 2, 1, 0):
        os.truncate(file, keep)
        assert name in checkpoints.checkpoint_problem(newest), keep
    file.unlink()
    whole, broken = checkpoints.last_whole(output)
    assert whole == before and name.rpartition("/")[2] in broken[newest]


@pytest.mark.slow
def test_the_checkpoint_before_a_half_written_one_is_used(finished, light, rows, tmp_path):
    """The same end as without the damage, and `save_total_limit` counts whole ones only."""
    whole, output = finished[0], tmp_path / "run"
    command = recipe(tmp_path, light, rows)
    shutil.copytree(whole, output)
    newest, before, *_ = checkpoints.list_checkpoints(output)
    os.truncate(newest / "optimizer.pt", 1000)
    shutil.rmtree(output / "mma")
    log = run(command)
    assert f"{newest} is only half written (optimizer.pt is cut off)" in log
    assert f"Starts       at step 22, from {before}" in log
    assert distance(output, whole) < 1e-6 and losses(output) == pytest.approx(losses(whole), abs=1e-6)
    found = checkpoints.list_checkpoints(output)
    assert [checkpoints.step_of(path) for path in found] == [24, 22, 20]
    assert not any(map(checkpoints.checkpoint_problem, found))


@pytest.mark.slow
def test_which_checkpoint_is_chosen(finished, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    newest, before, oldest = checkpoints.list_checkpoints(output)

    def choose(steps=24, **values):
        return train.choose_checkpoint(said(output_dir=str(output), **values), steps)

    assert choose() == (newest, True) and choose(steps=30) == (newest, False)
    assert choose(resume_from_checkpoint=str(oldest)) == (oldest, False), "the user's goes first"
    for no in (False, "false"):
        with pytest.raises(ValueError, match="holds checkpoint-24 of an earlier run.*Name another `output_dir`"):
            choose(resume_from_checkpoint=no)
        assert train.choose_checkpoint(said(output_dir=str(tmp_path / "new"), resume_from_checkpoint=no), 24) == (
            None,
            False,
        )
    shutil.copytree(oldest / "mma", output / "mma", dirs_exist_ok=True)
    assert choose() == (newest, False), "killed before the result was written"
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps({**state, "best_model_checkpoint": f"moved/{oldest.name}"}))
    assert choose(load_best_model_at_end=True) == (newest, True) and choose() == (newest, False)
    (newest / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=f"{newest.name} is not whole: scheduler.pt is missing. {before} is"):
        choose(resume_from_checkpoint=str(newest))
    assert choose() == (before, False)
    assert not newest.exists() and "_incomplete-checkpoint-24" in capsys.readouterr().out
    for checkpoint in (before, oldest):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="No checkpoint in .* is whole, and starting over would write over them"):
        choose()
    for checkpoint in (before, oldest):
        (checkpoint / "trainer_state.json").unlink()
    assert choose() == (None, False), "killed in its first save"
    with pytest.raises(ValueError, match="holds no checkpoint: leave it out"):
        choose(resume_from_checkpoint="true")


@pytest.mark.slow
def test_zero_checkpoints_are_for_as_many_processes(finished, tmp_path):
    """The adapter's file is whole on any number of processes, DeepSpeed's optimiser state is not."""
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    newest = checkpoints.list_checkpoints(output)[0]
    states = newest / "global_step24"
    states.mkdir()
    (newest / "latest").write_text("global_step24")
    assert "no model states" in checkpoints.checkpoint_problem(newest, 2)
    for name in ("mp_rank_00_model_states.pt", *(f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(2))):
        (newest / "optimizer.pt").rename(states / name)
        shutil.copy(states / name, newest / "optimizer.pt")
    for rank in range(2):
        shutil.copy(newest / "rng_state.pth", newest / f"rng_state_{rank}.pth")
    run = {"output_dir": str(output), "deepspeed": True}
    assert train.choose_checkpoint(said(**run, processes=2), 99) == (newest, False)
    with pytest.raises(ValueError, match="by DeepSpeed on 2 processes; DeepSpeed on 4"):
        train.choose_checkpoint(said(**run, processes=4), 99)
    with pytest.raises(ValueError, match="use the same accelerate config"):
        train.choose_checkpoint(said(output_dir=str(output)), 99)
    os.truncate(states / "zero_pp_rank_1_mp_rank_00_optim_states.pt", 999)
    assert "rank_1_mp_rank_00_optim_states.pt is cut off" in checkpoints.checkpoint_problem(newest, 2)


RUN = {
    "learning_rate": 0.01, "lr_scheduler_type": "cosine", "adam_beta2": 0.99, "weight_decay": 0.02, "seed": 1,
    "per_device_train_batch_size": 4, "model_init_kwargs": {"mma": {}},
}  # fmt: skip


def record_of(light, data, steps=24, processes=1, **changes) -> dict:
    from lavin import LavinConfig

    columns = ["prompt", "completion"]
    measured = measure("train", data, columns, "images", LavinProcessor.from_pretrained(light), None)
    config = LavinConfig.from_pretrained(light)
    return record.describe(said(processes, **{**RUN, **changes}), config, data, columns, measured, steps)


@pytest.fixture
def recorded(light, rows, tmp_path):
    """Rows, and a checkpoint of a run on them that the launcher has recorded."""
    data, checkpoint = Dataset.from_parquet(str(rows)), tmp_path / "run" / "checkpoint-12"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 12, "max_steps": 24}')
    record.write_record(tmp_path / "run", record_of(light, data))
    return data, checkpoint


@pytest.mark.parametrize(
    ("change", "said_"),
    [
        ({"learning_rate": 0.02}, "learning_rate: 0.01 before, 0.02 now"),
        ({"lr_scheduler_type": "linear"}, 'lr_scheduler_type: "cosine" before, "linear" now'),
        ({"adam_beta2": 0.999}, "adam_beta2: 0.99 before, 0.999 now"),
        ({"weight_decay": 0.0}, "weight_decay: 0.02 before"),
        ({"seed": 2}, "seed: 1 before, 2 now"),
        ({"gradient_accumulation_steps": 2}, "rows per step .*: 4 before, 8 now"),
        ({"per_device_train_batch_size": 2}, "rows per step .*: 4 before, 2 now"),
        ({"steps": 20}, "max_steps, num_train_epochs.*: 24 before, 20 now"),
    ],
)
def test_changed_settings_are_refused(light, recorded, change, said_):
    data, checkpoint = recorded
    with pytest.raises(ValueError, match="(?s)" + said_ + ".*restore.*another `output_dir`.*`model_name_or_path: "):
        record.compare_record(checkpoint, record_of(light, data, **change))


def test_what_does_not_shape_the_training_may_change(light, recorded, tmp_path):
    """Layout, logs, moved files; a longer run, with a warning; a run that nothing is known of."""
    data, checkpoint = recorded
    data.to_parquet(tmp_path / "moved.parquet")
    moved = Dataset.from_parquet(str(tmp_path / "moved.parquet"))
    layout = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "processes": 2}
    assert record.compare_record(checkpoint, record_of(light, moved, **layout, save_steps=7, report_to=["x"])) is None
    longer = record.compare_record(checkpoint, record_of(light, data, steps=48))
    assert re.search("48 steps long instead of 24, .*computed anew.* at step 12", longer)
    record.write_record(checkpoint.parent, record_of(light, data, steps=48))
    assert record.compare_record(checkpoint, record_of(light, data)) is None, "the checkpoint is still of 24"
    other = record_of(light, data, learning_rate=1.0)
    for text in ("{", None):
        file = checkpoint.parent / record.RECORD
        file.unlink() if text is None else file.write_text(text)
        assert record.compare_record(checkpoint, other) is None


def test_other_rows_are_refused(light, recorded):
    """Fewer, in another order, or with other words in the middle: the first and the last row would not tell."""
    data, checkpoint = recorded

    def edit(row, i):
        row["completion"][0]["content"][0]["text"] = (
            "blue red" if i == 17 else row["completion"][0]["content"][0]["text"]
        )
        return row

    for other in (data.select(range(31)), data.select([0, 2, 1, *range(3, 32)]), data.map(edit, with_indices=True)):
        with pytest.raises(ValueError, match=r"rows .number, hash of texts and lengths.: .32, "):
            record.compare_record(checkpoint, record_of(light, other))


def test_another_adapter_than_the_checkpoints_is_refused(light, tmp_path):
    from lavin import LavinConfig

    model, config = AutoModel.from_pretrained(light, mma={"r": 4, "dropout": 0.0}), LavinConfig.from_pretrained(light)
    model.save_pretrained(tmp_path / "checkpoint-1")

    def check(**mma):
        values = {"model_name_or_path": str(light), "model_init_kwargs": {"mma": mma}}
        checks.check_adapter(said(**values), config, tmp_path / "checkpoint-1")

    check(r=4, dropout=0.0)
    for mma, match in [({}, "dropout: 0.0 there, 0.1 in the recipe; r: 4 there, 8"), ({"r": 4}, "dropout"),
                       ({"r": 4, "dropout": 0.0, "text_mlp": True}, "text_mlp: False there, True")]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            check(**mma)


@pytest.mark.parametrize("option", [["--resume_from_checkpoint", "false"], ["--resume_from_checkpoint=False"]])
def test_resume_false_is_not_passed_on(tmp_path, option):
    file = tmp_path / "x.yaml"
    file.write_text("seed: 1")
    found = said(resume_from_checkpoint="false")
    found.arguments[:] = ["--config", "x", *option, "--seed", "2"]
    assert train._without_false(found, file) == ["--config", "x", "--seed", "2"]
    file.write_text("resume_from_checkpoint: run/checkpoint-2")
    with pytest.raises(ValueError, match="names one: remove it there"):
        train._without_false(found, file)


@pytest.mark.parametrize(
    ("code", "again"), [(143, "the same"), (137, "the same"), (1, "once the cause is gone, the same")]
)
def test_what_to_do_after_a_failure(tmp_path, capsys, code, again):
    assert train._after_failure(said(output_dir=str(tmp_path)), code, 0) == code
    assert f"no whole checkpoint yet; {again} command starts" in capsys.readouterr().err


def test_zero2_in_bfloat16_is_warned_about():
    for stage, bf16, count in [(2, True, 1), (1, True, 1), (2, False, 0), (3, True, 0), (None, True, 0)]:
        found = said(**GOOD, bf16=bf16)
        found.zero_stage = stage
        warnings = checks.check_options(found)
        assert len(warnings) == count and all("--bf16 false" in warning for warning in warnings)


@pytest.mark.slow
def test_zero_stage_is_read_from_the_accelerate_config(worker, tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(ZERO3))
    values = {**CPU, "accelerate_config": str(tmp_path / "a.yaml")}
    assert parsed(worker, tmp_path, values).zero_stage == 3
    assert parsed(worker, tmp_path, values, "--zero_stage", "2").zero_stage == 2
    assert parsed(worker, tmp_path, CPU).zero_stage is None


def test_a_second_launcher_is_kept_out(tmp_path):
    with train.locked(tmp_path / "run", 0):
        with pytest.raises(ValueError, match="Another `lavin train`"), train.locked(tmp_path / "run", 0):
            pass
    with train.locked(tmp_path / "run", 0):
        pass


@pytest.mark.parametrize(
    ("rows_", "values", "processes", "expected"),
    [
        (
            12_726,
            {"num_train_epochs": 20, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            2,
            7960,
        ),
        (10, {"per_device_train_batch_size": 4, "dataloader_drop_last": True}, 1, 6),
        (10, {"per_device_train_batch_size": 4, "num_train_epochs": 0.5}, 1, 2),
        (10, {"max_steps": 7}, 1, 7),
    ],
)
def test_steps_are_counted_as_trainer_counts_them(rows_, values, processes, expected):
    assert train.count_steps(said(processes, **values), rows_) == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one process", "zero3"])
def test_nan_stops_the_run_before_it_is_saved(light, rows, tmp_path, layout):
    """The first step has a learning rate of 0, the second one that leaves nothing useful. No rank hangs."""
    command = recipe(
        tmp_path, light, rows, max_steps=6, save_steps=1, save_total_limit=1, learning_rate=1e30, warmup_steps=3,
        lr_scheduler_type="constant_with_warmup", max_grad_norm=0.0,
    )  # fmt: skip
    if layout == "zero3":
        (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(ZERO3))
        command += ["--accelerate_config", str(tmp_path / "accelerate.yaml")]
    log = run(command, code=1)
    assert "FloatingPointError: The adapter is not saved: " in log and "Training has diverged" in log
    last, broken = checkpoints.last_whole(tmp_path / "run")
    assert f"The last whole checkpoint is {last};" in log and broken
    AutoModel.from_pretrained(last)
    assert all(value.isfinite().all() for value in adapter(last).values())


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_full_and_read_only_disks(light, rows, tmp_path, small_disk):
    """The disk fills up while the run goes on; then it is mounted read-only."""
    output = small_disk / "run"
    command = recipe(tmp_path, light, rows, output, save_total_limit=2, max_steps=200)
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, stdin=subprocess.DEVNULL)
    wait_for(lambda: launcher.poll() is not None or len(list(output.glob("checkpoint-*/trainer_state.json"))) > 1)
    try:
        with open(small_disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(2**12))
    except OSError as error:
        assert error.errno == 28
    assert launcher.wait(300) not in (0, 2)
    text = (tmp_path / "log").read_text()
    assert "The disk is full" in text
    last = Path(re.search(r"The last whole checkpoint is (\S+);", text)[1])
    assert checkpoints.checkpoint_problem(last) is None
    AutoModel.from_pretrained(last)
    assert "free, and the checkpoints to come need" in run(command, code=2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert re.search("error: The output folder .* cannot be written", run(command, code=2))
    AutoModel.from_pretrained(last)


@pytest.mark.slow
def test_rows_beyond_max_length_are_refused_by_the_command(light, rows, tmp_path):
    log = run([*recipe(tmp_path, light, rows, max_length=...), "--max_length", "40"], code=2)
    assert re.search(r"lavin train: error: \d+ of 32 train rows are longer than 40 ", log)
    assert "$ trl" not in log and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_edited_recipe_does_not_go_on_unnoticed(finished, light, rows, tmp_path):
    """By the real command: refused with names and values; a longer run goes on with a warning, and the rate jumps."""
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    moved = tmp_path / "moved.parquet"
    shutil.copy(rows, moved)
    command = recipe(tmp_path, light, moved)
    log = run([*command, "--learning_rate", "0.02", "--gradient_accumulation_steps", "2"], code=2)
    assert "learning_rate: 0.01 before, 0.02 now" in log and "gradient_accumulation_steps): 4 before, 8 now" in log
    assert "model_name_or_path: " + str(output) in log and "another `output_dir`" in log and "$ trl" not in log
    log = run([*command, "--model_init_kwargs", '{"mma": {"r": 4}}'], code=2)
    assert "checkpoint-24 holds an adapter with other settings" in log and "r: 8 there, 4 in the recipe" in log
    log = run([*command, "--resume_from_checkpoint", "false"], code=2)
    assert "an earlier run" in log
    log = run([*command, "--max_steps", "26"])
    assert "Warning: the run is now 26 steps long instead of 24" in log and "Starts       at step 24" in log
    history = checkpoints.read_state(output / "checkpoint-26")["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates[25] > rates[24], "the old schedule would stay at 0"
    assert "24 steps" not in run([*command, "--max_steps", "26"]) and losses(output)[:24] == losses(finished[0])
    assert "steps (max_steps, num_train_epochs): 26 before, 20 now" in run([*command, "--max_steps", "20"], code=2)


@pytest.mark.slow
def test_resume_false_never_reaches_trl(light, rows, tmp_path):
    log = run([*recipe(tmp_path, light, rows, max_steps=1), "--resume_from_checkpoint", "false"])
    assert "Starts       at the beginning" in log and "resume_from_checkpoint" not in log


@pytest.mark.slow
def test_two_processes_stop_and_go_on(light, rows, tmp_path):
    """SIGTERM for the launcher alone ends all ranks; the same command goes on; what it leaves loads."""
    command = recipe(tmp_path, light, rows, per_device_train_batch_size=2, max_steps=60)
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(DDP))
    command += ["--accelerate_config", str(tmp_path / "accelerate.yaml")]
    output = tmp_path / "run"
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, stdin=subprocess.DEVNULL)
    wait_for(lambda: launcher.poll() is not None or list(output.glob("checkpoint-*/trainer_state.json")))
    started = psutil.Process(launcher.pid).children(recursive=True)
    launcher.terminate()
    assert launcher.wait(120) == 128 + signal.SIGTERM
    wait_for(lambda: not any(alive(process.pid) for process in started), 60)
    text = (tmp_path / "log").read_text()
    assert "Batch        2 processes x 2 rows x 1 accumulated = 4 rows" in text
    assert "Stopped." in text and "the same command goes on from it" in text
    log = run(command)
    assert "Starts       at step" in log and AutoModel.from_pretrained(output).active_adapters() == ["mma"]
    assert AutoProcessor.from_pretrained(output).image_token == "<image>"
