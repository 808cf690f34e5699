"""`trainable=[regex, ...]`: the named weights of the base are trained, nothing else changes, and nothing is lost."""

import json
import os

import pytest
import torch
import training
from conftest import batch, tiny_config, tiny_lavin
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_folders import run
from training import sft
from transformers import AutoModel

from lavin import LavinForConditionalGeneration, MMAConfig
from lavin.recipes.train import checkpoints, checks
from lavin.recipes.train.base import base_bytes
from lavin.recipes.train.settings import Settings
from lavin.trainable_lavin import trained_names


light, rows = training.light, training.rows
STAGE2 = ["vision_tower", "multi_modal_projector", r"language_model.*\.(q|v)_proj\."]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_a_pattern_names():
    model = tiny_lavin(adapter=False)
    names = set(trained_names(model, STAGE2))
    assert {name.split(".")[1] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    text = [name for name in names if "language_model" in name]
    assert len(text) == 2 * 3 and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in text)
    everything = set(trained_names(model, ["."]))
    left = {name for name, _ in model.named_parameters()} - everything
    assert left == {
        "model.modality_embedding.weight",
        "model.vision_tower.post_layernorm.weight",
        "model.vision_tower.post_layernorm.bias",
    }
    short = LavinForConditionalGeneration(tiny_config(vision_feature_layers=[2]))
    assert not [name for name in trained_names(short, ["."]) if ".layers.3." in name and "vision" in name]


def test_everything_that_is_trained_gets_a_gradient():
    """Of zeros from text-only rows: an optimiser would otherwise pass over it, and a batch's layout would show."""
    model = tiny_lavin(adapter=False)
    names = trained_names(model, ["."])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    for images in ((1, 0), (0, 0)):
        model.train().zero_grad(set_to_none=True)
        inputs = batch(model.config, images)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None], images
    vision = [p.grad for name, p in model.named_parameters() if "vision" in name and p.requires_grad]
    assert not any(gradient.any() for gradient in vision)


def test_tied_weights_have_two_names_and_are_one():
    model = tiny_lavin("llama3", adapter=False)
    names = trained_names(model, ["lm_head"])
    assert names == ["lm_head.weight"]
    from lavin.trainable_lavin import set_trainable

    set_trainable(model, names)
    assert trained(model) == {"model.language_model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("vision_tower", "must be a list of regular expressions"),
        ([], "must be a list"),
        (["("], "no regular expression"),
        (["vision_tower", "language_modle"], "'language_modle' matches no parameter.*model.language_model"),
        ([r"language_model.*\.q_prj"], r"matches no parameter.*self_attn.q_proj"),
        (["modality_embedding"], "never gets a gradient"),
        (["post_layernorm"], "never gets a gradient"),
    ],
)
def test_patterns_that_name_nothing_are_refused(light, patterns, said):
    with pytest.raises(ValueError, match=said):
        AutoModel.from_pretrained(light, trainable=patterns)


def test_other_ways_to_train_are_refused_beside_it(light, tmp_path):
    with pytest.raises(ValueError, match="one after the other"):
        AutoModel.from_pretrained(light, trainable=["lm_head"], mma={})
    with pytest.raises(ValueError, match="quantised"):
        AutoModel.from_pretrained(light, trainable=["lm_head"], load_in_4bit=True)
    AutoModel.from_pretrained(light, mma={}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter"):
        AutoModel.from_pretrained(tmp_path, trainable=["lm_head"])
    with pytest.raises(ValueError, match=r"trainable=\[regex, ...\]"):
        model = AutoModel.from_pretrained(light).train()
        model(input_ids=torch.tensor([[1, 5]]))


def settings_for(folder, **values) -> Settings:
    values = {"model_name_or_path": str(folder), "trust_remote_code": True, "model_revision": "main", **values}
    return Settings([], values, set(values))


def test_the_launcher_checks_and_counts_it(light, tmp_path):
    def asked(patterns, **values):
        return settings_for(light, model_init_kwargs={"trainable": patterns}, dtype="float32", **values)

    model = AutoModel.from_pretrained(light, trainable=STAGE2)
    config, _, count = checks.check_model(asked(STAGE2))
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    assert base_bytes(config, asked(STAGE2), count) == 4 * every
    low = settings_for(light, model_init_kwargs={"trainable": STAGE2}, dtype="bfloat16")
    assert base_bytes(config, low, count) == 2 * (every - count) + 4 * count
    with pytest.raises(ValueError, match="matches no parameter"):
        checks.check_model(asked(["nothing"]))
    for values, said in [
        ({"load_in_4bit": True}, "quantised"),
        ({"dtype": "bfloat16"}, "Add `bf16: true`"),
        ({"model_init_kwargs": {"trainable": ["lm_head"], "mma": {}}}, "one after the other"),
    ]:
        with pytest.raises(ValueError, match=said):
            checks.check_options(settings_for(light, **{"model_init_kwargs": {"trainable": STAGE2}, **values}))


def test_trained_weights_are_float32_and_exact_whatever_the_dtype(light, tmp_path):
    """In bfloat16 most steps of a small rate round to nothing. What is trained is read without a detour, too."""
    model = AutoModel.from_pretrained(light)
    model.save_pretrained(tmp_path, full=True)
    stored = weights(tmp_path)
    low = AutoModel.from_pretrained(tmp_path, trainable=STAGE2, dtype=torch.bfloat16)
    for name, parameter in low.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, stored[name]), name
        elif "language_model" in name:
            assert parameter.dtype == torch.bfloat16, name
    fresh = AutoModel.from_pretrained(light, trainable=["multi_modal_projector"], dtype=torch.bfloat16)
    assert {p.dtype for p in fresh.model.multi_modal_projector.parameters()} == {torch.float32}, "a new one, too"
    assert "trained_patterns" not in low.config.to_dict()


