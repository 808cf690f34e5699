"""The benchmarks run and report what they should; no test asserts a time."""

import json
import math

import pytest
import torch
from PIL import Image

from lavin.recipes.bench import prefill_time, start_time
from lavin.recipes.bench.__main__ import main
from lavin.recipes.bench.models import QUICK, Size, adapted_lavin, embed, frozen_lavin, language_model, make_batch
from lavin.recipes.bench.models import rows_of as rows_without_padding
from lavin.recipes.bench.step_time import labelled_loss
from lavin.recipes.bench.timing import UNITS, reached
from lavin.recipes.bench.train_rate import (
    LLAVA_IMAGE_ID,
    PADDED,
    add_fused_lm_head,
    llava,
    llava_batch,
    llava_labelled_loss,
    recipe_batch,
    recipe_loss,
    trl_loss,
)


STEP_RATIOS = {
    *("mma/base", "mma/lora", "mma/base_vision", "lora/base"),
    *("mma_labelled/base", "mma_labelled/lora", "mma_labelled/lora_labelled"),
}
TRAIN_RATIOS = {"llava/lavin", "llava_own/lavin_own", "recipe_2023/lavin", "recipe_2023/lavin_own"}
MEMORY_RATIOS = {"mma/lora", "mma_labelled/lora_labelled", "mma_labelled/lora", "mma/base"}
if add_fused_lm_head is not None:
    STEP_RATIOS |= {"mma_trl/base_trl", "mma_trl/lora_trl"}
    TRAIN_RATIOS |= {"llava_trl/lavin_trl", "llava_trl/lavin"}
    MEMORY_RATIOS |= {"mma_trl/lora_trl"}
DECODE_RATIOS = {"mma/base", "folded/base", "merged/base"}
PREFILL_RATIOS = {"mma/base", "mma_images/base_images"}


@pytest.mark.parametrize(
    ("only", "name", "cases", "ratios"),
    [
        ("step", "step_time", {"training step"}, STEP_RATIOS),
        ("train", "train_rate", {"patch 16", "patch 8"}, TRAIN_RATIOS),
        pytest.param("memory", "memory_peak", {"training step"}, MEMORY_RATIOS, marks=pytest.mark.slow),
        ("decode", "decode_time", {"batch 1", "batch 16"}, DECODE_RATIOS),
        ("prefill", "prefill_time", {"16 rows"}, PREFILL_RATIOS),
    ],
)
def test_quick(tmp_path, capsys, only, name, cases, ratios):
    threads = torch.get_num_threads()
    main(["--quick", "--only", only, "--output", str(tmp_path)])
    assert torch.get_num_threads() == threads
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json", "goals.md"}
    report = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert {"title", "name", "machine", "rounds", "size", "notes", "results"} <= set(report)
    assert {"cpu", "cores", "threads", "torch", "transformers", "peft"} <= set(report["machine"])
    assert report["rounds"] == 2 and set(report["results"]) == cases
    for row in report["results"].values():
        assert set(row["ratios"]) == ratios
        values = [value for unit in UNITS for value in row.get(unit, {}).values()]
        numbers = [*values, *(ratio["median"] for ratio in row["ratios"].values())]
        assert values and all(math.isfinite(number) and number > 0 for number in numbers)
    printed = capsys.readouterr().out
    assert all(ratio in printed for ratio in ratios) and report["machine"]["cpu"] in printed


@pytest.mark.slow  # fresh processes that import everything
def test_quick_start(tmp_path, capsys):
    main(["--quick", "--only", "start", "--rounds", "1", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "start_time.json").read_text(encoding="utf-8"))
    imports, loads = report["results"]["import"], report["results"]["load"]
    more = imports["differences"]["lavin-transformers_peft"]["median"]
    assert more == pytest.approx(imports["seconds"]["lavin"] - imports["seconds"]["transformers_peft"])
    assert set(loads["ratios"]) == {"lavin/lavin_base", "lavin/towers", "lavin_base/towers"}
    assert all(value > 0 for row in (imports, loads) for value in row["seconds"].values())
    printed = capsys.readouterr().out
    assert "goal: at most 0.20" in printed and "lavin-transformers_peft" in (tmp_path / "goals.md").read_text()


@pytest.mark.slow
def test_quick_growth(tmp_path, capsys):
    main(["--quick", "--only", "growth", "--rounds", "1", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"growth.json", "growth.png"}  # it has no goal of a number
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.width > picture.height > 300
    report = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))
    assert set(report["points"]) == set(report["results"])
    points = [(point["kind"], point["axis"]) for point in report["points"].values()]
    assert set(points) == {
        (f"{kind} step", axis) for kind in ("training", "decoding") for axis in ("length", "batch", "layers", "images")
    }
    assert len(points) == 2 * len(set(points))  # two values of each
    assert all(row["ratios"]["mma/base"]["median"] > 0 for row in report["results"].values())
    assert "growth.png" in capsys.readouterr().out


def test_goals_are_judged_to_two_decimals():
    assert reached(1.054, "at most 1.05") and not reached(1.056, "at most 1.05")
    assert reached(1.996, "at least 2.00") and not reached(1.99, "at least 2.00")


