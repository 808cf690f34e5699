"""`lavin train-segments`: recipes, the plan, what each segment changes, kills, the card; InfMLLM's three stages."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from training import ENVIRONMENT, wait_for
from training import run as run_command
from transformers import AutoModel

import lavin.recipes.quickstart
from lavin import LavinForConditionalGeneration
from lavin.recipes import cli
from lavin.recipes.init import init_folder
from lavin.recipes.segments.memory import infmllm_config, measure, measure_recipe
from lavin.recipes.segments.recipe import PARTS, read_recipe
from lavin.recipes.segments.run import RECORD, train_segments
from lavin.recipes.train import checkpoints
from lavin.trainable_lavin import trained_names


INFMLLM = Path(cli.__file__).parent / "infmllm"
TINY = Path(lavin.recipes.quickstart.__file__).parent / "tiny"
COMMAND = [str(Path(sys.executable).with_name("lavin")), "train-segments"]
SHORT = ["--max_steps", "12", "--save_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1"]
STAGES = ["1-adapter", "2-tasks", "3-instructions"]


# Recipes


def read(folder: Path, *segments: dict, **values):
    recipe = {"output_dir": "out", "segments": list(segments), **values}
    (folder / "x.yaml").write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not ...}))
    return read_recipe(folder / "x.yaml")


FIRST = {"name": "a", "init_from": "model", "trainable": ["projector"]}


def test_what_a_segment_becomes(tmp_path):
    """Each is a recipe of `trl sft`: its own settings before the common ones, its start, its folder."""
    common = {"learning_rate": 1.0, "seed": 3, "model_init_kwargs": {"attn_implementation": "eager"}}
    second = {"name": "b", "trainable": ["q_and_v", "lm_head"], "learning_rate": 2.0}
    output, segments = read(tmp_path, FIRST, second, {"name": "c", "mma": {"r": 4}}, common=common)
    a, b, c = (segment.values for segment in segments)
    assert output == Path("out") and a["model_name_or_path"] == "model" and a["output_dir"] == "out/1-a"
    assert b["model_name_or_path"] == "out/1-a" and c["model_name_or_path"] == "out/2-b"
    assert (a["learning_rate"], b["learning_rate"], b["seed"]) == (1.0, 2.0, 3)
    kept = {"attn_implementation": "eager"}
    assert a["model_init_kwargs"] == {**kept, "trainable": [PARTS["projector"]]}
    assert b["model_init_kwargs"] == {**kept, "trainable": [PARTS["q_and_v"], "lm_head"]}
    assert c["model_init_kwargs"] == {**kept, "mma": {"r": 4}}
    assert not {"name", "init_from", "trainable", "mma"} & set(b)


@pytest.mark.parametrize(
    ("segments", "values", "said"),
    [
        ([], {}, "must be a list"),
        ([FIRST], {"output_dir": ...}, "names no `output_dir`"),
        ([FIRST], {"comon": {}}, "unknown key `comon`: did you mean `common`"),
        ([{**FIRST, "name": "a/b"}], {}, "segment 1 needs a `name`"),
        ([FIRST, {**FIRST}], {}, "there is a segment 'a' already"),
        ([{**FIRST, "init_from": "previous"}], {}, "is the first: `init_from: my-lavin`"),
        ([{**FIRST, "trainable": None}], {}, "trains nothing"),
        ([{**FIRST, "mma": {}}], {}, "one after the other"),
        ([{**FIRST, "trainable": ["("]}], {}, "no regular expression"),
        ([{"name": "a", "init_from": "m", "mma": {}}, {"name": "b", "trainable": ["all"]}], {}, "`mma` last"),
        ([{**FIRST, "output_dir": "x"}], {}, "`output_dir` cannot stand here"),
        ([FIRST], {"common": {"trainable": ["all"]}}, "`trainable` cannot stand here"),
        ([{**FIRST, "model_init_kwargs": {"mma": {}}}], {}, "stand in the segment itself"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(tmp_path, segments, values, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path, *segments, **values)


def test_infmllm_trains_what_is_published():
    """Adapter; vision tower, adapter, q and v weights; adapter and language model. Both recipes, on real names."""
    recipes = [read_recipe(INFMLLM / f"{name}.yaml")[1] for name in ("infmllm-7b", "tiny")]
    with torch.device("meta"):
        model = LavinForConditionalGeneration(infmllm_config(1 / 8, 1 / 8))
    every = [name for name, _ in model.named_parameters()]
    adapter = {name for name in every if "multi_modal_projector" in name}
    vision = {name for name in every if "vision_tower" in name and "post_layernorm" not in name}
    text = {name for name in every if "language_model" in name or "lm_head" in name}
    q_and_v = {name for name in text if name.endswith(("q_proj.weight", "v_proj.weight"))}
    assert len(q_and_v) == 2 * model.config.text_config.num_hidden_layers
    for segments in recipes:
        patterns = [segment.values["model_init_kwargs"]["trainable"] for segment in segments]
        assert [set(trained_names(model, one)) for one in patterns] == [
            adapter,
            adapter | vision | q_and_v,
            adapter | text,
        ]
        assert all("fraction" in source for source in segments[1].values["datasets"])
        assert [segment.after for segment in segments] == [None, *segments[:2]]
    kinds = [[Path(s["data_files"]).parent.name for s in one.values["datasets"]] for one in recipes[0]]
    assert kinds == [["captions"], ["captions", "vqa", "grounding"], ["instructions"]]
    # What nobody has published is marked, and nothing else.
    lines = [line for line in (INFMLLM / "infmllm-7b.yaml").read_text().splitlines() if not line.startswith("#")]
    keys = {line.split(":")[0].strip(" -"): "# ours" in line for line in lines if ":" in line}
    published = {"name", "init_from", "trainable", "datasets", "path", "data_files", "columns"}
    assert {key for key, ours in keys.items() if not ours} == published | {"output_dir", "common", "segments"}


# Memory


def test_memory_is_what_the_plan_says_and_grows_as_the_paper_says():
    """Counted from the tensors there are; the plan's numbers are 4, 4 and 8 bytes a value."""
    config, found = infmllm_config(1 / 16, 1 / 8), []
    for segment in read_recipe(INFMLLM / "infmllm-7b.yaml")[1]:
        model = LavinForConditionalGeneration(config)
        names = trained_names(model, segment.values["model_init_kwargs"]["trainable"])
        trained = sum(p.numel() for name, p in model.named_parameters() if name in names)
        one = measure(config, segment.values["model_init_kwargs"]["trainable"])
        assert one["weights"] == 4 * sum(p.numel() for p in model.parameters())
        assert (one["gradients"], one["optimiser"]) == (4 * trained, 8 * trained)
        found.append(one["weights"] + one["gradients"] + one["optimiser"])
    assert found == sorted(found) and len(set(found)) == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_measured_peak_grows_from_stage_to_stage():
    adapter, tasks, instructions = measure_recipe(str(INFMLLM / "infmllm-7b.yaml"), 1 / 8, 1 / 8, device="cpu")
    assert adapter["peak"] < tasks["peak"] < instructions["peak"]
    for one in (adapter, tasks, instructions):
        assert one["peak"] > one["weights"] + one["gradients"] + one["optimiser"]


