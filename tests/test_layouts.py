"""The same global batches give the same training, however they are laid out over steps, processes and ZeRO stages."""

import random

import pytest
import torch
from conftest import batch, tiny_lavin
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from test_recipes import LAYOUTS as FILES
from training import DDP, ZERO3, adapter, distance, sft
from transformers import AutoModel

from lavin.recipes.quickstart.quickstart import make_model


STEPS, GLOBAL_BATCH = 20, 8
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
# Processes, rows of each at once, accumulation steps, accelerate's settings; limits on each loss and on the adapter.
LAYOUTS = {
    "1 x 4, 2 accumulated": (1, 4, 2, None, 1e-5, 1e-3),
    "1 x 1, 8 accumulated": (1, 1, 8, None, 1e-5, 1e-3),
    "2 processes x 4": (2, 4, 1, FILES["cpu-ddp"], 1e-5, 1e-3),
    "2 processes x 2, 2 accumulated": (2, 2, 2, DDP, 1e-5, 1e-3),
    "ZeRO-2, 2 processes x 4": (2, 4, 1, FILES["cpu-zero2"], 1e-4, 1e-3),
    "ZeRO-3, 2 processes x 4": (2, 4, 1, FILES["cpu-zero3"], 1e-4, 1e-3),
    "ZeRO-3 with offloading, 2 processes x 4": (2, 4, 1, FILES["cpu-zero3-offload"], 1e-4, 1e-3),
    "ZeRO-3, 2 processes x 2, 2 accumulated, checkpointing": (2, 2, 2, ZERO3, 1e-4, 1e-3),
}
# Which rows of a global batch have an image: half of all rows, but micro-batches of 4 with none, some and all.
PATTERNS = ("....IIII", "IIII....", "........", "IIIIIIII", "I...III.")
NOTE_TOWER = """
        with open(f"{os.environ['TOWER_LOG']}-{os.environ.get('RANK', 0)}", "a") as file:
            print(len(pixel_values) if pixel_values.any() else 0, file=file)"""


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """The quickstart's pair, whose images matter to its answers; its code notes each run of the vision tower."""
    folder = tmp_path_factory.mktemp("light")
    make_model(folder)
    code = folder / "modeling_lavin.py"
    text, place = code.read_text(), "        self.taps.states = []"
    assert text.count(place) == 1
    text = text.replace(place, place + NOTE_TOWER)
    code.write_text(text.replace("\nimport torch\n", "\nimport os\nimport torch\n", 1))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """20 global batches: images unevenly spread, answers of 1 to 60 words."""
    draw, rows = random.Random(0), []
    lengths = [1 + i % 60 for i in range(STEPS * GLOBAL_BATCH)]
    draw.shuffle(lengths)
    for i, length in enumerate(lengths):
        with_image = has_image(i)
        content = [{"type": "image", "text": None}] if with_image else []
        answer = " ".join(draw.choices(["red", "blue", "It", "shows", "two", "small", "rings"], k=length))
        question = f"Question: What is shown?\nContext: N/A\nOptions: (A) {i} (B) red\nResponse:"
        rows.append(
            {
                "prompt": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
                "images": [Image.effect_noise((64, 64), 10 + i).convert("RGB")] if with_image else [],
            }
        )
    assert min(lengths) == 1 and max(lengths) == 60
    file = tmp_path_factory.mktemp("rows") / "train.parquet"
    Dataset.from_list(rows).cast_column("images", List(ImageFeature())).to_parquet(file)
    return file


