"""`lavin doctor --model`: healthy is green, every damage is red, and doing what its line says mends it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import fill
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_folders import PUSH, run
from transformers import LlamaConfig, LlamaForCausalLM

from lavin import LavinForConditionalGeneration, LavinProcessor
from lavin.recipes.cli import main
from lavin.recipes.doctor.report import FAIL, OK, SKIP, WARN, Line


WEIGHTS, SETTINGS = "mma/adapter_model.safetensors", "mma/adapter_config.json"
SHARD = "model-00002-of-0000"


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    """A light folder with a filled adapter, and the same base as a full folder of several files."""
    root = tmp_path_factory.mktemp("folders")
    names = str(pair / "vision"), str(pair / "text")
    light = LavinForConditionalGeneration.from_vision_text_pretrained(*names)
    light.save_pretrained(root / "light", full=False)
    light.save_pretrained(root / "full", full=True, max_shard_size="50KB")
    fill(LavinForConditionalGeneration.from_pretrained(root / "light", mma={})).save_pretrained(root / "trained")
    for name in ("trained", "full"):
        LavinProcessor.from_vision_text_pretrained(*names).save_pretrained(root / name)
    return root


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / name))


def doctor(capsys, *arguments) -> tuple[int, list[Line]]:
    """The command's exit code and its lines, as they are read."""
    capsys.readouterr()
    code = main(["doctor", *map(str, arguments)])
    lines = []
    for text in capsys.readouterr().out.splitlines()[:-1]:
        status, name, found = text[:4].strip(), text[6:24].strip(), text[24:]
        if status:
            lines.append(Line(status, name, found))
        else:
            lines[-1].do = text.partition("Do: ")[2]
    assert all(line.do for line in lines if line.status in (FAIL, WARN))
    return code, lines


def failed(lines) -> dict[str, Line]:
    return {line.name: line for line in lines if line.status == FAIL}


def edit(file: Path, **changes):
    content = json.loads(file.read_text())
    for key, value in changes.items():
        where, *path = content, *key.split("__")
        for part in path[:-1]:
            where = where[part]
        where[path[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["trained", "full"])
def test_a_healthy_folder_is_all_green(folders, capsys, name):
    code, lines = doctor(capsys, "--model", folders / name)
    assert code == 0 and {line.status for line in lines} <= {OK, SKIP}, lines
    green = {line.name for line in lines if line.status == OK}
    own = {"vision checkpoint", "text checkpoint", "adapter"} if name == "trained" else {"base weights"}
    assert green == {"config", "files", "auto_map", "processor"} | own


def test_a_light_folder_without_an_adapter_is_green(folders, capsys, copied):
    folder = copied("trained")
    shutil.rmtree(folder / "mma")
    code, lines = doctor(capsys, "--model", folder)
    assert code == 0 and not failed(lines)


@pytest.mark.parametrize(
    "file",
    [
        "modeling_lavin.py",
        "routing_lavin.py",  # named nowhere but in other files of the folder
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        WEIGHTS,
        SETTINGS,
    ],
)
def test_a_deleted_file_is_red_until_one_does_what_the_line_says(capsys, copied, folders, file):
    folder = copied("trained")
    (folder / file).unlink()
    code, lines = doctor(capsys, "--model", folder)
    line = failed(lines)["files"]
    assert code == 1 and f"{file} is missing" in line.found
    command = re.match(r"`(.*?)`( writes it anew\.)?$", line.do)
    if file.startswith("mma/"):
        assert "Copy `mma/` from a whole `checkpoint-N`" in line.do
        shutil.copytree(folders / "trained" / "mma", folder / "mma", dirs_exist_ok=True)
    elif code_line := re.match(r'python -c "(.*)"$', command[1]):
        exec(code_line[1], {})  # in this process: imports take their time
    else:
        subprocess.run(command[1], shell=True, check=True)
    code, lines = doctor(capsys, "--model", folder)
    assert code == 0 and not failed(lines), failed(lines)


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[:-64])


def change_tensor(file: Path, change):
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def nan(tensor):
    tensor[0, 0] = float("nan")
    return tensor


def shard(folder: Path) -> Path:
    return next(folder.glob(f"{SHARD}*"))


