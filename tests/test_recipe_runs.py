"""Every recipe runs three steps of the real `trl sft` in its own shape of training, on a likeness of its model."""

import ast
import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import forked
import pytest
import torch
import yaml
from datasets import Dataset, List, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from test_recipes import FILES, LAYOUTS, ON_CPU, PUBLISHED, is_lite, parse, readme
from training import distance
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import SFTTrainer, get_quantization_config

from lavin.recipes.bench import cast
from lavin.recipes.cli import main


pytestmark = pytest.mark.slow
SHORT = ["--max_steps", "3", "--logging_steps", "1", "--report_to", "none"]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
# Full attention; grouped queries with tied embeddings; grouped queries with norms on them.
LIKENESS = {
    "lavin-7b": (LlamaForCausalLM, LlamaConfig, {}),
    "lavin-13b": (LlamaForCausalLM, LlamaConfig, {"num_hidden_layers": 3}),
    "vicuna-7b": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-2-7b": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-3-8b": (
        LlamaForCausalLM,
        LlamaConfig,
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": ROPE},
    ),
    "qwen3-8b": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
}


@pytest.fixture(scope="module")
def place(pair, tmp_path_factory):
    """A working folder with what the recipes name: `lavin init`'s folders of small likenesses, and rows in Parquet."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(vision).save_pretrained(place / "vision")
    vocab_size = LlamaConfig.from_pretrained(pair / "text").vocab_size
    for name, (model_class, config_class, values) in LIKENESS.items():
        text = place / f"text-{name}"
        config = config_class(vocab_size=vocab_size, max_position_embeddings=256, **{**SHAPE, **values})
        model_class(config).save_pretrained(text)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (text / file).write_bytes((pair / "text" / file).read_bytes())
        assert (
            main(
                ["init", "--vision", str(place / "vision"), "--text", str(text), "--output", f"{place}/models/{name}"]
            )
            == 0
        )
    rows = []
    for i in range(64):
        with_image = i % 3 == 0
        content = [{"type": "image", "text": None}] if with_image else []
        answer = " ".join(["red", "blue", "answer", "B"][: 1 + i % 4] * (1 + i % 5))
        rows.append(
            {
                "prompt": [{"role": "user", "content": [*content, {"type": "text", "text": "What?\nResponse:"}]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
                "images": [Image.new("RGB", (28, 28), (i * 3, 0, 0))] if with_image else [],
                "id": str(i), "answer": i % 4, "choices": ["red", "blue"], "category": "color",
            }
        )  # fmt: skip
    for name in ("scienceqa", "instructions"):
        (place / "data" / name).mkdir(parents=True)
        file = place / "data" / name / "train-00000-of-00001.parquet"
        Dataset.from_list(rows).cast_column("images", List(ImageFeature())).to_parquet(file)
    return place


def command(name: str, output: Path, *options: str, recipe: Path | None = None) -> list[str]:
    """`trl sft` on the recipe as it is; it runs in a folder that holds what the recipe names."""
    trl = str(Path(sys.executable).with_name("trl"))
    own = ["--config", str(recipe or FILES[name]), "--output_dir", str(output)]
    return [trl, "sft", *own, *ON_CPU, *SHORT, *options]


def train(place: Path, name: str, output: Path, *options: str) -> list[dict]:
    done = forked.run(command(name, output, *options), cwd=place)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return steps_of(done.stdout)


def steps_of(log: str) -> list[dict]:
    """Each step's entry, which is printed as a dict of strings."""
    found = [ast.literal_eval(entry) for entry in re.findall(r"\{'loss': .*?\}", log)]
    assert len(found) == 3 and all("grad_norm" in entry for entry in found), log[-2000:]
    return [{key: float(value) for key, value in entry.items()} for entry in found]