def test_rounds_are_checked(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--quick", "--rounds", "0", "--output", str(tmp_path)])
    assert "--rounds" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_rivals_compute_the_same():
    """The base, fed embeddings, is the frozen LaVIN; MMA only differs by its adapter."""
    frozen = frozen_lavin(QUICK).eval()
    plain, adapted = language_model(frozen).eval(), adapted_lavin(QUICK).eval()
    batch = make_batch(QUICK, frozen.config, seed=0)
    with torch.no_grad():
        expected = frozen(**batch).loss
        rival = plain(
            inputs_embeds=embed(frozen, batch), attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss
        with adapted.disable_adapter():
            disabled = adapted(**batch).loss
        trained = adapted(**batch).loss
        labelled = labelled_loss(adapted, batch)
    torch.testing.assert_close(rival, expected)
    torch.testing.assert_close(disabled, expected)
    assert not torch.equal(trained, expected)
    torch.testing.assert_close(labelled, trained)
    if add_fused_lm_head is not None:
        add_fused_lm_head(adapted.get_base_model())
        with torch.no_grad():
            torch.testing.assert_close(trl_loss(adapted, batch), trained)


def test_llava_is_the_same_towers_and_rows():
    """Its text-only rows are the base's; its image rows have one token per patch; only LoRA on q and v is trained."""
    frozen = frozen_lavin(QUICK).eval()
    model, plain = llava(QUICK, frozen).eval(), language_model(frozen).eval()
    batch, patches = make_batch(QUICK, frozen.config, seed=0), (QUICK.image_size // QUICK.patch_size) ** 2
    inputs = llava_batch(batch, frozen.config.image_token_id, patches)
    assert (inputs["input_ids"] == LLAVA_IMAGE_ID).sum(dim=1).tolist() == [patches, 0]
    assert (inputs["labels"] != -100).sum() == (batch["labels"] != -100).sum()
    ids = rows_without_padding(batch)[1][0]
    with torch.no_grad():
        logits = model(**inputs).logits[1, : len(ids)]
        torch.testing.assert_close(logits, plain(input_ids=ids[None]).logits[0])
        black = model(**{**inputs, "pixel_values": inputs["pixel_values"] * 0}).logits[0]
        assert not torch.allclose(black, model(**inputs).logits[0])
        torch.testing.assert_close(llava_labelled_loss(model, inputs), model(**inputs).loss)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 * QUICK.layers
    assert all(
        "lora_" in name and "language_model" in name and ("q_proj" in name or "v_proj" in name) for name in trained
    )


def test_the_recipe_of_2023_costs_more_and_learns_the_same():
    """Every row at 512, an image for each, the tower run on all, logits everywhere: loss and gradients stay."""
    model = adapted_lavin(QUICK).eval()
    config, tower = model.config, model.get_base_model().model.vision_tower
    batch = make_batch(QUICK, config, seed=0)
    inputs = recipe_batch(batch, config.image_token_id)
    assert inputs["input_ids"].shape == (QUICK.batch_size, PADDED) and len(inputs["pixel_values"]) == QUICK.batch_size
    seen, heads = [], []
    tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model.get_base_model().lm_head.register_forward_pre_hook(lambda module, args: heads.append(args[0].shape[:-1]))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, wanted = gradients(labelled_loss(model, batch))
    loss, found = gradients(recipe_loss(model, inputs))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert seen == [1, 2] and heads == [((batch["labels"][:, 1:] != -100).sum(),), (QUICK.batch_size, PADDED)]


def test_prefill_computes_what_the_prompt_means():
    """Left-padded rows give the logits that each gives alone; base and LaVIN differ by the adapter only."""
    results = {name: forward() for name, forward in prefill_time.make_rivals(QUICK).items()}
    torch.testing.assert_close(results["base"], results["base_images"])
    assert all(logits.shape == (prefill_time.ROWS, 1, QUICK.vocab_size) for logits in results.values())
    assert not torch.allclose(results["mma"], results["base"])
    prompts = Size(**{**vars(QUICK), "batch_size": prefill_time.ROWS, "answer_tokens": 2})
    frozen = frozen_lavin(QUICK)
    ids = rows_without_padding(make_batch(prompts, frozen.config, 0))[1][0]
    with torch.no_grad():
        alone = adapted_lavin(QUICK).eval()(input_ids=ids[None]).logits[:, -1]
    torch.testing.assert_close(results["mma"][1], alone)
    torch.testing.assert_close(results["mma_images"][1], alone)


def test_what_is_loaded_is_what_was_written(tmp_path):
    """`lavin` has the adapter that `lavin_base` lacks; the towers are the same."""
    start_time.write_folders(tmp_path, QUICK)
    loaded = {name: load() for name, load in start_time.make_rivals(tmp_path).items()}
    (vision, text), (base,), (lavin,) = loaded["towers"], loaded["lavin_base"], loaded["lavin"]
    assert not any("adapter_" in name for name, _ in base.named_parameters())
    ups = [parameter for name, parameter in lavin.named_parameters() if "adapter_up" in name and "weight" in name]
    assert len(ups) == QUICK.layers + QUICK.vision_layers and all(parameter.abs().sum() > 0 for parameter in ups)
    for model in (base, lavin):
        torch.testing.assert_close(model.lm_head.weight, text.lm_head.weight)
    name = "encoder.layers.0.mlp.fc1.weight"
    weights = {key.removeprefix("vision_model."): value for key, value in vision.state_dict().items()}
    tower = {key.removeprefix("vision_model."): v for key, v in lavin.model.vision_tower.state_dict().items()}
    torch.testing.assert_close(tower[name], weights[name])
