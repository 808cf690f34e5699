"""Folders and the Hub: every kind of folder, loaded as a user loads it, where `lavin` is not installed too."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import batch, tiny_lavin
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
)

from lavin import LavinConfig, LavinForConditionalGeneration, LavinPeftModel, LavinProcessor, MMAConfig
from lavin.saving_lavin import AUTO_MAP


IDS = torch.tensor([[1, 5, 6, 7]])
HUB_FILES = {
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "README.md",
    *(f"{name}_lavin.py" for name in ("configuration", "modeling", "processing", "tuner", "folder", "card", "towers")),
}


@pytest.fixture(scope="module")
def trained(pair):
    """A LaVIN of the pair whose adapter is not the identity."""
    model = LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text", mma={})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def processor(pair):
    return LavinProcessor.from_vision_text_pretrained(str(pair / "vision"), str(pair / "text"))


@pytest.fixture(scope="module")
def expected(trained):
    with torch.no_grad():
        return trained(input_ids=IDS).logits


@pytest.fixture(scope="module", params=["light", "full"])
def folder(request, tmp_path_factory, trained, processor):
    folder = tmp_path_factory.mktemp(request.param)
    model = trained if request.param == "light" else trained.get_base_model()
    model.save_pretrained(folder, full=request.param == "full")
    processor.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def run(code: str, *args, **env) -> str:
    """Runs code in a fresh process in which `lavin` cannot be imported."""
    block = "import sys\nsys.modules['lavin'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", block + textwrap.dedent(code), *map(str, args)],
        capture_output=True, text=True, cwd="/", stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LOAD = """
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline
    name, expected, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
    options = {"trust_remote_code": True, **options}
    model = AutoModel.from_pretrained(name, **options)
    processor = AutoProcessor.from_pretrained(name, **options)
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.set_grad_enabled(False)
    assert torch.equal(model(input_ids=ids).logits, torch.load(expected)), "other logits"
    assert type(processor).__name__ == "LavinProcessor" and type(model).__name__ == "LavinForConditionalGeneration"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (40, 30), "red")},
                                         {"type": "text", "text": "what is this?"}]}]
    answer = pipeline("image-text-to-text", model=name, **options)(text=chat, max_new_tokens=3, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    if len(sys.argv) > 4:  # save, and load what was saved
        model.save_pretrained(sys.argv[4]); processor.save_pretrained(sys.argv[4])
        again = AutoModelForImageTextToText.from_pretrained(sys.argv[4], trust_remote_code=True)
        assert torch.equal(again(input_ids=ids).logits, torch.load(expected)), "other logits after saving"
        AutoModelForCausalLM.from_pretrained(sys.argv[4], trust_remote_code=True)
    print("loaded")
"""


def test_folder_is_complete_and_names_no_machine_in_mma(folder):
    files = {path.name for path in folder.iterdir()}
    assert HUB_FILES <= files
    assert ("model.safetensors" in files) == ("full" in folder.name)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    adapter = (folder / "mma" / "adapter_config.json").read_text()
    assert str(Path.home()) not in adapter and "/" not in adapter.replace("\\", "").replace("(.*.)", "")
    assert "transformers_modules" not in adapter
    assert not (folder / "adapter_config.json").exists(), "an adapter at the root breaks the Auto classes on the Hub"


@pytest.mark.slow
@pytest.mark.main_path
def test_folder_loads_and_saves_where_lavin_is_not_installed(folder, expected, tmp_path):
    torch.save(expected, tmp_path / "expected.pt")
    assert "loaded" in run(LOAD, folder, tmp_path / "expected.pt", {}, tmp_path / "again")


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_folder_loads_after_import_without_trust(folder, expected, auto_class):
    model = auto_class.from_pretrained(folder)
    assert isinstance(model, LavinForConditionalGeneration)
    assert torch.equal(logits(model), expected)
    assert isinstance(AutoProcessor.from_pretrained(folder), LavinProcessor)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_full_folder_without_adapter_is_the_default_of_a_model_without_one(pair, tmp_path):
    model = LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text")
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "model")), logits(model))


def test_training_continues_from_a_folder_and_writes_light_repos(folder, expected, tmp_path):
    model = AutoModel.from_pretrained(folder, mma={})
    assert isinstance(model, LavinPeftModel)
    assert torch.equal(logits(model), expected)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("adapter_" in name or "modules_to_save.mma" in name for name in trainable)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / "model.safetensors").exists()
    base = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["base_checkpoint"]
    assert (base is not None) == ("full" in folder.name)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "checkpoint")), expected)


def test_mma_with_other_values_is_an_error_that_lists_them(folder):
    with pytest.raises(ValueError, match="r: stored 8, asked 4.*scale: stored 1.0, asked 2.0"):
        AutoModel.from_pretrained(folder, mma={"r": 4, "scale": 2.0})
    AutoModel.from_pretrained(folder, mma={"r": 8})
    with pytest.raises(ValueError, match="no field rank"):
        AutoModel.from_pretrained(folder, mma={"rank": 4})


def test_frozen_training_is_an_error_that_names_the_way_out(folder):
    model = AutoModel.from_pretrained(folder).train()
    with pytest.raises(ValueError, match="mma"):
        model(input_ids=IDS, labels=IDS)


def test_dtype_acts_on_the_base_and_what_is_trained_stays_float32(folder):
    model = AutoModel.from_pretrained(folder, mma={}, dtype=torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_base_model().model.vision_tower.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    frozen = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for n, p in frozen.named_parameters() if ".mma." in n} == {torch.float32}


def test_two_adapters_through_pretrained_model(folder, pair, expected, tmp_path):
    model = AutoModel.from_pretrained(folder)
    weights = load_file(folder / "mma" / "adapter_model.safetensors")
    (tmp_path / "other").mkdir()
    save_file({key: value * 0.5 for key, value in weights.items()}, tmp_path / "other" / "adapter_model.safetensors")
    shutil.copy(folder / "mma" / "adapter_config.json", tmp_path / "other")
    model.load_adapter(tmp_path / "other", adapter_name="other")
    assert model.active_adapters() == ["other"]
    other = logits(model)
    assert not torch.equal(other, expected)
    model.save_pretrained(tmp_path / "while-other-is-active", full=False)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "while-other-is-active")), expected)
    model.set_adapter("mma")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    base = logits(model)
    plain = LlamaForCausalLM.from_pretrained(pair / "text")
    assert torch.equal(base, logits(plain))
    model.enable_adapters()
    assert torch.equal(logits(model), expected)
    assert model.model.modality_embedding.active_adapters == ["mma"]
    assert not model.model.modality_embedding.disable_adapters
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "both", full=False)
    assert (tmp_path / "both" / "other" / "adapter_model.safetensors").exists()
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("mma")
    assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path / "clean")
    keys = load_file(tmp_path / "clean" / "model.safetensors").keys()
    assert not [key for key in keys if "base_layer" in key or "original_module" in key or "adapter" in key]
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "clean")), base)


def test_adapter_by_hand_saves_a_repo_that_loads(pair, tmp_path, caplog):
    model = LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text")
    peft_model = get_peft_model(model, MMAConfig(r=4), adapter_name="default")
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    wanted = logits(peft_model)
    peft_model.get_base_model().save_pretrained(tmp_path / "repo")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "repo")), wanted)
    with pytest.warns(UserWarning, match=r"get_base_model\(\)"):
        peft_model.save_pretrained(tmp_path / "peft")
    again = LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text")
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "peft")), wanted)


def test_adapter_of_another_base_names_the_shapes(folder, pair, tmp_path):
    other = LlamaConfig.from_pretrained(pair / "text")
    other.hidden_size, other.head_dim = 48, 24
    LlamaForCausalLM(other).save_pretrained(tmp_path / "text")
    model = LavinForConditionalGeneration.from_vision_text_pretrained(
        pair / "vision", tmp_path / "text", image_token_id=300
    )
    with pytest.raises(ValueError, match=r"(?s)another base.*\(8, 32\) in the adapter, \(8, 48\) in this model"):
        model.load_adapter(folder)
    assert not getattr(model, "peft_config", None), "the failed adapter is gone"
    logits(model)


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_base_checkpoint_out_of_reach_is_explained(trained, pair, tmp_path, kind):
    trained.save_pretrained(tmp_path / "repo")
    config = json.loads((tmp_path / "repo" / "config.json").read_text())
    config[f"{kind}_checkpoint"]["name"] = str(tmp_path / "gone")
    (tmp_path / "repo" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=rf"(?s){kind} checkpoint of .*gone.*{kind}_checkpoint="):
        AutoModel.from_pretrained(tmp_path / "repo")
    AutoModel.from_pretrained(tmp_path / "repo", **{f"{kind}_checkpoint": str(pair / kind)})


def test_output_folder_that_cannot_be_is_refused_before_writing(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        trained.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be written"):
        trained.save_pretrained(tmp_path / "file" / "folder")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds another model"):
        trained.save_pretrained(tmp_path / "bert")
    assert [path.name for path in (tmp_path / "bert").iterdir()] == ["config.json"]


def test_card_has_the_models_numbers_and_keeps_what_the_user_wrote(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    count = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    assert f"| Trainable parameters | {count:,} |" in card and "```bibtex" in card and "How to load" in card
    assert "base_model" not in card.split("---")[1], "the Hub refuses local paths there"
    card = card.replace("## How to load", "## My own words\n\n## How to load")
    (tmp_path / "README.md").write_text(card.replace("license: apache-2.0", "license: llama2\nlanguage: en"))
    trained.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "## My own words" in card and "license: llama2" in card and "language: en" in card


def test_old_adapter_survives_a_save_that_dies(trained, expected, tmp_path, monkeypatch):
    trained.save_pretrained(tmp_path)
    monkeypatch.setattr("lavin.files_lavin.save_file", lambda *args, **kwargs: exit(9))
    with pytest.raises(SystemExit):
        trained.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), expected)


def test_seven_billion_adapter_is_about_15_mb(tmp_path):
    seven = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    with torch.device("meta"):
        model = LavinForConditionalGeneration(LavinConfig(text_config=LlamaConfig(vocab_size=32000, **seven)))
        inject_adapter_in_model(MMAConfig(), model, "mma")
    state = {n: torch.zeros(p.shape) if ".mma." in n else p for n, p in model.state_dict().items()}
    model._save_adapter(tmp_path / "mma", "mma", model._adapter_tensors("mma", state))
    size = sum(path.stat().st_size for path in (tmp_path / "mma").iterdir())
    assert 15e6 < size < 15.5e6


def test_dtype_auto_is_the_checkpoints(folder):
    model = LavinForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert model.dtype == LavinForConditionalGeneration.from_pretrained(folder).dtype
    half = LavinForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.get_input_embeddings().weight.dtype == torch.bfloat16


def test_nothing_is_saved_after_a_training_forward_that_was_not_finite(tmp_path):
    """As under DeepSpeed, which steps over gradients that are not finite: the weights themselves stay finite."""
    model = tiny_lavin().train()
    model.config.base_checkpoint = {"name": "org/base", "revision": None}
    inputs = batch(model.config, (1, 0))
    model(**inputs)
    model.save_pretrained(tmp_path / "good", full=False)
    up = next(p for n, p in model.named_parameters() if "language_model" in n and "adapter_up" in n)
    with torch.no_grad():
        up.mul_(1e38)
    model(**inputs)
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(FloatingPointError, match="output of the last training step.*has diverged"):
        model.save_pretrained(tmp_path / "bad", full=False)
    assert not (tmp_path / "bad").exists()
    with torch.no_grad():
        up.div_(1e38)
    model(**inputs)
    model.save_pretrained(tmp_path / "good", full=False)


def test_stale_weights_in_the_output_folder_are_refused(trained, pair, tmp_path):
    model = LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text")
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="holds base weights"):
        trained.save_pretrained(tmp_path / "full")
    trained.save_pretrained(tmp_path / "light")
    with pytest.raises(ValueError, match="holds an adapter"):
        model.save_pretrained(tmp_path / "light")


def test_a_failed_adapter_leaves_the_first_one_alone(folder, expected, tmp_path):
    model = AutoModel.from_pretrained(folder)
    shutil.copytree(folder / "mma", tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), tmp_path / "bad" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing: "):
        model.load_adapter(tmp_path / "bad", adapter_name="bad")
    assert list(model.peft_config) == ["mma"]
    assert torch.equal(logits(model), expected)


def test_set_adapter_does_not_make_an_inference_model_trainable(folder):
    model = AutoModel.from_pretrained(folder)
    model.set_adapter("mma")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_wrong_kinds_are_named(pair, folder, tmp_path):
    with pytest.raises(ValueError, match="is no LaVIN"):
        LavinForConditionalGeneration.from_pretrained(pair / "text")
    with pytest.raises(ValueError, match="no language model"):
        LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "vision")
    with pytest.raises(ValueError, match="no vision tower"):
        LavinForConditionalGeneration.from_vision_text_pretrained(pair / "text", pair / "text")
    with pytest.raises(ValueError, match="subfolder"):
        LavinForConditionalGeneration.from_pretrained(folder, subfolder="mma")
    model = AutoModel.from_pretrained(folder)
    model.delete_adapter("mma")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name="lora")
    with pytest.raises(ValueError, match="MMA adapters only.*lora"):
        model.save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_full_folder_with_a_missing_tensor_is_refused(pair, tmp_path):
    model = LavinForConditionalGeneration.from_vision_text_pretrained(pair / "vision", pair / "text")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.language_model.layers.0.self_attn.q_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack weights.*q_proj"):
        AutoModel.from_pretrained(tmp_path)


def test_full_folder_names_no_folder_of_this_machine(trained, pair, tmp_path):
    trained.get_base_model().save_pretrained(tmp_path, full=True)
    assert str(pair) not in (tmp_path / "config.json").read_text()


PUSH = """
    from huggingface_hub import HfApi
    api = HfApi()
    for name, folder in eval(sys.argv[1]).items():
        api.create_repo(name, exist_ok=True)
        print(api.upload_folder(repo_id=name, folder_path=folder).oid)
"""
MAKE = """
    del sys.modules["lavin"]
    import torch
    from lavin import LavinForConditionalGeneration, LavinProcessor
    from safetensors.torch import load_file
    model = LavinForConditionalGeneration.from_vision_text_pretrained("org/vision", "org/text", mma={})
    from lavin.folder_lavin import set_adapter_weights
    set_adapter_weights(model, load_file(sys.argv[1]), "mma")
    model.push_to_hub("org/lavin-7b")
    LavinProcessor.from_vision_text_pretrained("org/vision", "org/text").push_to_hub("org/lavin-7b")
    from huggingface_hub import HfApi
    print(HfApi().model_info("org/lavin-7b").sha)
"""


@pytest.mark.slow
def test_the_literal_line_from_a_hub_with_an_empty_cache(hub, pair, trained, expected, tmp_path):
    torch.save(expected, tmp_path / "expected.pt")
    trained.save_pretrained(tmp_path / "light")
    run(PUSH, {"org/vision": str(pair / "vision"), "org/text": str(pair / "text")}, **hub)
    adapter = tmp_path / "light" / "mma" / "adapter_model.safetensors"
    commit = run(MAKE, adapter, HF_HOME=str(tmp_path / "cache0"), **hub).split()[-1]
    for number, options in enumerate(({}, {"revision": commit}), start=1):
        out = run(
            LOAD, "org/lavin-7b", tmp_path / "expected.pt", options, tmp_path / f"saved{number}",
            HF_HOME=str(tmp_path / f"cache{number}"), **hub,
        )  # fmt: skip
        assert "loaded" in out
    run(
        """
        from huggingface_hub import HfApi, hf_hub_download
        files = HfApi().list_repo_files("org/lavin-7b")
        assert not [f for f in files if f.startswith("model") and f.endswith("safetensors")], files
        assert "mma/adapter_model.safetensors" in files and "processing_lavin.py" in files
        card = open(hf_hub_download("org/lavin-7b", "README.md")).read()
        import json
        config = json.load(open(hf_hub_download("org/lavin-7b", "config.json")))
        for kind in ("text", "vision"):
            source = config[f"{kind}_checkpoint"]
            assert source == {"name": f"org/{kind}", "revision": HfApi().model_info(f"org/{kind}").sha}, source
        assert "Trainable parameters" in card and "- org/text" in card
        """,
        HF_HOME=str(tmp_path / "cache4"), **hub,
    )  # fmt: skip


@pytest.mark.slow
def test_local_checkpoints_cannot_be_pushed_unless_full(hub, trained, processor, expected, tmp_path, monkeypatch):
    trained.save_pretrained(tmp_path / "light")
    out = run(
        """
        del sys.modules["lavin"]
        from transformers import AutoModel
        import lavin
        model = AutoModel.from_pretrained(sys.argv[1])
        try:
            model.push_to_hub("org/local")
        except ValueError as error:
            print("refused", error)
        model.push_to_hub("org/whole", full=True)
        """,
        tmp_path / "light", HF_HOME=str(tmp_path / "cache"), **hub,
    )  # fmt: skip
    assert "refused" in out and "full=True" in out
    torch.save(expected, tmp_path / "expected.pt")
    run(
        """
        import torch
        from transformers import AutoModel
        from huggingface_hub import HfApi
        model = AutoModel.from_pretrained("org/whole", trust_remote_code=True)
        torch.set_grad_enabled(False)
        assert torch.equal(model(input_ids=torch.tensor([[1, 5, 6, 7]])).logits, torch.load(sys.argv[1]))
        assert not HfApi().repo_exists("org/local")
        """,
        tmp_path / "expected.pt", HF_HOME=str(tmp_path / "cache2"), **hub,
    )  # fmt: skip