def check_trained(output: Path):
    """A complete adapter repository, whose every tensor is float32, was trained, and loads through AutoModel."""
    assert not list(output.glob("model*.safetensors"))
    model = AutoModel.from_pretrained(output)
    assert model.active_adapters() == ["mma"]
    fresh = AutoModel.from_pretrained(output, mma={}).peft_config["mma"]
    weights = load_file(output / "mma" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    ups = [weight for key, weight in weights.items() if "adapter_up" in key]
    assert ups and all(weight.abs().max() > 0 for weight in ups)  # they start at zero
    return fresh, weights


@pytest.mark.parametrize("name", FILES)
def test_three_steps_in_its_own_shape(place, tmp_path, name):
    """
    Nothing of the recipe is overridden but what a CPU forces; two processes stand for its GPUs, and the accumulation
    makes up for those that are missing.
    """
    if is_lite(name):
        pytest.importorskip("bitsandbytes")
    processes, rows, accumulation, temperature, *_ = PUBLISHED[name]
    there = min(processes, 2)
    options = ["--gradient_accumulation_steps", str(32 // rows // there)]
    if there > 1:
        options += ["--accelerate_config", str(LAYOUTS["cpu-ddp"])]
    steps = train(place, name, tmp_path / "run", *options)
    # 64 rows, 32 a step: the second step ends the first epoch, on as many processes as there should be.
    assert [step["epoch"] for step in steps] == [0.5, 1.0, 1.5]
    mma, weights = check_trained(tmp_path / "run")
    assert mma.router_temperature == temperature
    state = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == len(weights)


def test_two_machines(place, tmp_path):
    """The README's command for several machines, with two of one process each, on this one."""
    (shown,) = re.findall(r"```bash\n(trl sft [^`]*--machine_rank[^`]*)```", readme("accelerate"))
    words = shown.replace("\\\n", " ").split()
    assert words[:2] == ["trl", "sft"] and words[words.index("--config") + 1] == "recipes/scienceqa/lavin-13b.yaml"
    options = dict(zip(words[2::2], words[3::2], strict=True))
    del options["--config"]
    assert set(options) == {
        "--accelerate_config", "--num_machines", "--num_processes", "--machine_rank", "--main_process_ip",
        "--main_process_port",
    }  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options.update({
        "--accelerate_config": str(LAYOUTS["cpu-ddp"]), "--num_machines": "2", "--num_processes": "2",
        "--main_process_ip": "127.0.0.1", "--main_process_port": str(port), "--gradient_accumulation_steps": "4",
    })  # fmt: skip
    output = tmp_path / "run"
    environment = {**os.environ, **forked.ENVIRONMENT}
    machines = [
        subprocess.Popen(
            command("scienceqa/lavin-13b", output, *sum({**options, "--machine_rank": rank}.items(), ())),
            cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    logs = [machine.communicate(timeout=600)[0] for machine in machines]
    for machine, log in zip(machines, logs, strict=True):
        # On a busy machine torch may, rarely, abort a process at its exit, when all is saved: no fault of the recipe.
        aborted = "Model saved to" in log and "terminate called without an active exception" in log
        assert machine.returncode == 0 or aborted, log[-4000:]
    steps = steps_of(logs[0])
    assert [step["epoch"] for step in steps] == [0.5, 1.0, 1.5]
    check_trained(output)


def make_trainer(place: Path, name: str, output: Path, monkeypatch) -> SFTTrainer:
    """The trainer that `trl sft` makes of a recipe, in this process."""
    monkeypatch.chdir(place)
    _, args, model_args, mixture = parse(name, *ON_CPU, "--output_dir", str(output), "--report_to", "none")
    args.model_init_kwargs.update(dtype=model_args.dtype, trust_remote_code=True)
    (data,) = mixture.datasets
    rows = load_dataset(data.path, data_files=data.data_files, split="train")
    quantization = get_quantization_config(model_args)
    return SFTTrainer(model_args.model_name_or_path, args, train_dataset=rows, quantization_config=quantization)


@pytest.mark.parametrize("name", ["scienceqa/lavin-7b", "scienceqa/qwen3-8b", "scienceqa/lavin-13b-lite"])
def test_optimiser_and_weight_decay(place, tmp_path, monkeypatch, name):
    """The optimiser holds exactly what is trained and saved; weights decay, biases do not, in both towers."""
    if is_lite(name):
        pytest.importorskip("bitsandbytes")
    trainer = make_trainer(place, name, tmp_path / "run", monkeypatch)
    if is_lite(name):
        kinds = Counter(type(module).__name__ for module in trainer.model.modules())
        assert kinds["Linear4bit"] > 10
        nested = {m.weight.quant_state.nested for m in trainer.model.modules() if type(m).__name__ == "Linear4bit"}
        assert nested == {True}
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): key for key, parameter in trainer.model.named_parameters()}
    trained = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert sorted(names[id(parameter)] for parameter in held) == sorted(trained)
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "mma" / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == sum(parameter.numel() for parameter in held)
    assert len(saved) == len(held)

    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for tower in ("vision_tower", "language_model"):
        for part in ("adapter_down", "adapter_up", "adapter_router"):
            assert {
                (key.rpartition(".")[2], value) for key, value in decay.items() if tower in key and part in key
            } == {("weight", 0.02), ("bias", 0.0)}
    rest = {key.split("mma.")[-1]: value for key, value in decay.items() if "adapter_" not in key}
    assert rest == {
        "weight": 0.02,  # the modality embedding
        "linear_1.weight": 0.02, "linear_1.bias": 0.0, "linear_2.weight": 0.02, "linear_2.bias": 0.0,
    }  # fmt: skip
    # And it does what it says: without a gradient a step leaves biases and takes lr x decay of each weight.
    with torch.no_grad():
        for parameter in held:
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in held:
        expected = 1.0 if names[id(parameter)].endswith("bias") else 1 - 1.125e-3 * 0.02
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected), rtol=0, atol=1e-7)


def test_best_checkpoint_as_the_readme_says(place, tmp_path):
    """The lines of the README, put into a recipe: the best checkpoint is named, kept and complete."""
    (lines,) = re.findall(r"```yaml\n(.*?)```", readme("scienceqa"), flags=re.S)
    assert set(yaml.safe_load(lines)) == {
        "dataset_name", "dataset_test_split", "eval_strategy", "metric_for_best_model", "greater_is_better",
        "load_best_model_at_end",
    }  # fmt: skip
    recipe = yaml.safe_load(FILES["scienceqa/lavin-7b"].read_text(encoding="utf-8"))
    del recipe["datasets"]
    recipe.update(yaml.safe_load(lines), learning_rate=0.01)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = place / "data" / "scienceqa" / "train-00000-of-00001.parquet"
    validation = rows.with_name("val-00000-of-00001.parquet")
    load_dataset("parquet", data_files=str(rows), split="train[:9]").to_parquet(validation)
    output = tmp_path / "run"
    options = ["--max_steps", "8", "--gradient_accumulation_steps", "8", "--greater_is_better", "true"]
    done = forked.run(command("", output, *options, recipe=tmp_path / "recipe.yaml"), cwd=place)
    assert done.returncode == 0, done.stderr[-4000:]
    state = json.loads((output / "checkpoint-8" / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = max(scores, key=scores.get)  # the loss falls: asked so, the best is not the last
    assert sorted(scores) == [2, 4, 6, 8] and best != 8
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    assert {path.name for path in output.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-8"}
    check_trained(output / f"checkpoint-{best}")
    assert distance(output, output / f"checkpoint-{best}") == 0


def test_cast_benchmark(tmp_path, capsys):
    """In bfloat16 most entries never move: seen at once, as the first steps are the smallest."""
    pytest.importorskip("bitsandbytes")
    cast.main(["--quick", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "cast.json").read_text(encoding="utf-8"))
    assert list(result["results"]) == ["float32", "bfloat16"] and result["steps"] == 2
    kept, lost = (result["results"][kind]["never_moved"] for kind in ("float32", "bfloat16"))
    assert set(kept) == {*cast.PARTS.values(), "all"}
    assert kept["modality embedding"] < 1 and lost["modality embedding"] > 50
    assert kept["up maps"] < 1 and lost["up maps"] < 1  # they start at zero, where bfloat16 is fine
    assert kept["all"] < 2 < 10 < lost["all"]
    printed = capsys.readouterr().out
    assert "never moved, modality embedding" in printed and "bfloat16" in printed
