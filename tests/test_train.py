"""`lavin train` before a run: how it reads a recipe, what it refuses and warns about."""

import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training
import yaml
from training import DDP, DEFAULTS, GOOD, ZERO3, said
from transformers import AutoModel

from lavin.recipes.train import checks, settings, train


light, small_disk = training.light, training.small_disk


# Recipes


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "No such file.*x.yaml"), ("a: [1", "not valid YAML"), ("- 1", "key: value")],
)
def test_recipe_that_is_none(tmp_path, text, said):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises((OSError, ValueError), match=said):
        settings.read_yaml(file)


@pytest.fixture(scope="module")
def worker():
    """A process that parses with TRL's parser, which is slow to import and touches the process it runs in."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def parsed(worker, folder: Path, values: dict, *overrides: str) -> settings.Settings:
    (folder / "x.yaml").write_text(yaml.safe_dump(values))
    arguments = ["--config", str(folder / "x.yaml"), *overrides]
    return worker.submit(settings.parse, arguments, list(values)).result()


CPU = {"use_cpu": True, "bf16": False, "output_dir": "out"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "overrides", "said"),
    [
        ({**CPU, "learning_rat": 1}, [], "`learning_rat` .did you mean `learning_rate`"),
        (CPU, ["--warmup_step", "3", "--packin_g", "1"], "`--packin_g` .did you mean `--packing`"),
        ({**CPU, "learning_rate": "fast"}, [], "learning_rate.*'fast'"),
        (CPU, ["word"], "'word' for the script"),
        ({**CPU, "multi_gpu": True}, [], "'True' for the script"),
        (CPU, ["--num_processes", "2"], "2 processes are asked for.*MULTI_GPU"),
        ({**CPU, "accelerate_config": "zero2"}, ["--accelerate_config", "zero3"], "--accelerate_config"),
        ({**CPU, "env": 3}, [], "env"),
        (CPU, ["--accelerate_config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_recipe_mistakes_are_named(worker, tmp_path, values, overrides, said):
    with pytest.raises(ValueError, match=said):
        parsed(worker, tmp_path, values, *overrides)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_recipe_without_gpu_gives_flags_that_work(worker, tmp_path):
    with pytest.raises(ValueError, match="no GPU") as error:
        parsed(worker, tmp_path, {"output_dir": "out", "dtype": "bfloat16"})
    flags = re.search(r"on the CPU add `(.*?)`", str(error.value))[1].split()
    found = parsed(worker, tmp_path, {"output_dir": "out", "dtype": "bfloat16"}, *flags)
    assert found["dtype"] == "float32" and found["use_cpu"] and not found["bf16"]


@pytest.mark.slow
def test_recipe_is_read_as_trl_reads_it(worker, tmp_path):
    """Also what the launcher adds is understood, and abbreviated options count as given."""
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(DDP))
    found = parsed(
        worker, tmp_path, {**CPU, "accelerate_config": str(tmp_path / "a.yaml"), "learning_rate": 1.0},
        "--learning_rate", "2e-3", "--report_t", "tensorboard", "--logging_nan_inf_filter", "false",
        "--max_length", "null", "--model_init_kwargs", '{"mma": {"r": 4}}',
    )  # fmt: skip
    assert found.processes == 2 and not found.deepspeed
    assert (found["learning_rate"], found["max_length"], found["logging_nan_inf_filter"]) == (2e-3, None, False)
    assert found["model_init_kwargs"] == {"mma": {"r": 4}}
    assert {"report_to", "max_length", "learning_rate", "use_cpu"} <= found.given
    assert not {"max_steps", "packing"} & found.given


# Settings


@pytest.mark.slow
def test_defaults_are_trls(worker, tmp_path):
    found = parsed(worker, tmp_path, CPU)
    assert {key: found[key] for key in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_name_or_path": None}, "no model"),
        ({"model_init_kwargs": {"peft": {}}}, "`peft` trains an adapter of PEFT's own"),
        ({"use_peft": True}, "use_peft"),
    ],
)
def test_settings_that_would_go_wrong_are_refused(change, match):
    assert checks.check_options(said(**GOOD)) == []
    with pytest.raises(ValueError, match=match):
        checks.check_options(said(**{**GOOD, **change}))


def test_doubtful_settings_are_warned_about():
    doubtful = {"logging_nan_inf_filter": True, "save_only_model": True, "save_strategy": "no"}
    warnings = checks.check_options(said(**GOOD, **doubtful))
    assert [next(name for name in doubtful if name in warning) for warning in warnings] == list(doubtful)


def test_pushes_that_nobody_could_use_are_refused(light, tmp_path):
    from lavin import LavinConfig

    config = LavinConfig(text_checkpoint="org/text", vision_checkpoint="org/vision")
    push = {"model_name_or_path": "org/x", "push_to_hub": True, "hub_strategy": "end"}
    checks.check_push(said(**push), config, [])
    with pytest.raises(ValueError, match="on this machine .*/text"):
        checks.check_push(said(**push), LavinConfig.from_pretrained(light), [])
    with pytest.raises(ValueError, match="hub_strategy: end"):
        checks.check_push(said(**{**push, "hub_strategy": "every_save"}), config, [])
    with pytest.raises(ValueError, match="into the card"):
        checks.check_push(said(**push, dataset_name=str(tmp_path)), config, [])
    with pytest.raises(ValueError, match="public Space.*trackio_static_space_id: false"):
        checks.check_push(said(**push), config, ["trackio"])
    checks.check_push(said(**push, trackio_static_space_id=False), config, ["trackio"])


@pytest.mark.parametrize(
    ("installed", "given", "expected"),
    [
        ({"trackio", "tensorboard"}, {}, ["trackio"]),
        ({"tensorboard"}, {}, ["tensorboard"]),
        (set(), {}, []),
        ({"trackio"}, {"report_to": []}, []),
        ({"trackio"}, {"report_to": ["wandb"]}, ["wandb"]),
    ],
)
def test_report_to_is_what_is_installed_unless_given(monkeypatch, installed, given, expected):
    """A folder of that name beside the recipe is found, too, and has no origin: it does not count."""
    folder = SimpleNamespace(origin=None)
    specs = {name: SimpleNamespace(origin="__init__.py") for name in installed}
    monkeypatch.setattr(checks, "find_spec", lambda name: specs.get(name, folder if installed else None))
    assert checks.choose_report_to(said(**given)) == expected


def test_model_folders_that_trl_cannot_load(light, pair, tmp_path):
    config, processor, trained = checks.check_model(said(**{**GOOD, "model_name_or_path": str(light)}))
    assert (config.model_type, type(processor).__name__) == ("lavin", "LavinProcessor")
    model = AutoModel.from_pretrained(light, mma={})
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)

    def refused(folder, match, mma=None):
        with pytest.raises((OSError, ValueError), match=match):
            values = {"model_name_or_path": str(folder), "model_init_kwargs": {"mma": mma or {}}}
            checks.check_model(said(**{**GOOD, **values}))

    refused(tmp_path / "nowhere", "There is no folder")
    refused(pair / "text", "is a llama, no LaVIN")
    refused(light, "no field rank", {"rank": 3})
    for name, match in {"processor_config.json": "no processor", "config.json": "no config.json"}.items():
        shutil.copytree(light, tmp_path / name)
        (tmp_path / name / name).unlink()
        refused(tmp_path / name, match)


def test_output_that_cannot_hold_the_checkpoints(tmp_path):
    (tmp_path / "file").write_text("")
    free = shutil.disk_usage(tmp_path).free
    run = {"output_dir": str(tmp_path / "new" / "run"), "save_steps": 10, "save_total_limit": 2}
    assert checks.check_output(said(**run), 1000, steps=100) == 4000  # two kept, one while saving, the result
    assert checks.check_output(said(**{**run, "save_total_limit": None}), 1000, steps=100) == 12_000
    with pytest.raises(ValueError, match="cannot be written"):
        checks.check_output(said(**{**run, "output_dir": str(tmp_path / "file" / "run")}), 1, 1)
    with pytest.raises(ValueError, match="free.*save_total_limit"):
        checks.check_output(said(**run), free // 3, steps=100)
    assert not (tmp_path / "new").exists()


def test_zero2_in_bfloat16_is_warned_about():
    for stage, bf16, count in [(2, True, 1), (1, True, 1), (2, False, 0), (3, True, 0), (None, True, 0)]:
        found = said(**GOOD, bf16=bf16)
        found.zero_stage = stage
        warnings = checks.check_options(found)
        assert len(warnings) == count and all("--bf16 false" in warning for warning in warnings)


@pytest.mark.slow
def test_zero_stage_is_read_from_the_accelerate_config(worker, tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(ZERO3))
    values = {**CPU, "accelerate_config": str(tmp_path / "a.yaml")}
    assert parsed(worker, tmp_path, values).zero_stage == 3
    assert parsed(worker, tmp_path, values, "--zero_stage", "2").zero_stage == 2
    assert parsed(worker, tmp_path, CPU).zero_stage is None


@pytest.mark.parametrize(
    ("rows_", "values", "processes", "expected"),
    [
        (
            12_726,
            {"num_train_epochs": 20, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            2,
            7960,
        ),
        (10, {"per_device_train_batch_size": 4, "dataloader_drop_last": True}, 1, 6),
        (10, {"per_device_train_batch_size": 4, "num_train_epochs": 0.5}, 1, 2),
        (10, {"max_steps": 7}, 1, 7),
    ],
)
def test_steps_are_counted_as_trainer_counts_them(rows_, values, processes, expected):
    assert train.count_steps(said(processes, **values), rows_) == expected
