"""The rivals: each recipe trains what it says and nothing else, all have one budget, and the command compares them."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import batch, tiny_lavin
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from lavin import LavinForConditionalGeneration
from lavin.peft_lavin import with_adapter
from lavin.recipes.compare import compare as module
from lavin.recipes.compare.compare import HERE, RECIPES, compare, read_recipe, run_recipe
from lavin.recipes.compare.gpt2 import gpt2_config, make_gpt2, structured_start
from lavin.recipes.compare.one import start_model, trained_model
from lavin.recipes.compare.runs import Run, run_all
from lavin.recipes.compare.tiny import make_base
from lavin.recipes.quickstart.ablation import write_data
from lavin.recipes.quickstart.quickstart import RECIPE, TINY


SIZES = {"train": (24, 12, 6, 6), "val": (4, 4, 4, 4), "test": (8, 8, 4, 4)}
LAYER = r".*language_model\.layers\.\d+\."
ADAPTERS = {
    "LORA": {"r": 4, "target_modules": LAYER + r"self_attn\.(q_proj|v_proj)"},
    "IA3": {"target_modules": LAYER + r"(self_attn\.v_proj|mlp\.down_proj)", "feedforward_modules": r".*down_proj"},
    "ADAPTION_PROMPT": {"adapter_len": 5, "adapter_layers": 2},
}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A comparison's folder before its runs: small data, the tiny pair, and the tower with a GPT-2 of some steps."""
    folder = tmp_path_factory.mktemp("compare")
    for name in ("data-0", "data-search"):
        write_data(folder / name, 0, SIZES)
    make_gpt2(folder / "gpt2", TINY / "text", steps=2, more_steps=2, lesson_steps=2)
    for name in ("lavin-tiny", "lavin-gpt2"):
        make_base(name, folder)
    return folder


