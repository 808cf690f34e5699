"""Every recipe and layout: parsed by TRL's own parser, its published values, and what the READMEs say of it."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, Qwen3Config
from trl.scripts.sft import make_parser

from lavin import LavinConfig, LavinForConditionalGeneration, MMAConfig
from lavin.recipes import cli


RECIPES = Path(cli.__file__).parent
FILES = {f"{path.parent.name}/{path.stem}": path for path in sorted(RECIPES.glob("*/*.yaml"))}
LAYOUTS = {name.split("/")[1]: path for name, path in FILES.items() if name.startswith("accelerate/")}
FILES = {name: path for name, path in FILES.items() if name.split("/")[0] in ("scienceqa", "instructions")}
# What was published, copied from the paper and its code: processes x rows x accumulation, temperature, epochs, and the
# share of the steps that warm up. Where nobody published a model, the numbers are LaVIN-7B's.
PUBLISHED = {
    "scienceqa/lavin-7b": (2, 4, 4, 10.0, 20, 2 / 20),
    "scienceqa/lavin-13b": (8, 4, 1, 5.0, 20, 2 / 20),
    "scienceqa/vicuna-7b": (2, 4, 4, 10.0, 20, 2 / 20),
    "scienceqa/lavin-7b-lite": (1, 1, 32, 10.0, 20, 2 / 20),
    "scienceqa/lavin-13b-lite": (1, 1, 32, 5.0, 20, 2 / 20),
    "scienceqa/llama-2-7b": (2, 4, 4, 10.0, 20, 2 / 20),
    "scienceqa/llama-3-8b": (2, 4, 4, 10.0, 20, 2 / 20),
    "scienceqa/qwen3-8b": (2, 4, 4, 10.0, 20, 2 / 20),
    "instructions/lavin-13b": (8, 4, 1, 5.0, 15, 0.2 / 15),
}
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32"]


def is_lite(name: str) -> bool:
    return name.endswith("-lite")


def parse(name: str, *options: str):
    """As `trl sft` reads it, but for keys it does not know: those it drops without a word."""
    return make_parser().parse_args_and_config(["--config", str(FILES[name]), *options])


def readme(folder: str) -> str:
    return (RECIPES / folder / "README.md").read_text(encoding="utf-8")


def test_the_recipes_are_those():
    assert set(FILES) == set(PUBLISHED)
    gpu = {"one", "ddp", "zero2", "zero3", "zero3-offload"}
    assert set(LAYOUTS) == gpu | {f"cpu-{name}" for name in gpu - {"one"}}


@pytest.mark.parametrize("name", FILES)
def test_recipe_says_what_was_published(name, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # as on a GPU
    _, training, model, mixture = parse(name)
    processes, rows, accumulation, temperature, epochs, warmup = PUBLISHED[name]
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (rows, accumulation)
    assert processes * rows * accumulation == 32
    assert training.learning_rate == pytest.approx(9e-3 * 32 / 256, rel=1e-12)
    assert (training.num_train_epochs, training.max_steps) == (epochs, -1)
    assert training.get_warmup_steps(10**6) == pytest.approx(warmup * 10**6, rel=1e-4)
    assert training.lr_scheduler_type == "cosine" and not training.lr_scheduler_kwargs
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.02)
    assert training.optim.startswith("adamw_torch")
    assert training.max_grad_norm >= 1e6  # measured, never clipped
    mma = MMAConfig(**training.model_init_kwargs["mma"])
    assert (mma.r, mma.groups, mma.scale, mma.dropout, mma.router_temperature) == (8, 2, 1.0, 0.1, temperature)
    assert not (mma.text_mlp or mma.vision_mlp) and mma.vision_router
    # Not published, but what everything else relies on.
    assert model.dtype == "bfloat16" and training.bf16 and training.trust_remote_code
    assert training.max_length is None and training.logging_nan_inf_filter is False
    assert training.hub_strategy == "end" and training.trackio_static_space_id is False
    assert not training.load_best_model_at_end and not model.use_peft
    assert mixture.datasets[0].path == "parquet" and mixture.datasets[0].data_files["train"].endswith(
        "/train-*.parquet"
    )
    assert (model.load_in_4bit, model.use_bnb_nested_quant) == (is_lite(name), is_lite(name))
    assert training.gradient_checkpointing is is_lite(name)
    if is_lite(name):
        assert model.bnb_4bit_quant_type == "nf4" and not model.load_in_8bit
        assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("name", FILES)
def test_recipe_is_parsed_without_a_gpu(name):
    """With what the README says to add; without it TRL's parser says that there is no GPU."""
    assert " ".join(ON_CPU) in " ".join(readme(name.split("/")[0]).split())
    _, training, model, _ = parse(name, *ON_CPU)
    assert training.device.type == "cpu" and model.dtype == "float32"


