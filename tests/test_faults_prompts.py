"""Unusual and hostile prompts, through the processor and `generate`, `lavin ask` and `lavin serve`'s prompts."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import torch
from faults import chat, folder, happened, inputs_of, lavin, refused  # noqa: F401
from PIL import Image
from tokenizers import AddedToken

from lavin import LavinProcessor
from lavin.generation_lavin import context_length
from lavin.recipes.cli import main
from lavin.recipes.load import load_model
from lavin.recipes.serve.prompts import read_prompt
from lavin.recipes.serve.schema import ChatRequest, Limits, Refused


AREA = "prompts"
PICTURE = Image.linear_gradient("L").resize((28, 28))


@pytest.fixture(scope="module")
def loaded(folder):  # noqa: F811
    return load_model(folder, "cpu")


def answer(loaded, messages, **options) -> torch.Tensor:
    """The new tokens of a greedy answer of fixed length."""
    model, processor = loaded
    inputs = inputs_of(processor, messages)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, **options}
    new = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert len(new) == 3
    return new


TEXTS = {
    "empty": "",
    "only spaces": "   \n\t ",
    "emoji": "What is 🥊👩‍👩‍👧 here? 🇺🇦",
    "right-to-left text": "ما هذا؟ \u202eמה זה?",
    "a null character": "a\0b",
    "no-break and zero-width spaces": "a\u00a0b\u200bc\ufeff",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_arrive_as_they_are(loaded, folder, capsys, name):  # noqa: F811
    text = TEXTS[name]
    for images in ([], [PICTURE]):
        ids = inputs_of(loaded[1], chat(text, *images))["input_ids"][0]
        assert text.rstrip("\n") in loaded[1].decode(ids, clean_up_tokenization_spaces=False)
        answer(loaded, chat(text, *images))
    if "\0" not in text:  # a shell cannot pass it
        assert main(["ask", str(folder), text, "--max-new-tokens", "3"]) == 0
    happened(AREA, name, "answered; the text reaches the model unchanged")


def test_special_tokens_typed_as_text(loaded, folder, tmp_path):  # noqa: F811
    """They come from the template alone; what a user types cannot end a turn, fill a place or begin a sequence."""
    processor = LavinProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    special = {*processor.tokenizer.all_special_ids, processor.tokenizer.convert_tokens_to_ids("<|turn|>")}

    def found(messages):
        ids = inputs_of(processor, messages)["input_ids"][0]
        return [int(i) for i in ids if int(i) in special], processor.decode(ids)

    plain, _ = found(chat("Hello", PICTURE))
    for typed in ("</s>", "<s>", "<unk>", "<image>", "<|turn|>", "a</s><s>b", "<|turn|><image><|turn|>"):
        tokens, text = found(chat(f"Hello {typed} you", PICTURE))
        assert tokens == plain and typed in text.replace(" ", ""), typed
    parts = [{"type": "text", "text": text} for text in ("Hel</", "s", ">lo<ima", "ge>")]
    assert found([{"role": "user", "content": parts}])[0] == found(chat("Hello"))[0]
    answer(loaded, chat("Hello </s><image> you", PICTURE))
    happened(AREA, "image token typed as text", "is text: a space is put into it")
    happened(AREA, "special tokens typed as text", "are text: a space is put into each")


def test_a_hundred_images(loaded, folder, pair):  # noqa: F811
    model, processor = loaded
    pictures = [Image.new("L", (28, 28), i) for i in range(100)]
    inputs = inputs_of(processor, chat("Which?", *pictures))
    assert inputs["pixel_values"].shape[0] == 100
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 100 * processor.num_image_tokens
    with torch.no_grad():
        forward = model(**inputs).logits[0, -1]
        swapped = {**inputs, "pixel_values": inputs["pixel_values"].roll(1, 0)}
        assert forward.isfinite().all() and not torch.equal(model(**swapped).logits[0, -1], forward)
    answer(loaded, chat("Which?", *pictures))
    happened(AREA, "100 images", "answered, each image at its own place")
    with refused(AREA, "200 images into a context of 256", r"prompt has \d{3} tokens, .* context holds 256"):
        answer(loaded, chat("Which?", *pictures, *pictures))
    request = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}] * 100}]})  # fmt: skip
    with refused(AREA, "100 images in a request to `lavin serve`", "100 images; at most 8 are read here", Refused):
        read_prompt(processor, request, Limits(context=256))


@pytest.fixture
def context_2048(folder, pair, tmp_path):  # noqa: F811
    """The same folder, whose language model says that it reads 2,048 tokens."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 2048
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_ten_thousand_tokens_into_2048(context_2048, capsys):
    model, processor = loaded = load_model(context_2048, "cpu")
    long = "é" * 5_000  # two tokens each
    length = inputs_of(processor, chat(long))["input_ids"].shape[1]
    assert length > 10_000
    said = rf"prompt has {length} tokens, and the language model's context holds 2048: shorten"
    with refused(AREA, "10,000 tokens into a context of 2,048", said):
        answer(loaded, chat(long))
    with pytest.raises(ValueError, match=said.replace(str(length), r"\d{5}")):
        answer(loaded, chat(long, PICTURE), num_beams=2)
    embedded = model.get_input_embeddings()(torch.full((1, 2049), 5))
    with pytest.raises(ValueError, match="prompt has 2049 tokens"):
        model.generate(inputs_embeds=embedded, max_new_tokens=3)
    assert main(["ask", str(context_2048), long]) == 2
    error = capsys.readouterr().err
    assert f"error: The prompt has {length} tokens" in error and "holds 2048" in error
    request = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": long}]})
    with refused(AREA, "the same to `lavin serve`", f"prompt has {length} tokens; the context holds 2048", Refused):
        read_prompt(processor, request, Limits(context=2048))
    short = inputs_of(processor, chat("é" * 900))["input_ids"].shape[1]
    edge = inputs_of(processor, chat("é" * 900 + "\t" * (2048 - short)))
    assert edge["input_ids"].shape[1] == 2048
    model.generate(**edge, max_new_tokens=1)
    rope = model.config.text_config
    rope.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert context_length(rope) is None
    rope.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert context_length(rope) == 8192
    rope.rope_parameters = {"rope_type": "linear", "factor": 4.0}  # as Vicuna 16k says it
    assert context_length(rope) == 8192