def has_image(i: int) -> bool:
    return PATTERNS[i // GLOBAL_BATCH % len(PATTERNS)][i % GLOBAL_BATCH] == "I"


def train(light, rows, output, batch_size, accumulated=1, accelerate=None, **settings):
    """20 steps of `trl sft`; a collective that waits for two minutes fails."""
    losses, log = sft(
        light, output, rows, accelerate, {"TOWER_LOG": str(output / "tower")},
        max_steps=STEPS, save_steps=STEPS, per_device_train_batch_size=batch_size, dtype="float32",
        gradient_accumulation_steps=accumulated, ddp_timeout=120, learning_rate=6e-3,
        **{"train_sampling_strategy": "sequential", **settings},
    )  # fmt: skip
    assert len(losses) == STEPS
    return losses, log


def tower_runs(output, processes: int) -> list[list[int]]:
    """Of each process: how many images each run of its vision tower had; 0 for a run on an empty image."""
    return [[int(line) for line in (output / f"tower-{rank}").read_text().split()] for rank in range(processes)]


@pytest.fixture(scope="module")
def one_batch(light, rows, tmp_path_factory):
    """What every layout must equal: one process, the whole global batch at once."""
    folder = tmp_path_factory.mktemp("one") / "run"
    losses, _ = train(light, rows, folder, GLOBAL_BATCH)
    assert losses[-1] < losses[0] / 1.2, "it does not learn, so equal losses would show nothing"
    return folder, losses


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_alike(light, rows, one_batch, tmp_path, layout):
    processes, batch_size, accumulated, accelerate, loss_limit, adapter_limit = LAYOUTS[layout]
    assert processes * batch_size * accumulated == GLOBAL_BATCH
    settings = REENTRANT if layout.endswith("checkpointing") else {}
    losses, log = train(light, rows, tmp_path, batch_size, accumulated, accelerate, **settings)
    assert not settings or "use_reentrant=False" in log
    folder, expected = one_batch
    apart = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    steps = "\n".join(f"{i + 1:3} {a:.7f} {b:.7f} {a - b:+.1e}" for i, (a, b) in enumerate(zip(losses, expected)))  # noqa: B905
    print(f"| {layout} | {max(apart):.1e} | {distance(tmp_path, folder):.1e} |")
    assert max(apart) <= loss_limit, f"{layout}: losses are {max(apart):.1e} off\n{steps}"
    assert distance(tmp_path, folder) <= adapter_limit
    assert {value.dtype for value in adapter(tmp_path).values()} == {torch.float32}
    assert AutoModel.from_pretrained(tmp_path).active_adapters() == ["mma"]
    # Ranks run the same modules in every micro-batch; a single process skips the vision tower where it can.
    counts = [sum(map(has_image, range(i, i + batch_size))) for i in range(0, STEPS * GLOBAL_BATCH, batch_size)]
    assert 0 in counts and batch_size in counts
    expected_runs = [counts[rank::processes] for rank in range(processes)]
    if processes == 1:
        expected_runs = [[count for count in counts if count]]
    assert tower_runs(tmp_path, processes) == expected_runs


@pytest.mark.slow
def test_the_same_seed_gives_a_bit_identical_adapter(light, rows, one_batch, tmp_path):
    """With dropout and a random order of the rows."""
    settings = {"model_init_kwargs": {"mma": {"dropout": 0.1}}, "train_sampling_strategy": "random"}
    losses = [train(light, rows, tmp_path / name, GLOBAL_BATCH, **settings)[0] for name in ("first", "second")]
    files = [(tmp_path / name / "mma" / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1] and losses[0] == losses[1]
    assert losses[0][0] != one_batch[1][0], "the order of the rows must be random, or nothing random was compared"


def test_a_batch_without_images_moves_what_reads_images_like_in_distributed_training():
    """Its gradient is zeros, not nothing: AdamW then follows its momentum, as it does where a rank had an image."""
    model, calls = tiny_lavin(mma={"dropout": 0.0}).train(), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    inputs = batch(model.config, (0, 0))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in trained.values()) and not calls
    idle = {name: bool((grad == 0).all()) for name, grad in trained.items() if "vision" in name or "projector" in name}
    assert idle and all(idle.values())
    assert all(torch.isfinite(grad).all() for grad in trained.values())
