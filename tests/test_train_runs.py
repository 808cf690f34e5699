"""Whole runs of `lavin train`: kills, signals, full disks, adapters that are not finite, edited recipes."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import training
import yaml
from conftest import tiny_peft
from safetensors.torch import load_file
from training import DDP, ENVIRONMENT, ZERO3, adapter, alive, distance, losses, recipe, run, said, wait_for
from transformers import AutoModel, AutoProcessor

from lavin.recipes.train import checkpoints, launch, train


light, rows, finished, small_disk = training.light, training.rows, training.finished, training.small_disk


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


@pytest.mark.parametrize(("code", "expected"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("0", 0)])
def test_exit_code_and_environment_of_the_run(code, expected):
    assert launch.run_watched([sys.executable, "-c", f"import os, sys; {code}"]) == expected
    assert launch.MARK not in os.environ


# Whole runs


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


@pytest.mark.parametrize(
    ("code", "again"), [(143, "the same"), (137, "the same"), (1, "once the cause is gone, the same")]
)
def test_what_to_do_after_a_failure(tmp_path, capsys, code, again):
    assert train._after_failure(said(output_dir=str(tmp_path)), code, 0) == code
    assert f"no whole checkpoint yet; {again} command starts" in capsys.readouterr().err


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
    assert "adapter's r: 8 before, 4 now" in log
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
