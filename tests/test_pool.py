"""The pool-adapter of InfMLLM beside LaVIN's taps: its formula, and all that a LaVIN does with each setting."""

import math
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import batch, difference, fill, pixels, tiny_config, tiny_lavin, tiny_peft
from PIL import Image
from safetensors.torch import load_file
from test_folders import run
from training import adapter, rows, sft  # noqa: F401  (rows: a fixture)
from transformers import AutoModel, AutoProcessor, CLIPVisionConfig, LlamaConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lavin import LavinConfig, LavinForConditionalGeneration, LavinProcessor
from lavin.projector_lavin import LavinMultiModalProjector
from lavin.recipes.cli import main
from lavin.recipes.evaluate.answers import answer
from lavin.recipes.export import export_folder
from lavin.recipes.load import load_model


# The pair's tower has 2 x 2 patches of 14 pixels; with 56 pixels its positions are interpolated to 4 x 4.
POOL = {"projector_type": "pool", "pool_size": 2, "image_size": 56}
BOTH = {**POOL, "projector_type": "taps_pool"}
SETTINGS = {"taps": ({}, 2), "pool": (POOL, 4), "taps_pool": (BOTH, 2 + 4)}  # and the tokens of an image
TINY = {
    "taps": {},
    "pool": {**POOL, "image_size": 16, "vision_feature_layers": None},
    "taps_pool": {**BOTH, "image_size": 16},
}
STEM = "base_model.model.model.multi_modal_projector.pool"


def lavin(*arguments, code: int = 0) -> str:
    """Runs the command in a fresh process."""
    command = [sys.executable, "-m", "lavin.recipes.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    """Of each setting a light folder from the command, and one with a filled adapter."""
    root = tmp_path_factory.mktemp("pool")
    for name, (settings, _) in SETTINGS.items():
        options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        command = ["init", "--vision", pair / "vision", "--text", pair / "text", "--output", root / f"{name}-light"]
        assert main([*map(str, command), *options]) == 0
        peft = fill(LavinForConditionalGeneration.from_pretrained(root / f"{name}-light", mma={}))
        peft.save_pretrained(root / name)
    return root


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (40, 30, 3), generator=generator, dtype=torch.uint8).numpy())


def ask(processor, images=(1, 0, 2)):
    """A batch with so many images in each row."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture(10 * i + j)} for j in range(n)]
          + [{"type": "text", "text": "what is this?" + " Name it." * i}]}]
        for i, n in enumerate(images)
    ]  # fmt: skip
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip


