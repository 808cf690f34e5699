"""The command `lavin`: what it writes, what it says of bad input, its exit codes."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_reference import FIXTURE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from lavin import LavinForConditionalGeneration, LavinProcessor
from lavin.recipes.cli import main


CHECKPOINT, TEXT, VISION = (str(FIXTURE / name) for name in ("checkpoint-19.pth", "llama", "clip"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny Llama with a tokenizer, in bfloat16, and a whole CLIP."""
    folder = tmp_path_factory.mktemp("pair")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        ["Image: N/A Response: a red circle"],
        trainers.BpeTrainer(special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.save_pretrained(folder / "text")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)
    AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16).save_pretrained(folder / "text")
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **{**shape, "num_hidden_layers": 8}).to_dict()
    clip = CLIPConfig(vision_config=vision, text_config={"vocab_size": 9, **shape}, projection_dim=8)
    CLIPModel(clip).save_pretrained(folder / "clip")
    return str(folder / "clip"), str(folder / "text")


def init(pair, output, *more) -> list[str]:
    return ["init", "--vision", pair[0], "--text", pair[1], "--output", str(output), *more]


def convert(output, *more) -> list[str]:
    return ["convert", CHECKPOINT, "--text-model", TEXT, "--vision-model", VISION, "--output", str(output), *more]


def fails(capsys, arguments, *words):
    """The command ends with 2 and one message, without a traceback."""
    assert main(arguments) == 2
    _, found, message = capsys.readouterr().err.partition(f"lavin {arguments[0]}: error: ")
    assert found and "Traceback" not in message
    for word in words:
        assert word in message, message


def test_init_writes_a_light_folder_without_loading_weights(pair, tmp_path, monkeypatch, capsys):
    def forbidden(*args, **kwargs):
        raise AssertionError("`lavin init` loads no weights")

    monkeypatch.setattr("lavin.folder_lavin.read_towers", forbidden)
    assert main(init(pair, tmp_path / "new" / "lavin")) == 0
    monkeypatch.undo()
    folder = tmp_path / "new" / "lavin"
    assert "Wrote" in capsys.readouterr().out
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"} <= files
    assert {"README.md", "tokenizer.json", "modeling_lavin.py", "processing_lavin.py"} <= files
    assert not [name for name in files if name.endswith((".safetensors", ".bin"))] and "mma" not in files
    config = json.loads((folder / "config.json").read_text())
    assert config["text_checkpoint"]["name"] == pair[1] and config["dtype"] == "bfloat16"
    classes = {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoProcessor"}
    assert set(config["auto_map"]) == classes
    assert "Trainable parameters" in (folder / "README.md").read_text()
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert isinstance(model, LavinForConditionalGeneration) and isinstance(processor, LavinProcessor)
    assert model.dtype == torch.bfloat16 and processor.num_image_tokens == 2
    same = LavinForConditionalGeneration.from_vision_text_pretrained(*pair)
    assert model.generation_config.to_dict() == same.generation_config.to_dict()
    assert model.config.image_token_id == same.config.image_token_id == processor.image_token_id


def test_init_options(pair, tmp_path):
    options = ["--projector-hidden-size", "4", "--vision-feature-layers", "1", "3", "8", "--preprocessing", "clip"]
    assert main(init(pair, tmp_path / "full", "--full", *options)) == 0
    model, processor = (c.from_pretrained(tmp_path / "full") for c in (AutoModel, AutoProcessor))
    assert (tmp_path / "full" / "model.safetensors").exists()
    assert model.config.projector_hidden_size == 4 and model.config.vision_feature_layers == [1, 3, 8]
    assert processor.num_image_tokens == 3 and processor.image_processor.do_center_crop
    text = AutoModelForCausalLM.from_pretrained(pair[1])
    assert torch.equal(model.lm_head.weight, text.lm_head.weight)


def test_init_twice(pair, tmp_path, capsys):
    """A light folder may be written again; one with trained weights may not."""
    assert main(init(pair, tmp_path / "a")) == main(init(pair, tmp_path / "a")) == 0
    AutoModel.from_pretrained(tmp_path / "a", mma={}).save_pretrained(tmp_path / "a")
    fails(capsys, init(pair, tmp_path / "a"), "is a LaVIN with weights (mma)", "Name a new")
    assert main(init(pair, tmp_path / "b", "--full")) == 0
    fails(capsys, init(pair, tmp_path / "b"), "is a LaVIN with weights (model.safetensors)")


@pytest.mark.parametrize("command", [init, lambda pair, output: convert(output)], ids=["init", "convert"])
def test_output_folder(command, pair, tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    fails(capsys, command(pair, file), "is a file")
    fails(capsys, command(pair, file / "below"), "cannot be written")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    fails(capsys, command(pair, other), "holds something else (thesis.txt)")
    (other / "config.json").write_text('{"model_type": "bert"}')
    fails(capsys, command(pair, other), "holds another model")
    assert {path.name for path in other.iterdir()} == {"thesis.txt", "config.json"} and file.read_text() == "mine"
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid() == 0:  # whom permissions do not stop
        monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != str(closed))
    fails(capsys, command(pair, closed / "lavin"), "cannot be written", "permissions")
    assert not list(closed.iterdir())
    cloned = tmp_path / "cloned"  # an empty repository of the Hub
    (cloned / ".git").mkdir(parents=True)
    assert main(command(pair, cloned)) == 0


def test_init_with_bad_checkpoints(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    vision, text = pair
    out = str(tmp_path / "out")
    fails(capsys, init(("nobody/nothing", text), out), "vision checkpoint nobody/nothing cannot be reached", "hf auth")
    fails(capsys, init((vision, str(tmp_path)), out), f"text checkpoint {tmp_path} has no config.json")
    fails(capsys, init((f"{tmp_path}/nothing", text), out), f"vision checkpoint {tmp_path}/nothing cannot be reached")
    fails(capsys, init((text, text), out), "is no vision tower")
    fails(capsys, init((vision, VISION), out), "is no language model")
    fails(capsys, init((vision, TEXT), out), "has no tokenizer")
    fails(capsys, init(pair, out, "--vision-feature-layers", "9"), "between 1 and 8")
    fails(capsys, init(pair, out, "--projector-hidden-size", "0"), "must be at least 1")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nothing-known"}')
    fails(capsys, init((vision, str(tmp_path / "odd")), out), "is no model that transformers knows")
    assert not os.path.exists(out)


def test_convert(tmp_path, capsys):
    assert main(convert(tmp_path / "out", "--temperature", "5")) == 0
    assert f"No processor was written: {TEXT} has no tokenizer." in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "mma" / "adapter_config.json").read_text())
    assert config["router_temperature"] == 5.0 and config["scale"] == 1.0
    fails(capsys, convert(tmp_path / "other", "--adapter-dim", "4"), "layers.0.adapter_attn.conv_A.weight: (8, 32)")
    fails(capsys, ["convert", __file__, *convert(tmp_path / "other")[2:]], "is no PyTorch checkpoint")
    assert not (tmp_path / "other").exists()