# Whole runs, with the real command: InfMLLM's three stages on the tiny pair


def user(text: str, image: bool) -> list[dict]:
    content = [{"type": "image", "text": None}] if image else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


ASKED = {
    "tasks/rows/captions/train-0": lambda colour, i: ("Describe the image.\nResponse:", f"a {colour} square"),
    "tasks/rows/grounding/train-0": lambda colour, i: (f"<ref>the {colour} square</ref>", f"({i % 5 / 10:.2f},0.10)"),
    "quickstart/data/train": lambda colour, i: ("Question: which colour?\nResponse:", f"The answer is {colour}."),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the recipe's paths lead to a light folder and to rows of each kind."""
    folder = tmp_path_factory.mktemp("infmllm")
    init_folder(TINY / "vision", TINY / "text", folder / "outputs/tasks/pool", projector_type="pool", pool_size=4)
    for name, ask in ASKED.items():
        rows = []
        for i in range(24):
            colour, image = ("red", "green", "blue")[i % 3], not name.startswith("quickstart") or i % 2 == 0
            question, answer = ask(colour, i)
            reply = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            images = [Image.new("RGB", (64, 64), colour)] if image else []
            own = {"choices": ["red"]} if name.startswith("quickstart") else {}  # data sets differ in other columns
            rows.append({"prompt": user(question, image), "completion": reply, "images": images, **own})
        file = folder / "outputs" / f"{name}.parquet"
        file.parent.mkdir(parents=True)
        Dataset.from_list(rows).cast_column("images", List(ImageFeature())).to_parquet(file)
    return folder


def run(place: Path, recipe: Path, *options: str, code: int = 0) -> str:
    return run_command([*COMMAND, str(recipe), *SHORT, *options], code, cwd=place)


@pytest.fixture(scope="module")
def whole(place):
    """The three stages from beginning to end: their folder and the log."""
    return place / "outputs/infmllm", run(place, INFMLLM / "tiny.yaml")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_the_plan_comes_first_and_progress_goes_across_segments(whole, place):
    output, log = whole
    model = AutoModel.from_pretrained(output.parent / "tasks/pool")
    every = sum(p.numel() for p in model.parameters())
    plan = log[: log.index("[...] Segment 1 of 3")]
    for segment in read_recipe(INFMLLM / "tiny.yaml")[1]:
        names = trained_names(model, segment.values["model_init_kwargs"]["trainable"])
        trained = sum(p.numel() for name, p in model.named_parameters() if name in names)
        megabytes = (every * 4 + trained * 12) / 2**20
        part = plan[plan.index(f"Segment {segment.number} of 3: {segment.name}, from") :]
        assert re.search(rf"trains +{trained:,} of {every:,} values: ", part)
        assert re.search(rf"steps +12\n +memory +{megabytes:.1f} MB = weights .*\n +time +at least ", part)
    assert "60 rows, 48 with images: 40% captions/train-*.parquet, 40% data/train.parquet, 20% grounding/" in plan
    assert "In all 36 steps" in plan
    assert "[#..] Segment 2 of 3: tasks; 12 of 36 steps done, about" in log
    assert "[##.] Segment 3 of 3: instructions; 24 of 36 steps done, about" in log
    assert "All 3 segments are finished. The result is outputs/infmllm/3-instructions.\n" in log


@pytest.mark.slow
def test_each_segment_changes_its_parts_and_no_bit_of_others(whole):
    output, _ = whole
    start = AutoModel.from_pretrained(output.parent / "tasks/pool", dtype=torch.float32)
    before = {name: value for name, value in start.state_dict().items() if name != "lm_head.weight"}
    for segment in read_recipe(INFMLLM / "tiny.yaml")[1]:
        after = weights(output / segment.title)
        assert after.keys() == before.keys()
        names = set(trained_names(start, segment.values["model_init_kwargs"]["trainable"]))
        for name, value in after.items():
            assert torch.equal(value, before[name]) != (name in names), (segment.title, name)
        before = after
    loaded = AutoModel.from_pretrained(output / STAGES[-1]).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in before.items())