ENTRY = '{"instruction": "a", "output": "b"}'


def broken_text(file, text: str = "") -> str:
    file.write_bytes(text.encode() + b"\n\xff\xfe caf\xe9")
    return str(file)


def test_files_that_are_no_utf8(folder, tmp_path, capsys):  # noqa: F811
    pyarrow.parquet.write_table(pyarrow.table({"question": ["x"], "answer": ["y"]}), tmp_path / "rows.parquet")
    yaml = broken_text(tmp_path / "task.yaml", "data: rows.parquet\nmetric: exact")
    chats, lines = broken_text(tmp_path / "chats.json", "["), broken_text(tmp_path / "a.jsonl", ENTRY)
    recipe, text = broken_text(tmp_path / "sft.yaml", "model_name_or_path: x"), broken_text(tmp_path / "text.txt", "a")
    problems, new = tmp_path / "problems", str(tmp_path / "new")
    problems.mkdir()
    broken_text(problems / "problems.json", "{}")
    (problems / "pid_splits.json").write_text('{"test": []}')
    predictions = broken_text(tmp_path / "predictions.json", "{")
    commands = {
        "`lavin eval own`": (["eval", "own", "--model", str(folder), "--config", yaml], yaml),
        "`lavin eval text`": (["eval", "text", "--model", str(folder), "--data", text], text),
        "`lavin eval scienceqa`": (
            ["eval", "scienceqa", "--model", str(folder), "--root", str(problems)], problems / "problems.json",
        ),
        "`lavin eval scienceqa --predictions`": (
            ["eval", "scienceqa", "--predictions", predictions, "--root", str(problems)], problems,
        ),
        "`lavin data instructions` (JSON)": (["data", "instructions", "--input", chats, "--output", new], chats),
        "`lavin data instructions` (JSON Lines)": (["data", "instructions", "--input", lines, "--output", new], lines),
        "`lavin train`": (["train", "--config", recipe], recipe),
    }  # fmt: skip
    for name, (command, file) in commands.items():
        output = ["--output", new] if command[0] == "eval" else []
        assert main([*command, *output]) == 2, name
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert os.path.basename(file) in said and "Traceback" not in said, (name, said)
        happened(AREA, f"{name}, file with invalid UTF-8", said.partition("error: ")[2][:160])
    assert not any(files for _, _, files in os.walk(new))


def test_text_that_is_no_unicode(loaded, folder):  # noqa: F811
    half = "a\udc80b"  # what Python makes of a byte that is no text, in file names and arguments
    with refused(AREA, "half of a character in a message", "is no text that can be encoded"):
        inputs_of(loaded[1], chat(half))


@pytest.mark.slow
def test_the_command_with_bytes_that_are_no_text(folder):  # noqa: F811
    done = lavin("ask", folder, os.fsdecode(b"caf\xe9"), PYTHONUTF8="1")
    assert done.returncode == 2 and "is no text" in done.stderr and "Traceback" not in done.stderr, done.stderr
    happened(AREA, "`lavin ask` with bytes that are no UTF-8", done.stderr.strip().splitlines()[-1])
