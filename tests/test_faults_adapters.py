"""Damaged, foreign and hostile adapters and checkpoints, by the calls that a user loads them with."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from faults import folder, happened, refused  # noqa: F401
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from lavin import LavinForConditionalGeneration, MMAConfig
from lavin.recipes.cli import main


AREA = "adapters and checkpoints"
WEIGHTS, SETTINGS = "mma/adapter_model.safetensors", "mma/adapter_config.json"
IDS = torch.tensor([[1, 5, 6, 7]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def expected(folder):  # noqa: F811
    return logits(AutoModel.from_pretrained(folder))


@pytest.fixture
def copied(folder, tmp_path) -> Path:  # noqa: F811
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(file: Path, **values):
    content = json.loads(file.read_text())
    for key, value in values.items():
        *path, last = key.split("__")
        part = content
        for name in path:
            part = part[name]
        part[last] = value
    file.write_text(json.dumps(content))


def flip(file: Path, at: int):
    data = bytearray(file.read_bytes())
    data[at] ^= 0x40
    file.write_bytes(data)


def change(file: Path, what):
    """Writes the tensors anew, without a digest: as another program would."""
    tensors = load_file(file)
    what(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})


def one(tensors: dict) -> str:
    return next(key for key in sorted(tensors) if "adapter_down" in key and key.endswith("weight"))


def spoil(tensors: dict):
    tensors[one(tensors)][0, 0] = float("nan")


def pickled(file: Path, target: Path):
    """In place of the safetensors file, a pickle that writes a file when it is read."""
    torch.save({"weights": Bomb(target)}, file.with_name("adapter_model.bin"))
    file.unlink()


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


DAMAGES = {  # name: what is done to a copy of the folder, the reason that is given
    "adapter truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), r"adapter_model.safetensors cannot be "
        r"read .*earlier `checkpoint-N`",
    ),
    "adapter empty": (lambda f: (f / WEIGHTS).write_bytes(b""), r"adapter_model.safetensors cannot be read"),
    "a flipped bit in the adapter's weights": (
        lambda f: flip(f / WEIGHTS, -1000), r"its bytes are not those that were saved.*Copy it again",
    ),
    "a flipped bit in the adapter's header": (
        lambda f: flip(f / WEIGHTS, (f / WEIGHTS).read_bytes().index(b"adapter_down")),
        r"(?s)cannot be read|missing: ",
    ),
    "NaN in the adapter": (
        lambda f: change(f / WEIGHTS, spoil), r"holds NaN or infinity \(.*adapter_down.*earlier `checkpoint-N`",
    ),
    "a tensor of another shape": (
        lambda f: change(f / WEIGHTS, lambda t: t.update({one(t): t[one(t)][:, :-1]})),
        r"(?s)belongs to another base.*\(8, 1[0-9]\) in the adapter, \(8, 16\) in this model|\(8, 31\) in the adapter",
    ),
    "a missing tensor": (lambda f: change(f / WEIGHTS, lambda t: t.pop(one(t))), r"(?s)other settings:\n  missing: "),
    "a tensor too many": (
        lambda f: change(f / WEIGHTS, lambda t: t.update(x=torch.zeros(2))), r"(?s)other settings:\n  unexpected: x",
    ),
    "another rank in adapter_config.json": (
        lambda f: edit(f / SETTINGS, r=4), r"(?s)other settings:.*\(8, \d+\) in the adapter, \(4, \d+\) in this model",
    ),
    "a setting of a newer version": (
        lambda f: edit(f / SETTINGS, experts=4), r"does not know \(experts=4\): a newer one saved it. Upgrade `lavin`",
    ),
    "adapter_config.json truncated": (
        lambda f: (f / SETTINGS).write_text('{"peft_type": "MM'), "adapter_config.json cannot be read",
    ),
    "a type that PEFT does not know": (
        lambda f: edit(f / SETTINGS, peft_type="NEW"), "is of the type 'NEW', which PEFT .* does not know: upgrade",
    ),
    "adapter_config.json without its weights": (
        lambda f: (f / WEIGHTS).unlink(), r"has no mma/adapter_model.safetensors. \(Pickled adapters are not read",
    ),
    "config.json truncated": (lambda f: (f / "config.json").write_text('{"model_ty'), "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_is_refused_by_every_call(folder, expected, copied, capsys, name):  # noqa: F811
    damage, reason = DAMAGES[name]
    damage(copied)
    with refused(AREA, name, reason):
        AutoModel.from_pretrained(copied)
    with pytest.raises((ValueError, OSError), match=reason):
        AutoModel.from_pretrained(copied, mma={})  # `trl sft` would go on training it
    assert main(["ask", str(copied), "What?"]) == 2 and "Traceback" not in capsys.readouterr().err
    if name != "config.json truncated":
        model = AutoModel.from_pretrained(folder)  # beside a good one, which stays
        with pytest.raises((ValueError, OSError), match=reason):
            model.load_adapter(copied, adapter_name="bad")
        assert list(model.peft_config) == ["mma"] and torch.equal(logits(model), expected)


def test_pefts_own_loading_refuses_nan(pair, copied):  # noqa: F811
    change(copied / WEIGHTS, spoil)
    base = LavinForConditionalGeneration.from_vision_text_pretrained(
        pair / "vision", pair / "text", image_token_id=300
    )
    with refused(AREA, "NaN, by `PeftModel.from_pretrained`", DAMAGES["NaN in the adapter"][1]):
        PeftModel.from_pretrained(base, copied / "mma")


def test_another_base(folder, pair, tmp_path):  # noqa: F811
    config = LlamaConfig.from_pretrained(pair / "text")
    config.hidden_size, config.head_dim = 48, 24
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    wide = LavinForConditionalGeneration.from_vision_text_pretrained(
        pair / "vision", tmp_path / "wide", image_token_id=300
    )
    with refused(AREA, "adapter of another base", r"(?s)another base.*\(8, 32\) in the adapter, \(8, 48\) in this"):
        wide.load_adapter(folder)
    with refused(
        AREA,
        "a base of another shape than config.json says",
        "have other shapes than its config.json says .*`text_checkpoint`",
    ):
        AutoModel.from_pretrained(folder, text_checkpoint=str(tmp_path / "wide"))


@pytest.fixture(scope="module")
def full(folder, tmp_path_factory):  # noqa: F811
    where = tmp_path_factory.mktemp("full")
    AutoModel.from_pretrained(folder).save_pretrained(where, full=True, max_shard_size="40KB")
    return where


BASES = {
    "a shard of the base truncated": (
        lambda f, shard: shard.write_bytes(shard.read_bytes()[:-50]), "base weights of .* cannot be read",
    ),
    "a shard of the base gone": (lambda f, shard: shard.unlink(), r"model-0000\d-of"),
    "an index that asks for a file outside the folder": (
        lambda f, shard: edit(f / "model.safetensors.index.json", weight_map={"x": "../secret.safetensors"}),
        r"asks for a file outside its own folder \('../secret.safetensors'\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_damaged_base_weights(full, tmp_path, name):
    copy = Path(shutil.copytree(full, tmp_path / "copy"))
    damage, reason = BASES[name]
    damage(copy, sorted(copy.glob("model-*"))[1])
    with refused(AREA, name, reason):
        AutoModel.from_pretrained(copy)


def test_damaged_checkpoints_of_a_light_folder(folder, copied, pair, tmp_path):  # noqa: F811
    text = Path(shutil.copytree(pair / "text", tmp_path / "text"))
    weights = text / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with refused(AREA, "the text checkpoint truncated", "text/model.safetensors cannot be read .*cut off"):
        AutoModel.from_pretrained(folder, text_checkpoint=str(text))
    weights.unlink()
    (text / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with refused(AREA, "a base's index that asks for a file outside", "asks for a file outside its own folder"):
        AutoModel.from_pretrained(folder, text_checkpoint=str(text))
    (text / "model.safetensors.index.json").unlink()
    torch.save({"model.embed_tokens.weight": Bomb(tmp_path / "written")}, text / "pytorch_model.bin")
    with refused(AREA, "a pickle with code as the text checkpoint", "pytorch_model.bin cannot be read"):
        AutoModel.from_pretrained(folder, text_checkpoint=str(text))
    assert not (tmp_path / "written").exists()


def test_pickles_run_nothing(folder, copied, pair, tmp_path, capsys):  # noqa: F811
    target = tmp_path / "written"
    pickled(copied / WEIGHTS, target)
    with refused(AREA, "a pickled adapter with code", "Pickled adapters are not read"):
        AutoModel.from_pretrained(copied)
    bad = {"model": {"adapter_proj.conv_A.weight": torch.zeros(2)}, "args": Bomb(target)}
    torch.save(bad, tmp_path / "new.pth")
    torch.save(bad, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(bad))
    for name in ("new", "old", "bare"):
        pth = tmp_path / f"{name}.pth"
        tower = ["--text-model", str(pair / "text"), "--vision-model", str(pair / "vision")]
        assert main(["convert", str(pth), *tower, "--output", str(tmp_path / "out")]) == 2
        assert f"error: {pth} cannot be read: it " in (said := capsys.readouterr().err), said
    happened(AREA, "`lavin convert` of a pickle with code", said.removeprefix("lavin convert: error:"))
    assert not target.exists() and not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the pickle would have written"


def fresh(code: str, *arguments, blocked: bool = True, **environment):
    """Runs code in a new process, in which `lavin` cannot be imported if it is blocked."""
    block = "import sys\nsys.modules['lavin'] = None\n" if blocked else "import sys\n"
    return subprocess.run(
        [sys.executable, "-c", block + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, cwd="/", stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


TRUST = """
    import os
    from transformers import AutoModel, AutoProcessor
    for auto in (AutoModel, AutoProcessor):
        try:
            auto.from_pretrained(sys.argv[1])
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
            print("refused")
    assert not os.path.exists(sys.argv[2]), "code was run"
