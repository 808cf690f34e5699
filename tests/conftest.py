"""Tiny random models, in one place. Their weights are large, so that every part of them matters to the output."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from faults import ROWS, write_table
from packaging.version import Version
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from lavin import LavinConfig, LavinForConditionalGeneration, MMAConfig


# DeepSpeed compiles for all processes here, one place for each of pytest's processes (`no_stale_lock`).
EXTENSIONS = Path(sys.prefix, "torch_extensions", os.environ.get("PYTEST_XDIST_WORKER", "main"))
os.environ["TORCH_EXTENSIONS_DIR"] = str(EXTENSIONS)
STANDIN = Path(__file__).parents[2] / "shared" / "tools" / "hub_standin.py"
VOCAB, PAD, BOS, EOS = 64, 0, 1, 2
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
TEXTS = {
    "llama2": (LlamaConfig, {**SHAPE, "num_key_value_heads": 4}, {}),
    "llama3": (LlamaConfig, {**SHAPE, "tie_word_embeddings": True}, {}),
    "mistral": (MistralConfig, {**SHAPE, "sliding_window": None}, {}),
    "qwen2": (Qwen2Config, {**SHAPE, "tie_word_embeddings": True}, {}),
    "qwen3": (Qwen3Config, {**SHAPE, "head_dim": 16}, {}),
    "smollm": (LlamaConfig, {**SHAPE, "hidden_size": 48, "num_attention_heads": 6, "tie_word_embeddings": True}, {}),
    "gpt2": (GPT2Config, GPT2, {}),
    # The image token lies inside a vocabulary that is padded to a round number.
    "llama2_padded": (LlamaConfig, {**SHAPE, "num_key_value_heads": 4}, {"image_token_id": VOCAB - 3}),
    "qwen2_padded": (Qwen2Config, {**SHAPE, "tie_word_embeddings": True}, {"image_token_id": VOCAB - 3}),
}
VISION_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
VISIONS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}


def tiny_config(text: str = "llama2", vision: str = "clip", **overrides) -> LavinConfig:
    """A LaVIN of width 32 with two image tokens per image."""
    text_class, values, extra = TEXTS[text]
    values = {**values, **overrides.pop("text_config", {})}
    arguments = {"projector_hidden_size": 8, "vision_feature_layers": [2, 4], **extra, **overrides}
    return LavinConfig(vision_config=VISIONS[vision](**VISION_SHAPE), text_config=text_class(**values), **arguments)


def fill(model, adapter_name: str = "mma", seed: int = 7):
    """Fills an adapter with seeded noise: as it starts it is the identity, and would show nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter_name}." in name:
                noise = torch.empty(parameter.shape).normal_(generator=generator)
                parameter.add_(noise * (3.0 if "adapter_router" in name else 0.2))
    return model


def tiny_peft(text: str = "llama2", vision: str = "clip", mma: dict | None = None, seed: int = 0, **overrides):
    """A `PeftModel` in eval mode with a filled adapter named `mma`."""
    model = tiny_lavin(text, vision, adapter=False, seed=seed, **overrides)
    return fill(get_peft_model(model, MMAConfig(**(mma or {})), adapter_name="mma")).eval()


def tiny_lavin(text: str = "llama2", vision: str = "clip", adapter: bool = True, mma=None, seed: int = 0, **overrides):
    """A `LavinForConditionalGeneration` in eval mode; its adapter, if any, is filled and trainable."""
    if adapter:
        return tiny_peft(text, vision, mma, seed, **overrides).get_base_model()
    torch.manual_seed(seed)
    model = LavinForConditionalGeneration(tiny_config(text, vision, **overrides)).eval()
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # every answer has the asked length
    return model


def row(config: LavinConfig, images: int = 1, length: int = 6, seed: int = 0) -> torch.Tensor:
    """One row of ids: BOS, then the images, each followed by some text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, VOCAB - 6, (length,), generator=generator)
    pieces = [torch.tensor([BOS])]
    for i in range(images):
        pieces += [torch.full((config.num_image_tokens,), config.image_token_id), text[i : i + 1]]
    return torch.cat([*pieces, text])


def pixels(count: int = 1, seed: int = 0) -> torch.Tensor:
    size = VISION_SHAPE["image_size"]
    return torch.empty(count, 3, size, size).normal_(generator=torch.Generator().manual_seed(100 + seed))


def pad(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """Rows of different length as one batch."""
    length = max(len(ids) for ids in rows)
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(rows):
        where = slice(length - len(ids), None) if side == "left" else slice(0, len(ids))
        input_ids[i, where], attention_mask[i, where] = ids, 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def batch(config: LavinConfig, images=(1,), length: int = 6, side: str = "left", seed: int = 0) -> dict:
    """A batch with so many images in each row; the rows differ in length."""
    rows = [row(config, n, length + i, seed + i) for i, n in enumerate(images)]
    inputs = pad(rows, side)
    if sum(images):
        inputs["pixel_values"] = pixels(sum(images), seed)
    return inputs


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.float() - b.float()).abs().max().item()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_stale_lock():
    """A process killed while it loads an extension leaves a lock, for which every later one would wait for ever."""
    for lock in EXTENSIONS.glob("*/lock"):
        lock.unlink()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny tower and a tiny Llama with its tokenizer, as folders."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["Question: what is this? Response: The answer is B. Image: N/A"] * 9, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "text")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=256, **sizes)
    LlamaForCausalLM(text).save_pretrained(folder / "text")
    sizes.update(hidden_size=16, num_hidden_layers=8)
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **sizes)).save_pretrained(folder / "vision")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The stand-in of the Hub and an environment that reaches it with an empty cache."""
    if not STANDIN.is_file():
        pytest.skip("no stand-in of the Hub beside the checkout")
    root = tmp_path_factory.mktemp("hub")
    command = [sys.executable, STANDIN, "--port", "0", "--root", root, "--log", root / "requests.jsonl"]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    port = server.stdout.readline().strip()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_TOKEN": "hf_x",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    server.kill()


class AtOnce:
    """Says at once what failed: a run that is killed prints no summary."""

    def __init__(self, terminal):
        self.terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.terminal.write_line(f"\nFAILED {report.nodeid}, {report.when}, after {report.duration:.0f} s")
            self.terminal.write_line("\n".join(report.longreprtext.splitlines()[-25:]))


def pytest_sessionstart(session):
    if terminal := session.config.pluginmanager.get_plugin("terminalreporter"):  # not in the processes of xdist
        session.config.pluginmanager.register(AtOnce(terminal))


# The files that take longest go first, so that no process of `--dist loadfile` works alone at the end.
LONGEST = (
    "test_families", "test_engines", "test_data", "test_recipe_runs", "test_train_runs", "test_train_resume",
    "test_harness", "test_layouts", "test_segments", "test_faults_machine", "test_trl", "test_bench",
    "test_tasks_tiny", "test_ablation",
)  # fmt: skip

# Python 3.10 gets no newer than TRL 1.14, which cannot do these (docs/limits.md).
NEEDS_TRL_1_15 = ("test_trl_assistant_only_loss", "test_truncated_image_tokens")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    if Version(version("trl")) >= Version("1.15"):
        return
    for item in items:
        if any(name in item.name for name in NEEDS_TRL_1_15):
            item.add_marker(pytest.mark.skip(reason="needs TRL 1.15, so Python 3.11"))


def pytest_sessionfinish():
    if table := write_table():
        print(f"\n{len(ROWS)} cases of bad input and faults behaved as they should: {table}")