@pytest.mark.parametrize("name", FILES)
def test_recipe_has_three_blocks_and_marks_what_is_ours(name):
    text = FILES[name].read_text(encoding="utf-8")
    head, *blocks = re.split(r"^# (?=Model: |Data: |Training: )", text, flags=re.M)
    assert [block.split(":")[0] for block in blocks] == ["Model", "Data", "Training"]
    keys = [set(yaml.safe_load("#" + block)) for block in blocks]
    assert {"model_name_or_path", "dtype", "model_init_kwargs"} <= keys[0]
    assert "datasets" in keys[1] and {"output_dir", "learning_rate", "weight_decay", "seed"} <= keys[2]
    assert sum(map(len, keys)) == len(yaml.safe_load(text))
    assert f"--config recipes/{name}.yaml" in head
    # Marked as ours is what was not published, and nothing else.
    ours = {
        line.split(":")[0].strip() for line in text.splitlines() if re.search(r"# ours\b", line) and line[0] != "#"
    }
    published = {"r", "groups", "scale", "dropout", "learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta1",
                 "adam_beta2", "weight_decay", "num_train_epochs", "per_device_train_batch_size", "optim",
                 "gradient_accumulation_steps", "max_grad_norm", "load_in_4bit", "bnb_4bit_quant_type"}  # fmt: skip
    assert not ours & published
    assert {"seed", "dtype", "bf16", "max_length", "save_strategy", "dataloader_num_workers", "logging_steps"} <= ours
    untried = name.split("/")[1] in ("llama-2-7b", "llama-3-8b", "qwen3-8b")
    assert ("router_temperature" in ours) == untried == ("nobody has published" in head)


@pytest.mark.parametrize("name", FILES)
def test_number_of_gpus_in_the_command(name):
    """The command at the head of a recipe starts as many processes as 32 rows a step need."""
    head = FILES[name].read_text(encoding="utf-8").split("# (or")[0].replace("#", " ").replace("\\\n", " ")
    words = head.split("lavin train ")[1].split()
    processes = 1
    if "--accelerate_config" in words:
        layout = yaml.safe_load(LAYOUTS[Path(words[words.index("--accelerate_config") + 1]).stem].read_text())
        processes = layout["num_processes"]
    if "--num_processes" in words:
        processes = int(words[words.index("--num_processes") + 1])
    assert processes == PUBLISHED[name][0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_what_it_is_called(name):
    """`cpu-x.yaml` is `x.yaml` on CPU; accelerate starts one process for MULTI_CPU and says nothing."""
    settings = yaml.safe_load(LAYOUTS[name].read_text(encoding="utf-8"))
    plain = name.removeprefix("cpu-")
    assert settings["use_cpu"] is (plain != name)
    assert settings["num_processes"] == (1 if plain == "one" else 2)
    kinds = {"one": "NO", "ddp": "MULTI_GPU"}
    assert settings["distributed_type"] == kinds.get(plain, "DEEPSPEED")
    if plain not in kinds:
        zero = settings["deepspeed_config"]
        assert zero["zero_stage"] == (2 if plain == "zero2" else 3)
        assert zero.get("offload_param_device", "none") == ("cpu" if plain.endswith("offload") else "none")
        assert zero["deepspeed_multinode_launcher"] == "standard"  # others want a hostfile and ssh
    if plain != name:
        gpu = yaml.safe_load(LAYOUTS[plain].read_text(encoding="utf-8"))
        gpu.pop("gpu_ids", None)
        assert {**settings, "use_cpu": False} == gpu
    assert f"`{name}.yaml`" in readme("accelerate")


def test_readmes_count_what_is_trained_and_held():
    """The tables' trained weights, adapter, optimiser and base sizes, from the real shapes without weights."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    large = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    llama_3 = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
    qwen3 = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
             "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    texts = {
        "7B": LlamaConfig(), "13B": LlamaConfig(**large), "Llama 3 8B": LlamaConfig(**llama_3),
        "Qwen3 8B": Qwen3Config(**qwen3),
    }  # fmt: skip
    for label, text in texts.items():
        config = LavinConfig(vision_config=vision, text_config=text)
        with torch.device("meta"):
            model = LavinForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        new = ("multi_modal_projector", "modality_embedding")
        base = {key: value.numel() for key, value in model.named_parameters() if not any(part in key for part in new)}
        # NF4 with double quantisation takes 4.127 bits of every linear map but the head.
        maps = sum(
            module.weight.numel()
            for key, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and key != "lm_head" and not any(part in key for part in new)
        )
        model.requires_grad_(False)
        trained = get_peft_model(model, MMAConfig(), adapter_name="mma").get_nb_trainable_parameters()[0]
        whole, small = sum(base.values()) * 2, (sum(base.values()) - maps) * 2 + maps * 4.127 / 8
        row = f"| {label} | {trained:,} | {trained * 4 / 1e6:.1f} MB | {trained * 8 / 1e6:.1f} MB |"
        row += f" {whole / 1e9:.1f} GB | {small / 1e9:.1f} GB |"
        assert row in readme("scienceqa"), row
        assert label != "13B" or row in readme("instructions"), row
