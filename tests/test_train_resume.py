"""Where `lavin train` goes on from: which checkpoint is whole, and whether the recipe is still the same."""

import json
import os
import re
import shutil

import pytest
import training
from datasets import Dataset
from training import said
from transformers import AutoModel

from lavin import LavinConfig, LavinProcessor
from lavin.recipes.train import checkpoints, record, train
from lavin.recipes.train.rows import measure


light, rows, finished = training.light, training.rows, training.finished


WRITTEN = (
    "trainer_state.json",
    "config.json",
    "mma/adapter_config.json",
    "mma/adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_a_half_written_checkpoint_is_seen(finished, tmp_path, name):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    newest, before, *_ = checkpoints.list_checkpoints(output)
    assert checkpoints.last_whole(output) == (newest, {})
    file = newest / name
    size = file.stat().st_size
    for keep in (size - 3, size // 2, 1, 0):
        os.truncate(file, keep)
        assert name in checkpoints.checkpoint_problem(newest), keep
    file.unlink()
    whole, broken = checkpoints.last_whole(output)
    assert whole == before and name.rpartition("/")[2] in broken[newest]


@pytest.mark.slow
def test_which_checkpoint_is_chosen(finished, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    newest, before, oldest = checkpoints.list_checkpoints(output)

    def choose(steps=24, **values):
        return train.choose_checkpoint(said(output_dir=str(output), **values), steps)

    assert choose() == (newest, True) and choose(steps=30) == (newest, False)
    assert choose(resume_from_checkpoint=str(oldest)) == (oldest, False), "the user's goes first"
    for no in (False, "false"):
        with pytest.raises(ValueError, match="holds checkpoint-24 of an earlier run.*Name another `output_dir`"):
            choose(resume_from_checkpoint=no)
        assert train.choose_checkpoint(said(output_dir=str(tmp_path / "new"), resume_from_checkpoint=no), 24) == (
            None,
            False,
        )
    shutil.copytree(oldest / "mma", output / "mma", dirs_exist_ok=True)
    assert choose() == (newest, False), "killed before the result was written"
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps({**state, "best_model_checkpoint": f"moved/{oldest.name}"}))
    assert choose(load_best_model_at_end=True) == (newest, True) and choose() == (newest, False)
    (newest / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=f"{newest.name} is not whole: scheduler.pt is missing. {before} is"):
        choose(resume_from_checkpoint=str(newest))
    assert choose() == (before, False)
    assert not newest.exists() and "_incomplete-checkpoint-24" in capsys.readouterr().out
    for checkpoint in (before, oldest):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="No checkpoint in .* is whole, and starting over would write over them"):
        choose()
    for checkpoint in (before, oldest):
        (checkpoint / "trainer_state.json").unlink()
    assert choose() == (None, False), "killed in its first save"
    with pytest.raises(ValueError, match="holds no checkpoint: leave it out"):
        choose(resume_from_checkpoint="true")


@pytest.mark.slow
def test_zero_checkpoints_are_for_as_many_processes(finished, tmp_path):
    """The adapter's file is whole on any number of processes, DeepSpeed's optimiser state is not."""
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    newest = checkpoints.list_checkpoints(output)[0]
    states = newest / "global_step24"
    states.mkdir()
    (newest / "latest").write_text("global_step24")
    assert "no model states" in checkpoints.checkpoint_problem(newest, 2)
    for name in ("mp_rank_00_model_states.pt", *(f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(2))):
        (newest / "optimizer.pt").rename(states / name)
        shutil.copy(states / name, newest / "optimizer.pt")
    for rank in range(2):
        shutil.copy(newest / "rng_state.pth", newest / f"rng_state_{rank}.pth")
    run = {"output_dir": str(output), "deepspeed": True}
    assert train.choose_checkpoint(said(**run, processes=2), 99) == (newest, False)
    with pytest.raises(ValueError, match="by DeepSpeed on 2 processes; DeepSpeed on 4"):
        train.choose_checkpoint(said(**run, processes=4), 99)
    with pytest.raises(ValueError, match="use the same accelerate config"):
        train.choose_checkpoint(said(output_dir=str(output)), 99)
    os.truncate(states / "zero_pp_rank_1_mp_rank_00_optim_states.pt", 999)
    assert "rank_1_mp_rank_00_optim_states.pt is cut off" in checkpoints.checkpoint_problem(newest, 2)


RUN = {
    "learning_rate": 0.01, "lr_scheduler_type": "cosine", "adam_beta2": 0.99, "weight_decay": 0.02, "seed": 1,
    "per_device_train_batch_size": 4, "model_init_kwargs": {"mma": {}},
}  # fmt: skip


def record_of(light, data, steps=24, processes=1, **changes) -> dict:

    columns = ["prompt", "completion"]
    measured = measure("train", data, columns, "images", LavinProcessor.from_pretrained(light), None)
    config = LavinConfig.from_pretrained(light)
    run = {**RUN, "model_name_or_path": str(light), **changes}
    return record.describe(said(processes, **run), config, data, columns, measured, steps)


@pytest.fixture
def recorded(light, rows, tmp_path):
    """Rows, and a checkpoint of a run on them that the launcher has recorded."""
    data, checkpoint = Dataset.from_parquet(str(rows)), tmp_path / "run" / "checkpoint-12"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 12, "max_steps": 24}')
    record.write_record(tmp_path / "run", record_of(light, data))
    return data, checkpoint