TRL_CARD = "---\nmodel_name: x\ntags:\n- generated_from_trainer\n---\n# Model Card for x\n"


def test_card_over_a_trainers(pair, tmp_path, capsys, monkeypatch):
    main(init(pair, tmp_path / "light"))
    AutoModel.from_pretrained(tmp_path / "light", mma={"r": 4}).save_pretrained(tmp_path / "trained")
    card = tmp_path / "trained" / "README.md"
    ours = card.read_text()
    card.write_text(TRL_CARD)
    sent = []
    monkeypatch.setattr("huggingface_hub.HfApi.upload_file", lambda self, **arguments: sent.append(arguments))
    assert main(["card", str(tmp_path / "trained")]) == 0
    assert card.read_text() == ours and "r 4" in ours and "generated_from_trainer" not in ours and not sent
    card.write_text(ours.replace("# LaVIN", "# Mine").replace("r 4", "r 5"))
    assert main(["card", str(tmp_path / "trained"), "--push", "me/mine"]) == 0
    assert card.read_text() == ours.replace("# LaVIN", "# Mine")  # our facts again, the user's words kept
    assert [(upload["repo_id"], upload["path_in_repo"]) for upload in sent] == [("me/mine", "README.md")]
    card.write_text("# My own text\n")
    fails(capsys, ["card", str(tmp_path / "trained")], "written by somebody else")
    assert card.read_text() == "# My own text\n"


def test_card_of_a_light_folder_says_what_will_be_trained(pair, tmp_path):
    main(init(pair, tmp_path / "light"))
    card = tmp_path / "light" / "README.md"
    ours = card.read_text()
    card.unlink()
    assert main(["card", str(tmp_path / "light")]) == 0 and card.read_text() == ours
    model = AutoModel.from_pretrained(tmp_path / "light", mma={})
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"| Trainable parameters | {trained:,} |" in ours


