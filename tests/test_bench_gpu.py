"""The GPU benchmark at a tiny size on a CPU: what it builds is what it says, and no failed row ends the others."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig

from lavin.recipes.bench import gpu
from lavin.recipes.bench.gpu_models import build, count_flops, lavin_config, make_batches
from lavin.recipes.bench.step_time import labelled_loss
from lavin.recipes.init import init_folder
from lavin.recipes.quickstart.quickstart import TAPS, TINY


ROWS = [("bf16", False), ("bf16", True), ("4-bit", False), ("4-bit", True)]


@pytest.mark.slow
def test_quick_in_a_fresh_process(tmp_path):
    pytest.importorskip("bitsandbytes")
    file = tmp_path / "new" / "gpu.json"
    command = [sys.executable, "-m", "lavin.recipes.bench.gpu", "--quick", "--output", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["trained_parameters"]["7B"] == 3_781_296 and report["trained_parameters"]["13B"] == 5_390_080
    assert {"gpu", "cpu", "torch", "date"} <= set(report["machine"])
    assert [(row["base"], row["checkpointing"]) for row in report["results"]] == ROWS
    for row in report["results"]:
        assert row["samples_per_second"] > 0 and row["mfu_percent"] is None and row["peak_memory_gb"] is None
        assert row["hours_20_epochs"] == pytest.approx(12_726 * 20 / row["samples_per_second"] / 3600)
    table = [line for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert len(table) == 4 and all(line.count("n/a") == 2 for line in table)
    assert "bare loop" in done.stdout and report["machine"]["torch"] in done.stdout
    # Without a GPU the real shapes are refused before anything is built.
    done = subprocess.run([*command[:3], "--output", str(file)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "--quick" in done.stderr


def kinds(model: nn.Module) -> set[tuple[str, str, str]]:
    """Every weight's module, with layers' numbers left out, its class and dtype."""
    return {
        (re.sub(r"\d+", "N", name), type(module).__name__, str(parameter.dtype))
        for name, module in model.named_modules()
        for _, parameter in module.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("base", gpu.BASES)
def test_random_weights_lie_as_loaded_ones_do(base, tmp_path):
    """The same layers are quantised, and each weight has the dtype that `from_pretrained` gives it."""
    pytest.importorskip("bitsandbytes")
    init_folder(TINY / "vision", TINY / "text", tmp_path / "light", vision_feature_layers=TAPS)
    settings = {}
    if base == "4-bit":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    loaded = AutoModel.from_pretrained(tmp_path / "light", mma={}, dtype=torch.bfloat16, **settings)
    made = build("tiny", base, "cpu")
    assert kinds(made) == kinds(loaded)
    states = [module.weight.quant_state for module in made.modules() if type(module).__name__ == "Linear4bit"]
    assert len(states) == (2 * 7 + 4 * 6 if base == "4-bit" else 0)
    assert all(state.quant_type == "nf4" and state.nested for state in states)
    assert not any(tensor.is_meta for tensor in [*made.parameters(), *made.buffers()])
    rotary = made.get_base_model().model.language_model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32 and rotary.inv_freq[0] == 1

    batch = make_batches("tiny", 4, 1)[0]
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            made.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # of the dropout
        with torch.autocast("cpu", torch.bfloat16):
            loss = labelled_loss(made, batch)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.dtype == torch.float32 for parameter in trained)


def test_flops_are_those_of_the_text_and_the_images():
    """Against the numbers of LLaMA-7B and ViT-L/14, by hand."""
    batch = make_batches("7B", 4, 1)[0]
    tokens, labelled = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    text = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * tokens
    head = 4096 * 32_000 * labelled
    vision = 24 * (4 * 1024**2 + 2 * 1024 * 4096) * 257 * 2
    assert count_flops("7B", [batch, batch]) == 2 * 4 * (text + head + vision)
    assert batch["pixel_values"].shape == (2, 3, 224, 224)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in make_batches("7B", 4, 50)])
    labels = torch.cat([(batch["labels"] != -100).sum(1) for batch in make_batches("7B", 4, 50)])
    assert 200 < labels.float().median() < 240 and 65 < (lengths - labels).float().median() < 100
    assert lavin_config("13B").text_config.hidden_size == 5120


@pytest.mark.slow
def test_a_row_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    """Out of memory is an answer; any other error is shown too, but the command says that something is wrong."""
    pytest.importorskip("bitsandbytes")
    measure, calls = gpu.measure, []

    def failing(model, batches, device):
        calls.append(model.get_base_model().is_gradient_checkpointing)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("no room")
        if len(calls) == 4 and broken:
            raise RuntimeError("a kernel is missing")
        return measure(model, batches, device)

    monkeypatch.setattr(gpu, "measure", failing)
    for broken in (False, True):
        calls.clear()
        file = tmp_path / f"{broken}.json"
        assert gpu.main(["--quick", "--output", str(file)]) == int(broken)
        rows = json.loads(file.read_text())["results"]
        assert [(row["base"], row["checkpointing"]) for row in rows] == ROWS
        assert rows[0]["error"] == "out of memory" and calls == [False, True, False, True]
        assert ["error" in row for row in rows] == [True, False, False, broken]
        printed = capsys.readouterr().out
        assert "out of memory" in printed and ("a kernel is missing" in printed) == broken


def test_table_stands_beside_the_goals():
    row = {"model": "7B", "base": "4-bit", "checkpointing": True, "samples_per_second": 50.0, "mfu_percent": 44.9,
           "peak_memory_gb": 7.9, "reserved_memory_gb": 9.0, "hours_20_epochs": 1.41}  # fmt: skip
    shown = gpu.table([row, {**row, "base": "bf16"}, {**row, "model": "13B"}]).splitlines()
    assert "44.9 (>= 45: no)" in shown[2] and "7.9 (< 8: yes)" in shown[2] and "1.41 (< 1.5: yes)" in shown[2]
    assert "7.9 (< 20: yes)" in shown[3] and "(" not in shown[4]
    seconds = {"seconds": 2.0, "peak": 1.0, "reserved": 1.0}
    made = gpu.row_of("7B", "bf16", False, seconds, samples=100, flops=445e12, peak=989e12)
    assert made["samples_per_second"] == 50 and math.isclose(made["mfu_percent"], 100 * 445 / 2 / 989)