def described(states: torch.Tensor, w: dict[str, torch.Tensor], p: int) -> torch.Tensor:
    """The pool-adapter as its paper describes it, on `(images, patches, width)` without a class token."""
    centred = states - states.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    x = x * w["layer_norm.weight"] + w["layer_norm.bias"]
    s = int(math.sqrt(states.shape[1]))
    k = s // p
    grid = [[x[:, row * s + column] for column in range(s)] for row in range(s)]
    cells = [
        sum(grid[i * k + a][j * k + b] for a in range(k) for b in range(k)) / k**2 for i in range(p) for j in range(p)
    ]
    hidden = torch.stack(cells, dim=1) @ w["linear_1.weight"].T + w["linear_1.bias"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ w["linear_2.weight"].T + w["linear_2.bias"]


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("side, p", [(2, 1), (2, 2), (6, 1), (6, 2), (6, 3), (6, 6)])
def test_the_formula(vision, side, p):
    settings = {"projector_type": "taps_pool", "pool_size": p, "image_size": 4 * side}
    model = tiny_lavin(vision=vision, adapter=False, **settings).double()
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.pool.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        images = torch.randn(3, 3, 4 * side, 4 * side).double()
        states = model.model.vision_tower(images, interpolate_pos_encoding=True).last_hidden_state
        tokens = model.get_image_features(images).pooler_output
    states = states[:, 1:] if vision == "clip" else states
    assert states.shape[1] == side**2
    weights = model.model.multi_modal_projector.pool.state_dict()
    taps = len(model.config.vision_feature_layers)
    assert tokens.shape[1] == model.config.num_image_tokens == taps + p * p
    assert difference(tokens[:, taps:], described(states, weights, p)) < 1e-6
    alone = tiny_lavin(vision=vision, adapter=False, **{**settings, "projector_type": "taps"}).double()
    alone.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():  # the taps' tokens come first, and are what they are without a pool
        assert torch.equal(alone.get_image_features(images).pooler_output, tokens[:, :taps])


def test_the_release_has_22_55_million_parameters():
    eva = CLIPVisionConfig(hidden_size=1408, num_attention_heads=16, num_hidden_layers=39, patch_size=14)
    vicuna = LlamaConfig(hidden_size=4096)
    config = LavinConfig(vision_config=eva, text_config=vicuna, projector_type="pool", image_size=448)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in LavinMultiModalProjector(config).named_parameters()}
    assert sum(size for name, size in sizes.items() if "linear" in name) == 22_552_576
    assert sum(sizes.values()) == 22_552_576 + 2 * 1408
    assert (config.num_image_tokens, config.vision_feature_layers, config.image_shape) == (256, [], (3, 448, 448))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({**TINY["pool"], "pool_size": 5, "image_size": 32}, ["p = 5", "s = 8", "4 and 8"]),
        ({**TINY["pool"], "pool_size": 16, "image_size": 32}, ["p = 16", "s = 8", "nearest that does is 8"]),
        ({"projector_type": "taps_pool"}, ["p = 16", "s = 2"]),
        ({**TINY["pool"], "pool_size": 0}, ["`pool_size` must be at least 1"]),
        ({**TINY["pool"], "pool_size": 2.0}, ["pool_size"]),
        ({**TINY["pool"], "image_size": 18}, ["18 x 18", "`patch_size` 4", "16 and 20"]),
        ({**TINY["pool"], "image_size": [16, 8]}, ["16 x 8", "one number for both sides"]),
        ({**TINY["pool"], "vision_feature_layers": [4]}, ["`vision_feature_layers` belongs to the taps", "[4]"]),
        ({"projector_type": "pooled"}, ["`projector_type` must be one of", "pooled"]),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(Exception) as error:
        tiny_config(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_sizes_of_images():
    model = tiny_lavin(adapter=False, **TINY["pool"])
    tower = model.model.vision_tower
    with torch.no_grad():
        own, larger = model.get_image_features(pixels(2)), model.get_image_features(torch.randn(2, 3, 24, 24))
        assert torch.equal(own.last_hidden_state, tower(pixels(2)).last_hidden_state)  # nothing is interpolated
        assert own.pooler_output.shape == larger.pooler_output.shape == (2, 4, 32)
    for shape, words in (((16, 8), "16 x 8 pixels"), ((18, 18), "16 and 20"), ((12, 12), "p = 2 .* s = 3.* 1 and 3")):
        with pytest.raises(ValueError, match=words):
            model.get_image_features(torch.zeros(1, 3, *shape))


def test_quantisation_and_half_precision_leave_the_projector_alone():
    source = tiny_lavin(adapter=False, **TINY["taps_pool"])
    keep = HfQuantizer.get_modules_to_not_convert(None, ["lm_head"], source._keep_in_fp32_modules)
    names = [name for name, _ in source.named_modules() if "multi_modal_projector.pool.linear" in name]
    assert len(names) == 2 and not any(should_convert_module(name, keep) for name in names)
    half = LavinForConditionalGeneration.from_pretrained(
        None, config=source.config, state_dict=source.state_dict(), dtype=torch.bfloat16
    )
    projector = half.model.multi_modal_projector
    assert {p.dtype for p in projector.parameters()} == {
        torch.float32
    } and half.model.vision_tower.dtype != torch.float32
    assert half(**batch(half.config, (1, 0))).logits.isfinite().all()
    again = tiny_lavin(adapter=False, seed=5, **TINY["taps_pool"]).model.multi_modal_projector.pool
    for name, parameter in projector.pool.named_parameters():  # from its own generator: the same in every process
        assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_and_generation(name, folders):
    model, processor = load_model(folders / name, dtype="float32")
    inputs = ask(processor)
    tokens = SETTINGS[name][1]
    assert processor.num_image_tokens == model.config.num_image_tokens == tokens
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [tokens, 0, 2 * tokens]
    size = SETTINGS[name][0].get("image_size", 28)
    assert inputs["pixel_values"].shape == (3, 3, size, size)
    with torch.no_grad():
        out = model(**inputs).logits
        for i, images in enumerate((slice(0, 1), None, slice(1, 3))):  # a row does not see its neighbours
            row = {key: inputs[key][i : i + 1] for key in ("input_ids", "attention_mask")}
            row = {key: value[:, inputs["attention_mask"][i] == 1] for key, value in row.items()}
            if images:
                row["pixel_values"] = inputs["pixel_values"][images]
            length = row["input_ids"].shape[1]
            assert difference(model(**row).logits[0], out[i, -length:]) < 1e-4
        other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
        assert difference(model(**other).logits[0], out[0]) > 1e-2 and torch.equal(model(**other).logits[1], out[1])
        table = model.routing_table()
        assert difference(table[:, 0], table[:, 1]) > 1e-3
        stated = model(**inputs, modality_ids=torch.tensor([1, 1, 1])).logits
        assert torch.equal(stated[0], out[0]) and difference(stated[1], out[1]) > 1e-3  # routed by modality
    ways = [{}, {"use_cache": False}, {"prefill_chunk_size": 3}]
    answers = [model.generate(**inputs, max_new_tokens=6, do_sample=False, **way) for way in ways]
    assert all(torch.equal(answers[0], other) for other in answers[1:])


@pytest.mark.parametrize("name", TINY)
def test_training(name):
    """Gradients with and without checkpointing; and of a batch without images, zeros instead of none."""
    peft = tiny_peft(mma={"dropout": 0.0}, **TINY[name]).train()
    model = peft.get_base_model()

    def gradients(images):
        inputs = batch(model.config, images)
        if sum(images):
            generator = torch.Generator().manual_seed(1)
            inputs["pixel_values"] = torch.randn(sum(images), *model.config.image_shape, generator=generator)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        peft.zero_grad()
        peft(**inputs, labels=labels).loss.backward()
        return {n: p.grad for n, p in peft.named_parameters() if p.requires_grad}

    plain = gradients((1, 0))
    assert all(g is not None and g.any() for g in plain.values())
    assert sum(".pool." in n for n in plain) == 6 * model.config.reads_pool
    assert sum("projector" in n for n in plain) == 6 * model.config.reads_pool + 4 * model.config.reads_taps
    plain = {n: g.clone() for n, g in plain.items()}
    without = gradients((0, 0))
    assert all(g is not None for g in without.values())
    assert not any(g.any() for n, g in without.items() if "projector" in n or "vision_tower" in n)
    model.gradient_checkpointing_enable()
    for n, g in gradients((1, 0)).items():
        assert (g - plain[n]).norm() < 1e-4 * plain[n].norm(), n


@pytest.mark.parametrize("name", TINY)
def test_folding(name):
    peft = tiny_peft(**TINY[name])
    model = peft.get_base_model()
    inputs = batch(model.config, (1, 0))
    inputs["pixel_values"] = torch.randn(1, *model.config.image_shape)
    with torch.no_grad():
        expected, ids = model(**inputs).logits, inputs["input_ids"]
        embeds = model.get_input_embeddings()(ids.masked_fill(ids == model.config.image_token_id, 0))
        embeds[ids == model.config.image_token_id] = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        where = inputs["attention_mask"].bool()
        for i, modality in enumerate(("image", "text")):
            plain = peft.merge_modality(modality)(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
            assert difference(plain[i][where[i]], expected[i][where[i]]) < 1e-4
        assert difference(model.fold()(**inputs).logits[where], expected[where]) < 1e-4


@pytest.mark.slow
def test_folders_load_where_lavin_is_not_installed(folders, tmp_path):
    for name in SETTINGS:
        model, processor = load_model(folders / name, dtype="float32")
        inputs = dict(ask(processor))
        with torch.no_grad():
            torch.save((inputs, model(**inputs).logits), tmp_path / f"{name}.pt")
        model.save_pretrained(tmp_path / f"{name}-full", full=True)
        shown = (folders / name / "README.md").read_text()
        assert f"| Image tokens | {SETTINGS[name][1]}, " in shown and ("2 x 2 cells" in shown) == (name != "taps")
    run(
        """
        import torch
        from transformers import AutoModel, AutoProcessor
        torch.set_grad_enabled(False)
        light, root = sys.argv[1:]
        for name in ("taps", "pool", "taps_pool"):
            inputs, expected = torch.load(f"{root}/{name}.pt")
            for folder in (f"{light}/{name}", f"{root}/{name}-full"):
                model = AutoModel.from_pretrained(folder, trust_remote_code=True)
                processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
                assert processor.num_image_tokens == model.config.num_image_tokens
                assert torch.equal(model(**inputs).logits, expected), folder
        """,
        folders, tmp_path,
    )  # fmt: skip


def test_several_output_sizes_of_one_checkpoint(folders, tmp_path, capsys):
    stored = load_file(folders / "pool" / "mma" / "adapter_model.safetensors")
    for p in (1, 2, 4):
        model = AutoModel.from_pretrained(folders / "pool", pool_size=p)
        processor = AutoProcessor.from_pretrained(folders / "pool")
        processor.num_image_tokens = model.config.num_image_tokens
        with torch.no_grad():
            features = model(**ask(processor)).image_hidden_states
        assert features.shape == (3, p * p, 32)
        weights = model.model.multi_modal_projector.modules_to_save["mma"].pool.state_dict()
        assert all(torch.equal(stored[f"{STEM}.{key}"], value) for key, value in weights.items())
    with pytest.raises(ValueError, match="p = 3 does not divide s = 4.*2 and 4"):
        AutoModel.from_pretrained(folders / "pool", pool_size=3)
    old = AutoProcessor.from_pretrained(folders / "pool")
    with pytest.raises(ValueError, match="4 tokens for each image.*makes 16.*processor.num_image_tokens = "):
        model(**ask(old))
    model.save_pretrained(tmp_path / "fine")
    old.save_pretrained(tmp_path / "fine")
    with pytest.raises(ValueError, match="writes 4 tokens for each image, and the model makes 16"):
        load_model(tmp_path / "fine")
    recipe = {"model_name_or_path": str(folders / "pool"), "model_init_kwargs": {"mma": {}, "pool_size": 4}}
    recipe.update(
        trust_remote_code=True,
        use_cpu=True,
        bf16=False,
        output_dir=str(tmp_path / "run"),
        datasets=[{"path": "parquet"}],
    )
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(tmp_path / "sft.yaml")]) == 2  # before anything is started
    assert "writes 4 tokens for each image, and the model makes 16" in capsys.readouterr().err
    processor.save_pretrained(tmp_path / "fine")
    again, processor = load_model(tmp_path / "fine", dtype="float32")
    assert again.config.pool_size == 4 and answer(again, processor, ["what?"], [[picture(0)]], 1, 3)
    with pytest.raises(ValueError, match="num_image_tokens"):
        LavinProcessor(processor.image_processor, processor.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pool", "taps_pool"])
def test_export(name, folders, tmp_path):
    measured = export_folder(folders / name, tmp_path / "out", "image")["image"]
    assert measured["largest_difference"] < 1e-4 * measured["largest_logit"] and measured["same_next_token"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pool", "taps_pool"])
def test_trl_sft_then_evaluation(name, folders, rows, tmp_path):  # noqa: F811
    losses, _ = sft(folders / f"{name}-light", tmp_path / "run", rows, gradient_checkpointing=True)
    assert len(losses) == 3
    first, last = (adapter(tmp_path / "run" / f"checkpoint-{i}") for i in (1, 3))
    assert first.keys() == last.keys() and all(not torch.equal(first[key], last[key]) for key in first)
    assert sum("projector.pool." in key for key in last) == 6
    task = {"data": str(rows), "metric": "contains", "max_new_tokens": 3}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    output = ["--output", tmp_path / "results"]
    lavin("eval", "own", "--model", tmp_path / "run", "--config", tmp_path / "mine.yaml", *output)
    assert len((tmp_path / "results" / "predictions.jsonl").read_text().splitlines()) >= 32
    picture(1).save(tmp_path / "picture.png")
    lavin("ask", tmp_path / "run", "What?", "--image", tmp_path / "picture.png", "--max-new-tokens", 3)