@pytest.mark.slow
def test_one_card_tells_of_all_segments(whole):
    output, _ = whole
    card = (output / STAGES[-1] / "README.md").read_text()
    assert card.count("<!-- lavin:segments -->") == 1 and str(output) not in card
    table = [line for line in card.splitlines() if re.match(r"\| (adapter|tasks|instructions) \|", line)]
    assert len(table) == 3
    assert "vision tower 1,687,040" in table[1] and "20% grounding/train-*.parquet | 12 | 0.0005 |" in table[1]
    assert all(re.search(r"\| [\d.]+ to [\d.]+ \|$", line) for line in table), "losses"
    assert "tasks" not in (output / STAGES[0] / "README.md").read_text()


@pytest.mark.slow
def test_killed_it_goes_on_in_the_segment_and_at_the_step(whole, place, tmp_path):
    """SIGKILL for all processes in the second segment; the first is not trained again, and the end is the same."""
    output, log = tmp_path / "outputs/infmllm", tmp_path / "log"
    shutil.copytree(place / "outputs", tmp_path / "outputs", ignore=shutil.ignore_patterns(*STAGES[1:]))
    records = json.loads((output / RECORD).read_text())
    (output / RECORD).write_text(json.dumps({STAGES[0]: records[STAGES[0]]}))
    recipe = yaml.safe_load((INFMLLM / "tiny.yaml").read_text())
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**recipe, "segments": recipe["segments"][:2]}))
    with open(log, "w") as file:
        launcher = subprocess.Popen(
            [*COMMAND, "two.yaml", *SHORT], cwd=tmp_path, env=ENVIRONMENT, stdout=file, stderr=file,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    states = [output / STAGES[1] / f"checkpoint-{step}" / "trainer_state.json" for step in (2, 4)]
    wait_for(lambda: launcher.poll() is not None or any(state.exists() for state in states))
    for process in [launcher, *psutil.Process(launcher.pid).children(recursive=True)]:
        process.kill()
    launcher.wait()
    time.sleep(0.5)
    assert not (output / STAGES[1] / "model.safetensors").exists(), "it had ended already"
    first = os.stat(output / STAGES[0] / "model.safetensors").st_mtime_ns
    again = run(tmp_path, tmp_path / "two.yaml")
    assert "Segment 1 of 2: adapter, from outputs/tasks/pool\n  finished   12 steps" in again
    assert "Segment 1 of 2: adapter;" not in again and "[#.] Segment 2 of 2: tasks" in again
    step = int(re.search(r"Starts +at step (\d+), from outputs/infmllm/2-tasks/checkpoint-", again)[1])
    assert 0 < step < 12
    assert os.stat(output / STAGES[0] / "model.safetensors").st_mtime_ns == first
    expected, found = weights(whole[0] / STAGES[1]), weights(output / STAGES[1])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert checkpoints.same_weights(output / STAGES[1], output / STAGES[1] / "checkpoint-12")


@pytest.mark.slow
def test_an_edited_recipe_does_not_go_on_unnoticed(whole, place):
    """A finished segment that the recipe now says something else of."""
    recipe = yaml.safe_load((INFMLLM / "tiny.yaml").read_text())
    (place / "edited.yaml").write_text(yaml.safe_dump(recipe).replace("learning_rate: 0.003", "learning_rate: 0.004"))
    log = run(place, place / "edited.yaml", "--dry-run", code=2)
    assert "Segment 1 (adapter)" in log and "learning_rate: 0.003 before, 0.004 now" in log


@pytest.mark.slow
def test_what_cannot_work_is_refused_before_anything_starts(place, monkeypatch):
    """Be it in the last segment; and options that would lead all segments into one folder."""
    monkeypatch.chdir(place)
    recipe = yaml.safe_load((INFMLLM / "tiny.yaml").read_text())
    recipe["segments"][2]["trainable"] = ["language_modle"]
    (place / "wrong.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": "outputs/other"}))
    with pytest.raises(ValueError, match=r"Segment 3 .instructions.*'language_modle' matches no parameter"):
        train_segments("wrong.yaml", SHORT)
    with pytest.raises(ValueError, match="`--output_dir` is for one run"):
        train_segments("wrong.yaml", ["--output_d", "elsewhere"])  # as TRL's parser abbreviates
    assert not (place / "outputs/other").exists()