def test_card_of_something_else(pair, tmp_path, capsys):
    fails(capsys, ["card", str(tmp_path)], "no LaVIN folder", "no config.json")
    fails(capsys, ["card", pair[1]], "of type 'llama'")
    assert not os.path.exists(os.path.join(pair[1], "README.md"))


def test_ask(pair, tmp_path, capsys):
    main(init(pair, tmp_path / "light"))
    capsys.readouterr()
    assert main(["ask", str(tmp_path / "light"), "What is this?", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.count("\n") >= 1
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    assert main(["ask", str(tmp_path / "light"), "What?", "--image", str(tmp_path / "red.png")]) == 0
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    fails(capsys, ["ask", str(tmp_path / "light"), "What?", "--image", str(broken)], "broken.png")
    missing = str(tmp_path / "missing.png")
    fails(capsys, ["ask", str(tmp_path / "light"), "What?", "--image", missing], f"There is no image {missing}.")
    fails(capsys, ["ask", str(tmp_path / "nothing"), "What?"], "There is no folder", "nothing")


def test_usage_errors_end_with_2():
    for arguments in ([], ["init"], ["convert", "x", "--adapter-type", "mlp"], ["sing"]):
        with pytest.raises(SystemExit) as exit_code:
            main(arguments)
        assert exit_code.value.code == 2


def test_installed_command(tmp_path):
    """The real command in a process of its own: exit codes, and one line instead of a traceback."""
    command = [sys.executable, "-m", "lavin.recipes.cli"]
    result = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("init", "convert", "card", "ask", "quickstart"))
    result = subprocess.run([*command, "card", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 2
    assert "lavin card: error:" in result.stderr and "Traceback" not in result.stderr


STANDIN = Path(__file__).parents[2] / "shared" / "tools" / "hub_standin.py"
PUSH = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo(sys.argv[1])
print(HfApi().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2]).oid)
"""


@pytest.fixture
def python(tmp_path):
    """Runs Python in a process whose Hub is the local stand-in, with an empty cache."""
    if not STANDIN.is_file():
        pytest.skip("needs the stand-in of the Hub")
    command = [sys.executable, STANDIN, "--port", "0", "--root", tmp_path / "hub", "--log", tmp_path / "log"]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.stdout.readline().strip()}", "HF_TOKEN": "hf_x"}
    hub.update(HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "cache"))

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env={**os.environ, **hub}, capture_output=True, text=True)

    yield run
    server.kill()


@pytest.mark.slow
def test_card_push_with_the_real_client(pair, python, tmp_path):
    """TRL has pushed a folder with its own card: ours takes its place, and no other file is touched."""
    folder = tmp_path / "trained"
    main(init(pair, folder))
    ours = (folder / "README.md").read_bytes()
    (folder / "README.md").write_text(TRL_CARD)
    assert python("-c", PUSH, "me/mine", folder).returncode == 0
    pushed = python("-m", "lavin.recipes.cli", "card", folder, "--push", "me/mine")
    refused = python("-m", "lavin.recipes.cli", "card", folder, "--push", "me/nothing")
    assert pushed.returncode == 0 and "Pushed it to me/mine." in pushed.stdout, pushed.stderr
    assert refused.returncode == 2 and "lavin card: error:" in refused.stderr and "Traceback" not in refused.stderr
    snapshots = (tmp_path / "hub" / "models" / "me" / "mine" / "snapshots").iterdir()
    states = [{str(f.relative_to(s)): f.read_bytes() for f in s.rglob("*") if f.is_file()} for s in snapshots]
    (new,) = [state for state in states if state.get("README.md") == ours]
    (old,) = [state for state in states if state.get("README.md") == TRL_CARD.encode()]
    assert {name: data for name, data in new.items() if old.get(name) != data} == {"README.md": ours}


@pytest.mark.slow
def test_init_from_the_hub_pins_the_commits(pair, python, tmp_path):
    commits = [python("-c", PUSH, f"org/{Path(folder).name}", folder).stdout.strip() for folder in pair]
    result = python("-m", "lavin.recipes.cli", *init(("org/clip", "org/text"), tmp_path / "light"))
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "light" / "config.json").read_text())
    for kind, name, commit in zip(("vision", "text"), ("clip", "text"), commits, strict=True):
        assert len(commit) == 40 and config[f"{kind}_checkpoint"] == {"name": f"org/{name}", "revision": commit}
        assert f"- org/{name}\n" in (tmp_path / "light" / "README.md").read_text()
    # No weight was fetched.
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