"""


@pytest.mark.slow
def test_no_code_is_run_without_trust(copied, tmp_path, pair, capsys):
    target = tmp_path / "written"
    for file in copied.glob("*_lavin.py"):
        file.write_text(f"open({str(target)!r}, 'w')\n" + file.read_text())
    done = fresh(TRUST, copied, target, HF_HOME=str(tmp_path / "home"))
    assert done.stdout.count("refused") == 2, done.stdout + done.stderr[-2000:]
    happened(AREA, "a folder with code, without `trust_remote_code`", "refused, and no code was run")
    assert main(["ask", str(copied), "What?", "--max-new-tokens", "2"]) == 0  # with the installed code
    assert main(["doctor", "--model", str(copied)]) in (0, 1)
    capsys.readouterr()
    assert not target.exists()
    happened(
        AREA, "`lavin ask` and `doctor` of a folder with code", "the installed code was run, none of the folder's"
    )
    # A base that brings code of its own gets none of it run either, though the LaVIN beside it is trusted.
    text = Path(shutil.copytree(pair / "text", tmp_path / "text"))
    edit(text / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    (text / "evil.py").write_text(f"open({str(target)!r}, 'w')")
    assert main(["init", "--vision", str(pair / "vision"), "--text", str(text), "--output", str(tmp_path / "o")]) == 2
    assert "is no model that transformers knows" in capsys.readouterr().err and not target.exists()
    happened(AREA, "a base whose repository brings code", "refused: is no model that transformers knows")


OUTSIDE = """
    from transformers import AutoModel
    try:
        AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
    except Exception as error:
        print("refused", type(error).__name__, str(error).splitlines()[0][:150])
