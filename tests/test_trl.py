"""Unmodified `trl sft` on a LaVIN folder: adapter-only checkpoints, resume, 4-bit, pushing."""

import os
import subprocess
import sys

import pytest
import torch
import training
from test_folders import PUSH, run
from training import adapter, distance, sft
from transformers import AutoModel, AutoProcessor


light, rows = training.light, training.rows


@pytest.fixture(scope="module")
def three_steps(light, rows, tmp_path_factory):
    """The real `trl sft`, in a fresh process: its folder and losses."""
    folder = tmp_path_factory.mktemp("three") / "run"
    return folder, sft(light, folder, rows, fresh=True)[0]


def test_three_steps_from_yaml_then_resume(three_steps, light, rows, tmp_path):
    """Nothing of it is forked: the command as it is installed, twice."""
    run, losses = three_steps
    assert len(losses) == 3
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3", "."):
        folder = run / name
        assert not list(folder.glob("model*.safetensors")) and not (folder / "adapter_config.json").exists()
        assert {"config.json", "modeling_lavin.py", "processor_config.json", "README.md"} <= set(os.listdir(folder))
    first, last = adapter(run / "checkpoint-1"), adapter(run / "checkpoint-3")
    assert first.keys() == last.keys() and all(not torch.equal(first[key], last[key]) for key in first)
    # Killed after step 1 and resumed: the same run.
    sft(light, tmp_path, rows, fresh=True, max_steps=3, resume_from_checkpoint=str(run / "checkpoint-1"))
    assert distance(tmp_path, run) == 0


@pytest.mark.slow
def test_a_checkpoint_loads_elsewhere_and_the_result_trains_on(three_steps, rows, tmp_path):
    folder, losses = three_steps
    run("""
        from transformers import AutoModel, AutoProcessor
        AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert model.active_adapters() == ["mma"]
        """, folder / "checkpoint-3")  # fmt: skip
    again, _ = sft(folder, tmp_path, rows, model_init_kwargs={"mma": {}})
    assert again[0] < losses[0]
    assert AutoModel.from_pretrained(tmp_path).config.text_checkpoint is not None


@pytest.mark.slow
def test_a_forked_run_is_a_fresh_one(three_steps, light, rows, tmp_path):
    """What all other runs of these tests rest on."""
    losses, _ = sft(light, tmp_path, rows)
    assert losses == three_steps[1] and distance(tmp_path, three_steps[0]) == 0


SAID_BY_OTHERS = [
    ({"model_init_kwargs": {}}, r"model_init_kwargs: \{mma: \{\}\}"),
    (
        {"model_init_kwargs": {"mma": {}, "text_checkpoint": "/gone"}},
        "text checkpoint of .*, /gone .*cannot be reached",
    ),
    ({"trust_remote_code": False}, "trust_remote_code"),
    ({"packing": True}, "Packing is not supported"),
    ({"padding_free": True}, "Padding-free training is yet not supported"),
    ({"pad_to_multiple_of": 8}, "multiple of a value is not yet implemented"),
    ({"assistant_only_loss": True}, "only supported for conversational language modeling"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "said"), SAID_BY_OTHERS)
def test_what_lavin_train_leaves_to_trl_and_to_loading(light, rows, tmp_path, settings, said):
    """Before a step is done, in words that name the setting."""
    with pytest.raises(AssertionError, match=said):
        sft(light, tmp_path, rows, **settings)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
def test_full_folder_trains_to_a_light_repo_that_names_it(light, rows, tmp_path):
    AutoModel.from_pretrained(light).save_pretrained(tmp_path / "full", full=True)
    AutoProcessor.from_pretrained(light).save_pretrained(tmp_path / "full")
    sft(tmp_path / "full", tmp_path / "run", rows, max_steps=1)
    assert not list((tmp_path / "run").glob("model*.safetensors"))
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert model.config.base_checkpoint["name"] == str(tmp_path / "full")
    assert model.active_adapters() == ["mma"]


@pytest.mark.slow
def test_four_bit_base_trains_on_cpu(light, rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    losses, _ = sft(
        light, tmp_path / "run", rows, load_in_4bit=True, use_bnb_nested_quant=True, bnb_4bit_quant_type="nf4",
        gradient_checkpointing=True,
    )  # fmt: skip
    assert len(losses) == 3
    first, last = adapter(tmp_path / "run" / "checkpoint-1"), adapter(tmp_path / "run" / "checkpoint-3")
    assert all(not torch.equal(first[key], last[key]) for key in first)
    assert {value.dtype for value in last.values()} == {torch.float32}, "cast by TRL"
    AutoModel.from_pretrained(tmp_path / "run")


@pytest.mark.slow
def test_push_to_hub_of_trl_leaves_a_repo_that_loads(hub, pair, rows, tmp_path):
    run(PUSH, {"org/vision": str(pair / "vision"), "org/text": str(pair / "text")}, **hub)
    run(
        """
        del sys.modules["lavin"]
        from lavin import LavinForConditionalGeneration, LavinProcessor
        names = "org/vision", "org/text"
        LavinForConditionalGeneration.from_vision_text_pretrained(*names).save_pretrained(sys.argv[1], full=False)
        LavinProcessor.from_vision_text_pretrained(*names).save_pretrained(sys.argv[1])
        """,
        tmp_path / "light", HF_HOME=str(tmp_path / "cache0"), **hub,
    )  # fmt: skip
    env = {"HF_HOME": str(tmp_path / "cache1"), **hub}
    sft(
        tmp_path / "light", tmp_path / "run", rows, env=env, fresh=True,
        push_to_hub=True, hub_model_id="org/tuned", hub_strategy="end", trackio_static_space_id=False,
    )  # fmt: skip
    run(
        """
        from transformers import AutoModel, AutoProcessor
        from huggingface_hub import HfApi
        model = AutoModel.from_pretrained("org/tuned", trust_remote_code=True)
        AutoProcessor.from_pretrained("org/tuned", trust_remote_code=True)
        assert model.active_adapters() == ["mma"]
        files = HfApi().list_repo_files("org/tuned")
        assert "model.safetensors" not in files and "mma/adapter_model.safetensors" in files, files
        """,
        HF_HOME=str(tmp_path / "cache2"), **hub,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "lavin.recipes.cli", "card", str(tmp_path / "run"), "--push", "org/tuned"],
        capture_output=True, text=True, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run(
        """
        from huggingface_hub import hf_hub_download
        card = open(hf_hub_download("org/tuned", "README.md")).read()
        assert "Trainable parameters" in card and "- org/text" in card
        """,
        HF_HOME=str(tmp_path / "cache3"), **hub,
    )  # fmt: skip
