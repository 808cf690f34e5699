"""
What README.md and docs/own-data.md show is run here, in its order, in one folder. The names of checkpoints of the Hub
stand for tiny random ones; nothing else is changed. Other pages: `test_docs.py`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lavin.recipes.cli import build_parser, main
from lavin.recipes.quickstart.data import write_dataset


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIXTURE = ROOT / "tests" / "fixtures" / "lavin_reference"
NAMES = {
    "openai/clip-vit-large-patch14": "tiny-clip",
    "huggyllama/llama-7b": "tiny-llama",
    "org/lavin-7b": "org-lavin-7b",
    "checkpoint-19.pth": str(FIXTURE / "checkpoint-19.pth"),
}


def blocks(language: str, *pages: str) -> list[str]:
    """Fenced blocks of some pages, those of the README by default."""
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages or ("README.md",))
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)
    for name, local in NAMES.items():
        found = [block.replace(name, local) for block in found]
    return found


def commands(name: str, *pages: str) -> list[list[str]]:
    lines = "".join(blocks("bash", *pages)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{name} ")]


def run_python(*pages: str):
    for page in pages:
        namespace = {}
        for block in blocks("python", page):
            exec(compile(block, page, "exec"), namespace)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README is read: a picture, and the tiny checkpoints its names stand for."""
    folder = tmp_path_factory.mktemp("readme")
    Image.new("RGB", (20, 20), "red").save(folder / "picture.png")
    write_dataset(folder / "ScienceQA", {"train": (4, 0, 4, 0), "test": (2, 0, 2, 0)})
    (folder / "images").mkdir()
    Image.new("RGB", (20, 20), "blue").save(folder / "images" / "blue.png")
    alpaca = [{"instruction": "Name a colour.", "input": "", "output": "Blue."}]
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Blue."}]
    for name, content in {
        "alpaca_data": alpaca,
        "llava_instruct": [{"id": "1", "image": "blue.png", "conversations": turns}],
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = CLIPVisionConfig(num_hidden_layers=8, image_size=8, patch_size=4, **shape)
    CLIPVisionModel(vision).save_pretrained(folder / "tiny-clip")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([README], trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.save_pretrained(folder / "tiny-llama")
    text = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **shape)
    LlamaForCausalLM(text).save_pretrained(folder / "tiny-llama")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["init", "--vision", "tiny-clip", "--text", "tiny-llama", "--output", "org-lavin-7b"]) == 0
        AutoModel.from_pretrained("org-lavin-7b", mma={}).save_pretrained("org-lavin-7b")
        run_python("README.md", "docs/own-data.md")
    finally:
        os.chdir(before)
    return folder


@pytest.mark.main_path
def test_python_blocks_run(folder):
    assert (len(blocks("python")), len(blocks("python", "docs/own-data.md"))) == (1, 3)
    assert (folder / "my-lavin" / "config.json").is_file() and not list((folder / "my-lavin").glob("*.safetensors"))
    assert (folder / "train.parquet").is_file()


def test_lavin_commands_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    pages = ("README.md", "docs/own-data.md", "docs/idea.md", "docs/migration.md", "docs/serving.md")
    seen = {tuple(command[1:]) for command in commands("lavin", *pages)}
    known = {"doctor", "ask", "init", "data", "train", "eval", "card", "convert", "export", "serve"}
    assert {command[0] for command in seen} == known
    for command in sorted(seen):
        # What needs a training (below), a Hub (`test_cli.py`), a client (`test_serve.py`) or half a minute
        # (`test_doctor.py`): its options are known.
        if command[0] in ("train", "eval", "card", "serve", "doctor") or "my-lavin-mma" in command:
            build_parser().parse_args(command)
            continue
        # A released adapter belongs to one base; the fixture has its own.
        base = {"tiny-llama": f"{FIXTURE}/llama", "tiny-clip": f"{FIXTURE}/clip"} if command[0] == "convert" else {}
        assert main([base.get(word, word) for word in command]) == 0, command
    assert (folder / "lavin-7b" / "mma" / "adapter_model.safetensors").is_file()
    assert list(folder.glob("data/scienceqa/train-*.parquet")) and list(folder.glob("data/instructions/*.parquet"))
    assert (folder / "lavin-7b-plain" / "image" / "image_tokens.pt2").is_file()
    assert "Wrote my-lavin" in capsys.readouterr().out


def test_readme_is_one_screen_and_its_numbers_stand_elsewhere():
    assert len(README.splitlines()) < 180
    (quickstart,) = re.findall(r"<!-- quickstart:numbers -->\n(.*?)<!-- /quickstart:numbers -->", README, flags=re.S)
    pages = ("docs/benchmarks.md", "recipes/serve/README.md", "recipes/compare/README.md")
    sources = quickstart + "".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    headlines = README.partition("## Numbers")[2].partition("**Rivals")[0]
    figures = re.findall(r"\d+\.\d+|\d{1,3}(?:,\d{3})+", headlines)
    assert len(figures) > 10 and [figure for figure in figures if figure not in sources] == []


@pytest.mark.slow
def test_training_with_the_readmes_yaml(folder, monkeypatch):
    """`trl sft` and `lavin train` on the rows and the YAML of the README, then its evaluation and cards."""
    (block,) = blocks("yaml")
    assert yaml.safe_load(block)["output_dir"] == "my-lavin-mma"
    (folder / "sft.yaml").write_text(block, encoding="utf-8")
    (command,) = commands("trl")
    assert command == ["trl", "sft", "--config", "sft.yaml"]
    cpu = re.search(r"Without a GPU add `(.*?)`", README).group(1).split()
    result = subprocess.run(
        [sys.executable, "-m", "trl.scripts.sft", *command[2:], *cpu, "--max_steps", "2", "--report_to", "none"],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    trained = folder / "my-lavin-mma"
    assert (trained / "mma" / "adapter_model.safetensors").is_file() and not (trained / "model.safetensors").exists()
    card = (trained / "README.md").read_text()
    assert "Trainable parameters" in card
    assert main(["card", str(trained)]) == 0 and (trained / "README.md").read_text() == card
    monkeypatch.chdir(folder)
    train, evaluate, results = (
        next(
            c[1:]
            for c in commands("lavin", "docs/own-data.md")
            if c[1] == name and (name != "card" or "--results" in c)
        )
        for name in ("train", "eval", "card")
    )
    assert main([*train, *cpu, "--max_steps", "3", "--report_to", "none"]) == 0  # goes on from the run above
    assert json.loads((trained / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    assert main(evaluate) == 0 and main(results) == 0
    assert "model-index" in (trained / "README.md").read_text()