DAMAGES = {  # kind of folder, damage, {name of a red line: words of it and of its way out}
    "config.json deleted": (
        "trained",
        lambda f: (f / "config.json").unlink(),
        {"config": ("is no LaVIN folder", "lavin init")},
    ),
    "config.json cut off": (
        "trained",
        lambda f: truncate(f / "config.json"),
        {"config": ("config.json cannot be read", "again")},
    ),
    "another model": ("trained", lambda f: edit(f / "config.json", model_type="bert"), {"config": ("bert", "init")}),
    "adapter cut off": ("trained", lambda f: truncate(f / WEIGHTS), {"adapter": ("cannot be read", "checkpoint-N")}),
    "a flipped bit in the adapter": (
        "trained",
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1] + b"\x55"),
        {"adapter": ("its bytes are not those that were saved", "checkpoint-N")},
    ),
    "NaN in the adapter": (
        "trained",
        lambda f: change_tensor(f / WEIGHTS, nan),
        {"adapter": ("NaN or infinity in 1 of", "earlier checkpoint")},
    ),
    "a tensor of another shape": (
        "trained",
        lambda f: change_tensor(f / WEIGHTS, lambda t: t[:, :-1]),
        {"adapter": ("in the adapter", "saved with it")},
    ),
    "settings of another adapter": (
        "trained",
        lambda f: edit(f / SETTINGS, r=4),
        {"adapter": ("another base or has other settings", SETTINGS)},
    ),
    "trained on a wider model": (
        "trained",
        lambda f: edit(f / "config.json", text_config__hidden_size=48, text_config__intermediate_size=64),
        {"adapter": ("in this model", "Name the base"), "text checkpoint": ("hidden_size is 32", "config.json")},
    ),
    "a processor of another number of image tokens": (
        "trained",
        lambda f: edit(f / "processor_config.json", num_image_tokens=6),
        {"processor": ("num_image_tokens is 6, the model's 2", "num_image_tokens=2")},
    ),
    "an image token of another id": (
        "trained",
        lambda f: edit(f / "config.json", image_token_id=7),
        {"processor": ("the model's 7", "LavinProcessor")},
    ),
    "a processor of another image size": (
        "trained",
        lambda f: edit(f / "processor_config.json", image_processor__size={"height": 14, "width": 14}),
        {"processor": ("images of 14 x 14 pixels, the model's are 28 x 28", "LavinProcessor")},
    ),
    "a chat template without images": (
        "trained",
        lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].role }}"),
        {"processor": ("0 image tokens for one image", "LavinProcessor")},
    ),
    "auto_map names a missing file": (
        "trained",
        lambda f: edit(f / "config.json", auto_map__AutoModel="other_lavin.LavinForConditionalGeneration"),
        {"auto_map": ("other_lavin.LavinForConditionalGeneration", '"AutoModel": "modeling_lavin.Lavin')},
    ),
    "auto_map names a missing class": (
        "trained",
        lambda f: edit(f / "config.json", auto_map__AutoModel="modeling_lavin.Other"),
        {"auto_map": ("'modeling_lavin.Other'", "modeling_lavin.LavinFor")},
    ),
    "auto_map asks for code of another repository": (
        "trained",
        lambda f: edit(f / "config.json", auto_map__AutoModel="other/repo--modeling_lavin.Lavin"),
        {"auto_map": ("'other/repo--", "modeling_lavin.LavinFor")},
    ),
    "auto_map asks for a file outside": (
        "trained",
        lambda f: edit(f / "config.json", auto_map__AutoConfig="../configuration_lavin.LavinConfig"),
        {"auto_map": ("'../configuration_lavin", "configuration_lavin.LavinConfig")},
    ),
    "the processor does not say where its code is": (
        "trained",
        lambda f: edit(f / "processor_config.json", auto_map={}),
        {"auto_map": ("AutoProcessor in processor_config.json is None", "LavinProcessor")},
    ),
    "code without its class": (
        "trained",
        lambda f: (f / "processing_lavin.py").write_text("# cut off\n"),
        {"auto_map": ("processing_lavin.py does not define LavinProcessor", "cp ")},
    ),
    "code that is no Python": (
        "trained",
        lambda f: (f / "modeling_lavin.py").write_text("<html>"),
        {"auto_map": ("modeling_lavin.py is no Python", "cp ")},
    ),
    "a checkpoint that is gone": (
        "trained",
        lambda f: edit(f / "config.json", text_checkpoint__name=str(f / "gone")),
        {"text checkpoint": ("gone", "Put the checkpoint there")},
    ),
    "a checkpoint that was never downloaded": (
        "trained",
        lambda f: edit(f / "config.json", vision_checkpoint={"name": "nobody/nothing", "revision": "v1"}),
        {"vision checkpoint": ("cannot be reached", "`hf download nobody/nothing --revision v1`")},
    ),
    "no checkpoint named": (
        "trained",
        lambda f: edit(f / "config.json", text_checkpoint=None),
        {"text checkpoint": ("neither weights nor the name", "text_checkpoint")},
    ),
    "a missing shard": ("full", lambda f: shard(f).unlink(), {"files": (f"{SHARD}", "Download the folder again")}),
    "a shard cut off": ("full", lambda f: truncate(shard(f)), {"base weights": (SHARD, "Download the folder again")}),
    "NaN in a shard": (
        "full",
        lambda f: change_tensor(next(s for s in sorted(f.glob("model-*")) if has_matrix(s)), nan),
        {"base weights": ("holds NaN or infinity", "again")},
    ),
    "a shard of another checkpoint": (
        "full",
        lambda f: save_file({"x": torch.zeros(2)}, shard(f)),
        {"base weights": ("which the index places there", "again")},
    ),
}