@pytest.mark.parametrize(
    ("change", "said_"),
    [
        ({"learning_rate": 0.02}, "learning_rate: 0.01 before, 0.02 now"),
        ({"lr_scheduler_type": "linear"}, 'lr_scheduler_type: "cosine" before, "linear" now'),
        ({"adam_beta2": 0.999}, "adam_beta2: 0.99 before, 0.999 now"),
        ({"weight_decay": 0.0}, "weight_decay: 0.02 before"),
        ({"seed": 2}, "seed: 1 before, 2 now"),
        ({"gradient_accumulation_steps": 2}, "rows per step .*: 4 before, 8 now"),
        ({"per_device_train_batch_size": 2}, "rows per step .*: 4 before, 2 now"),
        ({"model_init_kwargs": {"mma": {"r": 4}}}, "adapter's r: 8 before, 4 now"),
        ({"model_init_kwargs": {"mma": {"dropout": 0.0}}}, "adapter's dropout: 0.1 before, 0.0 now"),
        ({"model_init_kwargs": {"mma": {"text_mlp": True}}}, "adapter's text_mlp: false before, true now"),
        ({"model_init_kwargs": {"trainable": ["lm_head"]}}, 'trainable: null before, ."lm_head". now'),
        ({"steps": 20}, "max_steps, num_train_epochs.*: 24 before, 20 now"),
    ],
)
def test_changed_settings_are_refused(light, recorded, change, said_):
    data, checkpoint = recorded
    with pytest.raises(ValueError, match="(?s)" + said_ + ".*restore.*another `output_dir`.*`model_name_or_path: "):
        record.compare_record(checkpoint, record_of(light, data, **change))


def test_what_does_not_shape_the_training_may_change(light, recorded, tmp_path):
    """Layout, logs, moved files; a longer run, with a warning; a run that nothing is known of."""
    data, checkpoint = recorded
    data.to_parquet(tmp_path / "moved.parquet")
    moved = Dataset.from_parquet(str(tmp_path / "moved.parquet"))
    layout = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "processes": 2}
    assert record.compare_record(checkpoint, record_of(light, moved, **layout, save_steps=7, report_to=["x"])) is None
    longer = record.compare_record(checkpoint, record_of(light, data, steps=48))
    assert re.search("48 steps long instead of 24, .*computed anew.* at step 12", longer)
    record.write_record(checkpoint.parent, record_of(light, data, steps=48))
    assert record.compare_record(checkpoint, record_of(light, data)) is None, "the checkpoint is still of 24"
    other = record_of(light, data, learning_rate=1.0)
    for text in ("{", None):
        file = checkpoint.parent / record.RECORD
        file.unlink() if text is None else file.write_text(text)
        assert record.compare_record(checkpoint, other) is None


def test_another_adapter_than_the_checkpoints_is_refused(light, recorded):
    """Of a run without a record, as after plain `trl sft`: the checkpoint's own adapter is compared."""
    data, checkpoint = recorded
    (checkpoint.parent / record.RECORD).unlink()
    AutoModel.from_pretrained(light, mma={"r": 4, "dropout": 0.0}).save_pretrained(checkpoint)

    def compare(**mma):
        return record.compare_record(checkpoint, record_of(light, data, model_init_kwargs={"mma": mma}))

    assert compare(r=4, dropout=0.0) is None
    for mma, match in [({}, "(?s)dropout: 0.0 before, 0.1 now.* r: 4 before, 8 now"), ({"r": 4}, "dropout"),
                       ({"r": 4, "dropout": 0.0, "text_mlp": True}, "text_mlp: false before, true now")]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            compare(**mma)


def test_other_rows_are_refused(light, recorded):
    """Fewer, in another order, or with other words in the middle: the first and the last row would not tell."""
    data, checkpoint = recorded

    def edit(row, i):
        row["completion"][0]["content"][0]["text"] = (
            "blue red" if i == 17 else row["completion"][0]["content"][0]["text"]
        )
        return row

    for other in (data.select(range(31)), data.select([0, 2, 1, *range(3, 32)]), data.map(edit, with_indices=True)):
        with pytest.raises(ValueError, match=r"rows .number, hash of texts and lengths.: .32, "):
            record.compare_record(checkpoint, record_of(light, other))


@pytest.mark.parametrize("option", [["--resume_from_checkpoint", "false"], ["--resume_from_checkpoint=False"]])
def test_resume_false_is_not_passed_on(tmp_path, option):
    file = tmp_path / "x.yaml"
    file.write_text("seed: 1")
    found = said(resume_from_checkpoint="false")
    found.arguments[:] = ["--config", "x", *option, "--seed", "2"]
    assert train._without_false(found, file) == ["--config", "x", "--seed", "2"]
    file.write_text("resume_from_checkpoint: run/checkpoint-2")
    with pytest.raises(ValueError, match="names one: remove it there"):
        train._without_false(found, file)


def test_a_second_launcher_is_kept_out(tmp_path):
    with train.locked(tmp_path / "run", 0):
        with pytest.raises(ValueError, match="Another `lavin train`"), train.locked(tmp_path / "run", 0):
            pass
    with train.locked(tmp_path / "run", 0):
        pass
