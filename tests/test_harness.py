"""LaVIN in lmms-eval: an environment with the extra `harness`, and the answers and accuracy of `lavin eval`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModel, AutoProcessor

from lavin.recipes.init import init_folder
from lavin.recipes.quickstart.data import write_dataset
from lavin.recipes.quickstart.quickstart import TAPS, TINY


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # with its environment, which is gigabytes
ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
UNREACHABLE = (
    "ConnectionError",
    "NewConnectionError",
    "Connection refused",
    "Max retries",
    "Temporary failure",
    "timed",
)


def run(*command, **environment) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    # Not from the checkout, in which `lavin` is found without an installation.
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, cwd=sys.prefix
    )


def check(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Python of an environment as recipes/harness/README.md makes it, from a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("harness")
    pip = [sys.executable, "-m", "pip"]
    probe = run(*pip, "download", "--no-deps", "--retries", "1", "-d", folder / "probe", "lmms-eval")
    if probe.returncode and any(sign in probe.stdout + probe.stderr for sign in UNREACHABLE):
        pytest.skip("the package index cannot be reached")
    source, home = folder / "lavin", folder / "env"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT)
    check(run(sys.executable, "-m", "venv", home))
    python = home / "bin" / "python"
    check(
        run(python, "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", f"{source}[harness]")
    )
    check(run(python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "timm"))
    yield python
    shutil.rmtree(folder)  # gigabytes


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A tiny LaVIN that knows how to answer, with noise in its adapter; rows; and what `lavin eval` says of both."""
    folder = tmp_path_factory.mktemp("asked")
    write_dataset(folder / "data", {"train": (1, 1, 1, 1), "test": (16, 16, 8, 8)})
    init_folder(TINY / "vision", TINY / "text", folder / "light", vision_feature_layers=TAPS)
    model, generator = AutoModel.from_pretrained(folder / "light", mma={}), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty(parameter.shape).normal_(generator=generator) * 0.02)
    model.save_pretrained(folder / "model")
    AutoProcessor.from_pretrained(folder / "light").save_pretrained(folder / "model")
    lavin = Path(sys.executable).with_name("lavin")
    split = ["--root", folder / "data", "--split", "test", "--output"]
    check(run(lavin, "data", "scienceqa", *split, folder / "rows"))
    # Other batches than below: they must not matter.
    check(run(lavin, "eval", "scienceqa", "--model", folder / "model", *split, folder / "eval", "--batch-size", "5"))
    return folder


def test_answers_and_accuracy_are_those_of_lavin_eval(harness, asked):
    """The model comes by its entry point, the task from the installed package; the exit status says nothing."""
    tasks = check(run(harness, "-c", "from lavin.recipes.harness import TASKS; print(TASKS)")).split()[-1]
    assert Path(tasks).is_relative_to(harness.parent.parent)
    done = run(
        harness, "-m", "lmms_eval", "--model", "lavin", "--model_args", f"pretrained={asked / 'model'}", "--tasks",
        "lavin_scienceqa", "--include_path", tasks, "--batch_size", "16", "--device", "cpu", "--log_samples",
        "--output_path", asked / "out", LAVIN_SCIENCEQA=str(asked / "rows"), HF_HOME=str(asked / "home"),
    )  # fmt: skip
    files = sorted((asked / "out").rglob("*_results.json"))
    assert len(files) == 1, done.stdout[-4000:] + done.stderr[-4000:]
    scores = json.loads(files[0].read_text())["results"]["lavin_scienceqa"]
    expected = json.loads((asked / "eval" / "results.json").read_text())
    assert round(100 * scores["accuracy,none"], 2) == expected["scores"]["AVG"]
    assert round(48 * scores["unparsable,none"]) == expected["unparsable"]
    assert 0.2 < scores["accuracy,none"] < 0.9  # neither all right nor all wrong, so that equality says something

    lines = (asked / "eval" / "predictions.jsonl").read_text().splitlines()[1:]
    answers = {record["id"]: record["answer"].strip() for record in map(json.loads, lines)}
    rows = load_dataset("parquet", data_files=str(asked / "rows" / "*.parquet"), cache_dir=str(asked / "cache"))[
        "train"
    ]
    samples = [json.loads(line) for line in next((asked / "out").rglob("*samples*.jsonl")).read_text().splitlines()]
    theirs = {rows[sample["doc_id"]]["id"]: sample["filtered_resps"] for sample in samples}
    assert theirs == answers and len(answers) == 48
    assert len({theirs[row["id"]] for row in rows if row["images"]}) > 10  # the images are seen


SETTINGS = """
from lavin.recipes.harness.lmms import Lavin, cut, read_settings

def refused(error, function, *arguments):
    try:
        function(*arguments)
    except error as raised:
        return str(raised)
    raise AssertionError("not refused")

assert read_settings({"max_new_tokens": 16, "until": ["a"], "temperature": 0, "do_sample": False}) == (16, ("a",))
assert read_settings({"until": "a", "num_beams": 1, "top_p": None}) == (64, ("a",))
for wish in ({"temperature": 0.7}, {"do_sample": True}, {"num_beams": 3}):
    assert "--gen_kwargs" in refused(ValueError, read_settings, wish)
assert cut("yes. no; more", (";", ".")) == "yes" and cut("yes", (";", "")) == "yes" and cut("yes", ()) == "yes"
assert "--mode letters" in refused(NotImplementedError, Lavin.loglikelihood, None, [])
"""


def test_settings_of_a_task_are_kept_or_refused(harness):
    check(run(harness, "-c", SETTINGS))