"""


@pytest.mark.slow
def test_code_that_asks_for_files_outside_its_repository(hub, pair, folder, tmp_path):  # noqa: F811
    """Pinned revisions, too: the base's branch moves on, and what is loaded is the commit that was trained on."""
    push = """
        from huggingface_hub import HfApi
        for name, folder in eval(sys.argv[1]).items():
            HfApi().create_repo(name, exist_ok=True)
            print(HfApi().upload_folder(repo_id=name, folder_path=folder).oid)
    """
    environment = {**hub, "HF_HOME": str(tmp_path / "home")}
    done = fresh(push, {"f/vision": str(pair / "vision"), "f/text": str(pair / "text")}, **environment)
    vision_commit, text_commit = done.stdout.split()
    light = Path(shutil.copytree(folder, tmp_path / "light"))
    for kind, commit in (("vision", vision_commit), ("text", text_commit)):
        edit(light / "config.json", **{f"{kind}_checkpoint": {"name": f"f/{kind}", "revision": commit}})
    torch.manual_seed(5)
    moved = LlamaForCausalLM(LlamaConfig.from_pretrained(pair / "text"))
    moved.save_pretrained(tmp_path / "moved")
    evil = Path(shutil.copytree(light, tmp_path / "evil"))
    for name in ("../../secret_lavin.LavinForConditionalGeneration", "x/../../../../etc/secret.Model"):
        edit(evil / "config.json", auto_map__AutoModel=name)
        done = fresh(
            push, {"f/lavin": str(light), "f/evil": str(evil), "f/text": str(tmp_path / "moved")}, **environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        done = fresh(OUTSIDE, "f/evil", **environment)
        assert done.stdout.startswith("refused"), done.stdout + done.stderr[-2000:]
    happened(AREA, "a Hub repository whose auto_map names a file outside itself", done.stdout.removeprefix("refused "))
    torch.save(logits(AutoModel.from_pretrained(folder)), tmp_path / "expected.pt")
    done = fresh(
        """
        import torch
        from transformers import AutoModel, AutoModelForCausalLM
        model = AutoModel.from_pretrained("f/lavin", trust_remote_code=True)
        ids = torch.tensor([[1, 5, 6, 7]])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, torch.load(sys.argv[1])), "another base"
        now = AutoModelForCausalLM.from_pretrained("f/text").lm_head.weight
        assert not torch.equal(now, model.lm_head.weight), "the branch has not moved"
        print("pinned")
        """,
        tmp_path / "expected.pt", **environment,
    )  # fmt: skip
    assert done.stdout.strip() == "pinned", done.stderr[-2000:]
    happened(AREA, "the base's branch has moved", "the commit that config.json names is loaded")


def test_newer_fields_that_say_nothing_are_no_fault(copied, expected):
    edit(copied / SETTINGS, experts=None, another=False)
    with pytest.warns(UserWarning, match="higher version"):
        assert torch.equal(logits(AutoModel.from_pretrained(copied)), expected)
    assert MMAConfig.from_pretrained(copied, subfolder="mma").r == 8