def has_matrix(file: Path) -> bool:
    return any(tensor.dim() == 2 for tensor in load_file(file).values())


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_a_red_line_of_its_own(capsys, copied, damage, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kind, break_it, expected = DAMAGES[damage]
    folder = copied(kind)
    break_it(folder)
    code, lines = doctor(capsys, "--model", folder)
    red = failed(lines)
    assert code == 1 and red.keys() == expected.keys(), red
    for name, (found, do) in expected.items():
        assert found in red[name].found and do in red[name].do, red[name]


def test_a_base_without_weights_or_a_shard(capsys, copied, pair, tmp_path):
    folder = copied("trained")
    text = Path(shutil.copytree(pair / "text", tmp_path / "text"))
    edit(folder / "config.json", text_checkpoint__name=str(text))
    (text / "model.safetensors").unlink()
    _, lines = doctor(capsys, "--model", folder)
    assert "lacks weights" in failed(lines)["text checkpoint"].found
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = json.loads((text / "config.json").read_text())["vocab_size"]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, **sizes))
    model.save_pretrained(text, max_shard_size="50KB")
    assert doctor(capsys, "--model", folder)[0] == 0
    shard(text).unlink()
    _, lines = doctor(capsys, "--model", folder)
    assert SHARD in failed(lines)["text checkpoint"].found


def test_names_that_are_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    _, lines = doctor(capsys, "--model", "nobody/nothing")
    assert "the Hub cannot be asked" in failed(lines)["config"].found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (tmp_path / "none", "nobody/nothing"):
        code, lines = doctor(capsys, "--model", name)
        assert code == 1 and failed(lines).keys() == {"config"}
        assert {line.status for line in lines[1:]} == {SKIP}


@pytest.mark.slow
def test_a_repository_of_the_hub(hub, folders, tmp_path):
    """Its small files are fetched, its weights are not; what was pushed without a file is red."""
    (tmp_path / "damaged").mkdir()
    for file in (folders / "light").iterdir():
        shutil.copy(file, tmp_path / "damaged") if file.name != "tuner_lavin.py" else None
    run(PUSH, {"org/full": str(folders / "full"), "org/damaged": str(tmp_path / "damaged")}, **hub)
    environment = {**os.environ, **hub, "HF_HOME": str(tmp_path / "home")}
    found = {}
    for name in ("org/full", "org/damaged", "org/none"):
        command = [str(Path(sys.executable).with_name("lavin")), "doctor", "--model", name]
        found[name] = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found["org/full"].returncode == 0, found["org/full"]
    assert re.search("skip  base weights .* files are not here: not read", found["org/full"].stdout)
    assert not list((tmp_path / "home").rglob("snapshots/*/model*.safetensors"))
    damaged = found["org/damaged"]
    assert damaged.returncode == 1 and "tuner_lavin.py is missing" in damaged.stdout
    assert "`hf upload org/damaged " in damaged.stdout
    assert found["org/none"].returncode == 1 and "not on the Hub" in found["org/none"].stdout