def train_steps(model, config, steps: int = 3):
    """Trains all that is trainable, on rows with and without an image."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    for number in range(steps):
        inputs = batch(config, (1, 0, 1), seed=number)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_pefts_own_trains_itself_and_the_projector_only(kind, tmp_path):
    base = tiny_lavin(adapter=False)
    frozen = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = with_adapter(base, {"peft_type": kind, **ADAPTERS[kind]})
    assert isinstance(model, PeftModel)
    text, vision = base.config.text_config, base.config.vision_config
    hidden, middle, layers = text.hidden_size, base.config.projector_hidden_size, text.num_hidden_layers
    own = {
        "LORA": layers * 2 * 4 * (hidden + hidden),
        "IA3": layers * (hidden + text.intermediate_size),
        "ADAPTION_PROMPT": 2 * (5 * hidden + 1),
    }[kind]
    projector = middle * (vision.hidden_size + 1) + hidden * (middle + 1)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == own + projector
    inputs = batch(base.config, (1, 0))
    before = base.eval()(**inputs).logits
    train_steps(model, base.config)
    assert not any(torch.equal(p, trained[name]) for name, p in model.named_parameters() if name in trained)
    same = [
        torch.equal(weight, frozen[plain])
        for name, weight in base.state_dict().items()
        if (plain := name.replace(".base_layer", "").replace(".original_module", "").replace("attn.model.", "attn."))
        in frozen
    ]
    assert len(same) == len(frozen) and all(same)
    after = base(**inputs).logits
    assert (after - before).abs().max() > 0.01
    # It comes back, the projector with it.
    model.save_pretrained(tmp_path)
    again = with_adapter(tiny_lavin(adapter=False), {"peft_type": kind, **ADAPTERS[kind]})
    found = set_peft_model_state_dict(again, load_file(tmp_path / "adapter_model.safetensors"))
    assert not found.unexpected_keys and torch.equal(again.eval()(**inputs).logits, after)
    ids = inputs["input_ids"][:1]
    new = again.generate(
        input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=inputs["attention_mask"][:1],
        max_new_tokens=3, do_sample=False,
    )  # fmt: skip
    assert new.shape[1] == ids.shape[1] + 3


def test_a_run_starts_alike_and_its_seed_changes_that():
    def weights(seed):
        torch.rand(3)  # what the common generator did before does not matter
        model = with_adapter(tiny_lavin(adapter=False), {"peft_type": "LORA", "init_seed": seed, **ADAPTERS["LORA"]})
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(weights(3), weights(3)) and not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize(
    "text, peft, message",
    [
        ("llama2", {"peft_type": "LORRA"}, "LORA.*LORRA"),
        ("llama2", {"r": 8}, "peft_type"),
        ("llama2", {"peft_type": "LORA", "rank": 8}, "LoraConfig has no field rank"),
        ("llama2", {"peft_type": "MMA"}, "as `mma`"),
        ("llama2", {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "tokens of its own"),
        ("llama2", {"peft_type": "ADAPTION_PROMPT", "adapter_len": 5, "adapter_layers": 4}, "1 to 3, got 4"),
        ("gpt2", {"peft_type": "ADAPTION_PROMPT", "adapter_len": 5, "adapter_layers": 2}, "llama.*not a gpt2"),
    ],
)
def test_what_is_no_adapter_says_why(text, peft, message):
    with pytest.raises(ValueError, match=message):
        with_adapter(tiny_lavin(text, adapter=False), peft)


def test_one_way_to_train_at_a_time(output):
    for other in ({"mma": {}}, {"trainable": ["multi_modal_projector"]}):
        with pytest.raises(ValueError, match="pass one of them"):
            LavinForConditionalGeneration.from_pretrained(output / "lavin-tiny", peft={"peft_type": "LORA"}, **other)


def test_every_recipe_has_the_quickstarts_budget():
    """The same rows and batch, a quarter of the steps; apart are only what trains, how fast, and where it goes."""
    budget = {key: value for key, value in yaml.safe_load(RECIPE.read_text()).items() if not key.startswith("save_")}
    budget["max_steps"] //= 4
    apart = {"model_name_or_path", "model_init_kwargs", "datasets", "output_dir", "learning_rate", "hub_strategy"}
    apart |= {"trackio_static_space_id", "save_strategy"}
    for name in RECIPES:
        recipe = read_recipe(HERE / f"{name}.yaml")
        assert {k: v for k, v in recipe.items() if k not in apart} == {
            k: v for k, v in budget.items() if k not in apart
        }
        text = (HERE / f"{name}.yaml").read_text()
        assert f"recipes/compare/{name}.yaml" in text and f"{name}-0" in recipe["output_dir"]
    assert {path.stem for path in HERE.glob("*.yaml")} == set(RECIPES)


def trained_by(recipe: str, output) -> tuple[int, set[str]]:
    """How many values a recipe trains, and in which parts of the model."""
    model = start_model(run_recipe(recipe, read_recipe(HERE / f"{recipe}.yaml"), 0, output))
    names = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    parts = ("vision_tower", "multi_modal_projector", "language_model", "modality_embedding")
    return sum(names.values()), {part for part in parts if any(part in name for name in names)}


def test_every_recipe_trains_as_many_values_as_its_formula_says(output):
    width, wide, layers, blocks, patch = 128, 352, 4, 8, 16
    vocabulary = json.loads((TINY / "text" / "config.json").read_text())["vocab_size"]
    linear = width * width + width
    projector = 2 * linear
    block = 4 * linear + 2 * 2 * width + 2 * 4 * width * width + 5 * width  # maps, norms, MLP of 4 widths
    tower = (
        blocks * block + width + 3 * patch**2 * width + 17 * width + 2 * width
    )  # class token, patches, places, norm
    llama = vocabulary * width + layers * (4 * width * width + 3 * width * wide + 2 * width) + width
    gpt2 = (vocabulary + 256) * width + layers * block + 2 * width
    both, decoder = {"multi_modal_projector", "language_model"}, {"language_model"}
    assert {name: trained_by(name, output) for name in RECIPES} == {
        "lavin": (64_120, both | {"vision_tower", "modality_embedding"}),
        "lora": (projector + layers * 2 * 8 * 2 * width, both),
        "ia3": (projector + layers * (2 * width + wide), both),
        "llama_adapter": (projector + layers * (10 * width + 1), both),
        "projector": (projector, both - decoder),
        "full": (projector + tower + llama, both | {"vision_tower"}),
        "clipcap": (projector + gpt2, both),
    }


@torch.no_grad()
def test_the_gpt2s_heads_start_where_copying_needs_them():
    model = GPT2LMHeadModel(gpt2_config(100))
    model.set_attn_implementation("eager")
    structured_start(model)
    ids = torch.randperm(90)[:30].repeat(2)[None]  # everything comes twice
    attention = model.eval()(ids, output_attentions=True).attentions
    places = torch.arange(1, 60)
    assert attention[0][0, 0, places, places - 1].mean() > 0.5
    second = torch.arange(30, 60)
    for layer in attention[1:]:
        found = layer[0, :2, second, second - 30] / (1 - layer[0, :2, second, second])  # but for itself
        assert found.mean() > 0.3  # of some 45 places


def test_recipes_that_cannot_be_compared_are_refused(output, tmp_path):
    good = yaml.safe_load((HERE / "lora.yaml").read_text())
    for change, message in (
        ({"model_name_or_path": "org/lavin-7b"}, "trains org/lavin-7b"),
        ({"max_steps": 0}, "to be compared"),
        ({"learning_rate": None}, "needs model_name_or_path"),
    ):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({**good, **change}))
        with pytest.raises(ValueError, match=message):
            compare([tmp_path / "own.yaml"], output)
    with pytest.raises(ValueError, match="same file name"):
        compare([HERE / "lora.yaml", tmp_path / "lora.yaml"], output)
    with pytest.raises(ValueError, match="at least 1"):
        compare([HERE / "lora.yaml"], output, seeds=0)


def test_a_run_that_fails_is_shown(output, monkeypatch):
    def start(self):
        self.folder.mkdir(exist_ok=True)
        with open(self.folder / "log.txt", "wb") as log:
            code = "print('no space left'); raise SystemExit(3)"
            return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log)

    monkeypatch.setattr(Run, "start", start)
    recipe = run_recipe("lora", read_recipe(HERE / "lora.yaml"), 0, output)
    with pytest.raises(OSError, match=r"(?s)lora-0 failed.*no space left.*log\.txt"):
        run_all([Run(output / "lora-0", [recipe], output / "data-0")])


def test_progress_counts_the_steps_of_every_segment(tmp_path):
    run = Run(tmp_path, [{"max_steps": 5}, {"max_steps": 5}, {"max_steps": 8}], tmp_path)
    two, three = "0/5 [ 5/5 [ 0/5 [ 2/5 [", "5/5 [ 5/5 [ 0/5 [ 5/5 [ 1/8 ["
    for log, steps in (("", 0), ("0/5 [ 3/5 [", 3), (two, 7), (three, 11)):
        (tmp_path / "log.txt").write_text(log)
        assert run.steps_done() == steps


def test_the_search_goes_on_beyond_an_edge(output, monkeypatch):
    """On validation questions; the best of made-up scores lies beyond the first three rates, and is found."""

    def scored(runs):
        results = []
        for run in runs:
            assert run.split == "val" and run.data == output / "data-search" and run.recipes[0]["seed"] == 100
            assert str(run.data) in run.recipes[0]["datasets"][0]["data_files"]["train"]
            rate = run.recipes[0]["learning_rate"]
            scores = dict.fromkeys(("TXT", "IMG", "NO"), 50.0) | {"AVG": 100 - abs(rate - 0.05) * 1000}
            results.append({"recipes": run.recipes, "scores": scores})
        return results

    monkeypatch.setattr(module, "run_all", scored)
    recipe = {**yaml.safe_load((HERE / "lora.yaml").read_text()), "learning_rate": 0.006}
    (output / "edge.yaml").write_text(yaml.safe_dump(recipe))
    found = compare([output / "edge.yaml"], output, search=True)
    assert [row["learning rate"] for row in found["rows"]] == ["0.002", "0.006", "0.018", "0.054", "0.16"]
    assert found["best"] == {"edge": 0.054}


def lavin_compare(output, *arguments):
    command = [sys.executable, "-m", "lavin.recipes.cli", "compare", "--output", str(output), "--max-steps", "2"]
    command += [str(argument) for argument in arguments]
    result = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result


@pytest.mark.slow
def test_the_command_compares_and_goes_on(output):
    recipes = [HERE / "llama_adapter.yaml", HERE / "clipcap.yaml"]
    first = lavin_compare(output, recipes[0], "--seeds", "1")
    assert "2 runs, 0 of them finished before" in first.stdout and "step" in first.stderr
    result = lavin_compare(output, *recipes, "--seeds", "1")
    assert "4 runs, 2 of them finished before" in result.stdout
    report = json.loads((output / "report.json").read_text())
    assert list(report["runs"]) == ["before training", "before training, GPT-2", "llama_adapter", "clipcap"]
    lines = (output / "compare.md").read_text().splitlines()
    assert all(line in result.stdout for line in lines) and len(lines) == 2 + 4
    columns = [cell.strip() for cell in lines[0].strip("| ").split("|")]
    assert columns[-6:] == ["TXT", "IMG", "NO", "AVG", "text ability", "perplexity"]
    for line, (name, (run,)) in zip(lines[2:], report["runs"].items(), strict=True):
        cells = dict(zip(columns, (cell.strip() for cell in line.strip("| ").split("|")), strict=True))
        assert cells["recipe"] == name and cells["AVG"] == f"{run['scores']['AVG']:.1f}"
        assert cells["trained"] == f"{run['trained']:,}" and cells["text ability"] == f"{run['text']['skill']:.1f}"
        assert (cells["memory MB"] == "-") == (run["trained"] == 0) and run["text"]["perplexity"] > 1
        assert run["trained"] == 0 or (run["peak_mb"] > 0 and run["cpu_seconds"] > 0)
    assert (output / "compare.png").read_bytes()[:4] == b"\x89PNG"
    # What a recipe does not name is what it was, bit for bit; what it names is not.
    for name, named in (("llama_adapter", "adaption_"), ("clipcap", "language_model")):
        (recipe,) = report["runs"][name][0]["recipes"]
        assert recipe["max_steps"] == 2
        base = LavinForConditionalGeneration.from_pretrained(recipe["model_name_or_path"], dtype=torch.float32)
        start = start_model(recipe).state_dict() if name == "llama_adapter" else base.state_dict()
        model, _ = trained_model(recipe)
        changed = [
            key for key, weight in model.state_dict().items() if not torch.equal(weight, start[trim(key, start)])
        ]
        assert any(named in key for key in changed) and any("multi_modal_projector" in key for key in changed)
        assert all(named in key or "multi_modal_projector" in key or "lm_head" in key for key in changed)


def trim(key: str, names: dict) -> str:
    """The name of a weight in a `PeftModel`, where the model was one."""
    return key if key in names else f"base_model.model.{key}"