def test_a_trained_base_is_never_named_by_the_checkpoints_it_came_from(light, tmp_path):
    """Also where an adapter is put on it in the same process: the folder is full then, and holds both."""
    model = AutoModel.from_pretrained(light, trainable=["multi_modal_projector"])
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.add_(1)
    with pytest.raises(ValueError, match="full=True"):
        model.save_pretrained(tmp_path / "light", full=False)
    assert not (tmp_path / "light").exists()
    get_peft_model(model, MMAConfig(), adapter_name="mma")
    model.save_pretrained(tmp_path / "both")
    again = AutoModel.from_pretrained(tmp_path / "both")
    assert again.active_adapters() == ["mma"]
    first = AutoModel.from_pretrained(light).model.multi_modal_projector.linear_1.weight
    held = weights(tmp_path / "both")["model.multi_modal_projector.linear_1.weight"]
    assert torch.equal(held, first + 1)


def test_weights_that_are_not_finite_are_not_saved(light, tmp_path):
    model = AutoModel.from_pretrained(light, trainable=["multi_modal_projector"])
    model.model.last_finite = torch.tensor(False)
    with pytest.raises(FloatingPointError, match="last training step"):
        model.save_pretrained(tmp_path / "run")
    model.model.last_finite = None
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="multi_modal_projector.linear_2.bias"):
        model.save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stage2(light, rows, tmp_path_factory):
    """Eight steps of unmodified `trl sft`, two of them without any image, with weight decay and checkpointing."""
    folder = tmp_path_factory.mktemp("stage2") / "run"
    sft(light, folder, rows, **SETTINGS)
    return folder


SETTINGS = {
    "model_init_kwargs": {"trainable": STAGE2},
    "gradient_checkpointing": True,
    "weight_decay": 0.1,
    "max_steps": 8,
    "save_steps": 4,
}


@pytest.mark.slow
def test_trl_sft_trains_what_is_named_and_no_bit_of_the_rest(light, stage2):
    model = AutoModel.from_pretrained(light)
    before, names = dict(model.named_parameters()), set(trained_names(model, STAGE2))
    for folder in (stage2 / "checkpoint-4", stage2):
        after = weights(folder)
        assert after.keys() == before.keys(), "a full folder"
        for name, value in after.items():
            assert torch.equal(value, before[name]) != (name in names), name
    files = {"config.json", "modeling_lavin.py", "trainable_lavin.py", "processor_config.json", "README.md"}
    assert files <= set(os.listdir(stage2 / "checkpoint-4"))
    assert checkpoints.checkpoint_problem(stage2 / "checkpoint-8") is None
    assert checkpoints.same_weights(stage2 / "checkpoint-8", stage2)
    assert not checkpoints.same_weights(stage2 / "checkpoint-4", stage2)


@pytest.mark.slow
def test_a_later_adapter_names_the_trained_folder_as_its_base(stage2, rows, tmp_path):
    sft(stage2, tmp_path / "mma", rows, max_steps=1)
    assert not list((tmp_path / "mma").glob("model*.safetensors"))
    config = json.loads((tmp_path / "mma" / "config.json").read_text())
    assert config["base_checkpoint"]["name"] == str(stage2)
    run(
        """
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModel, AutoProcessor
        AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert model.active_adapters() == ["mma"]
        base = load_file(sys.argv[2] + "/model.safetensors")
        name = "model.language_model.layers.1.self_attn.q_proj"
        held = dict(model.named_parameters())[name.replace("self_attn", "self_attn.base_layer") + ".weight"]
        assert torch.equal(held.float(), base[name + ".weight"])
        """,
        tmp_path / "mma", stage2,
    )  # fmt: skip


@pytest.mark.slow
def test_a_half_written_full_checkpoint_is_seen(stage2, tmp_path):
    """In one file, or in shards with their index."""
    import shutil

    folder = tmp_path / "checkpoint-4"
    shutil.copytree(stage2 / "checkpoint-4", folder)
    tensors = sorted(weights(folder).items())
    (folder / "model.safetensors").unlink()
    assert "missing" in checkpoints.checkpoint_problem(folder)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": dict(tensors[i::2]) for i in range(2)}
    for name, part in shards.items():
        save_file(part, folder / name)
    where = {key: name for name, part in shards.items() for key in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert checkpoints.checkpoint_problem(folder) is None
    os.truncate(folder / "model-00002-of-00002.safetensors", 5000)
    assert checkpoints.checkpoint_problem(folder) == "model-00002-of-00002.safetensors is cut off"
    os.truncate(index, 20)
    assert "index.json is cut off" in checkpoints.checkpoint_problem(folder)
