"""The processor: LaVIN's ids by every path TRL takes, images, saving, and each clear error."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from lavin import LavinForConditionalGeneration
from lavin.processing_lavin import DEFAULT_CHAT_TEMPLATE, LavinProcessor


ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests/fixtures/llama_tokenisation.json"
LLAMA = ROOT.parent / "shared/llama_tokenizer"  # its own licence: not in the repository
ROWS = json.loads(FIXTURE.read_text(encoding="utf-8"))

CORPUS = [
    "Image: N/A Question: What is this? The answer is B. BECAUSE: it is red.\nResponse:The answer is A.",
    "Which of these is a cat? Options: (A) dog (B) cat Context: N/A Be brief. Why? No. < image>",
]
FAMILIES = ["qwen", "gpt2", "llama3", "sentencepiece", "sentencepiece_legacy"]
PROMPT, ANSWER = "Question: Which is a cat?\nResponse:", "The answer is B."


def picture(size=(20, 12), color=(200, 30, 60)):
    return Image.new("RGB", size, color)


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Trained on two sentences; the word-start handling is that of the family."""
    spm = family.startswith("sentencepiece")
    special = {
        "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "gpt2": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    }.get(family, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True) if spm else models.BPE())
    names = list(dict.fromkeys(special.values())) + ["<|reserved_special_token_0|>"] * (family == "llama3")
    alphabet = [] if spm else pre_tokenizers.ByteLevel.alphabet()
    if family == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif family == "sentencepiece_legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    if spm:
        names += [f"<0x{byte:02X}>" for byte in range(256)]
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    # SentencePiece learns no piece that joins a letter to a colon
    corpus = [word for line in CORPUS for word in re.findall(r"\w+|[^\w\s]", line)] if spm else CORPUS
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(names), special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if spm:  # the bytes are ordinary pieces, not special tokens
        spec = json.loads(tokenizer.to_str())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    if "bos_token" in special and family != "gpt2":  # GPT-2 has a BOS and does not add it
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    CLIPVisionConfig(num_hidden_layers=8, image_size=16, patch_size=8).save_pretrained(root / "vision")
    CLIPVisionConfig(num_hidden_layers=24, image_size=16, patch_size=8).save_pretrained(root / "vision24")
    for family in FAMILIES:
        tiny_tokenizer(family).save_pretrained(root / family)
    return root


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request, folders):
    return LavinProcessor.from_vision_text_pretrained(folders / "vision", folders / request.param)


@pytest.fixture(scope="module")
def qwen(folders):
    return LavinProcessor.from_vision_text_pretrained(folders / "vision", folders / "qwen")


@pytest.fixture(scope="module")
def llama(folders, tmp_path_factory):
    if not (LLAMA / "tokenizer.model").is_file():
        pytest.skip("LLaMA's tokenizer.model is not here")
    text = tmp_path_factory.mktemp("llama")
    (text / "tokenizer.model").write_bytes((LLAMA / "tokenizer.model").read_bytes())
    (text / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return LavinProcessor.from_vision_text_pretrained(folders / "vision24", text)


def user(*parts):
    """A user message; each part is a text or an image (`None`: a place for one)."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str)
        else {"type": "image"} | ({} if part is None else {"image": part})
        for part in parts
    ]  # fmt: skip
    return {"role": "user", "content": content}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def render(processor, *messages, **kwargs):
    return processor.apply_chat_template(list(messages), **kwargs)


def row_ids(processor, *messages, **kwargs):
    return processor.apply_chat_template(list(messages), tokenize=True, return_dict=True, **kwargs)["input_ids"][0]


def collate(processor, *examples, **kwargs):
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    return sft.DataCollatorForVisionLanguageModeling(processor=processor, **kwargs)(list(examples))


def example(prompt, answer, *images):
    """A prompt-completion row as a data set holds it."""
    places = [None] * len(images)
    return {"images": list(images), "prompt": [user(*places, prompt)], "completion": [assistant(answer)]}


def run_fresh(code: str, *args, cwd):
    """Runs code in a process that can import neither `lavin` nor torchvision."""
    block = "import sys; sys.modules['lavin'] = sys.modules['torchvision'] = None\n"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", block + code, *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- LaVIN's own ids: the 17 rows of the reference


def fixture_ids(row, processor):
    return [processor.image_token_id if i == -200 else i for i in row["input_ids"]]


def test_fixture_as_one_string(llama):
    assert len(ROWS) == 17 and (llama.num_image_tokens, llama.image_token_id) == (6, 32000)
    for row in ROWS:
        images = [picture()] if row["has_image"] else []
        assert row_ids(llama, user(*images, row["prompt"]), assistant(row["answer"])) == fixture_ids(row, llama)


def check_fixture_through_trl(processor):
    examples = [example(row["prompt"], row["answer"], *[picture()] * row["has_image"]) for row in ROWS]
    batch = collate(processor, *examples, completion_only_loss=True)
    assert len(batch["pixel_values"]) == sum(row["has_image"] for row in ROWS)
    for row, ids, labels in zip(ROWS, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        expected, first = fixture_ids(row, processor), row["first_label_index"]
        assert ids[: len(expected)] == expected
        assert labels[:first] == [-100] * first
        assert labels[first : len(expected)] == expected[first:]
        assert set(labels[len(expected) :]) <= {-100}


def test_fixture_as_trl_tokenises_it(llama):
    check_fixture_through_trl(llama)


def test_fixture_survives_save_and_load(llama, tmp_path):
    """Saved, loaded where `lavin` cannot be imported, saved from there, loaded again: the same ids."""
    rows = [{"prompt": row["prompt"], "answer": row["answer"], "has_image": row["has_image"]} for row in ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    llama.save_pretrained(tmp_path / "first")
    code = """
import json
from PIL import Image
from transformers import AutoProcessor
for source, target in [("first", "second"), ("second", "third")]:
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    ids = []
    for row in json.load(open("rows.json")):
        content = [{"type": "image", "image": Image.new("RGB", (9, 9))}] * row["has_image"]
        content.append({"type": "text", "text": row["prompt"]})
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": row["answer"]}]
        ids += processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    print(json.dumps(ids))
    processor.save_pretrained(target)
"""
    lines = run_fresh(code, cwd=tmp_path).splitlines()
    assert [json.loads(line) for line in lines] == [[fixture_ids(row, llama) for row in ROWS]] * 2
    check_fixture_through_trl(LavinProcessor.from_pretrained(tmp_path / "third"))


# ---- every family: one string and apart are the same


@pytest.mark.parametrize("images", [0, 1, 2])
def test_one_string_equals_prompt_and_completion_apart(processor, images):
    images = [picture()] * images
    whole = row_ids(processor, user(*images, PROMPT), assistant(ANSWER))
    batch = collate(processor, example(PROMPT, ANSWER, *images), completion_only_loss=True)
    assert batch["input_ids"][0].tolist() == whole
    answer = processor.tokenizer(ANSWER, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id]
    assert [label for label in batch["labels"][0].tolist() if label != -100] == answer == whole[-len(answer) :]
    assert whole.count(processor.image_token_id) == len(images) * processor.num_image_tokens


def test_a_prompt_that_ends_in_a_word_does_not_grow_together_with_the_answer(processor):
    whole = row_ids(processor, user("Which is"), assistant("a cat"))
    assert collate(processor, example("Which is", "a cat"))["input_ids"][0].tolist() == whole
    assert processor.decode(whole, skip_special_tokens=True) == " Image: N/A Which is\nResponse:a cat"


def test_text_only_data_set_gets_the_same_ids(processor):
    data_utils = pytest.importorskip("trl.data_utils")
    ids = data_utils._tokenize(processor, [user(PROMPT), assistant(ANSWER)])["input_ids"]
    assert ids == row_ids(processor, user(PROMPT), assistant(ANSWER))


def test_bos_once_or_not_at_all(processor):
    tokenizer = processor.tokenizer
    ids = row_ids(processor, user(PROMPT), add_generation_prompt=True)
    assert ids[:1] == [tokenizer.bos_token_id] or tokenizer.bos_token is None
    text = render(processor, user(PROMPT), add_generation_prompt=True)
    for kwargs in ({}, {"add_special_tokens": False}, {"text_kwargs": {"add_special_tokens": False}}):
        assert processor(text=text, **kwargs)["input_ids"][0] == ids


def test_words_are_those_of_the_base_tokenizer(folders):
    for family in FAMILIES:
        base = tiny_tokenizer(family)
        ours = LavinProcessor.from_vision_text_pretrained(folders / "vision", folders / family).tokenizer
        space = " " * family.startswith("sentencepiece")  # what the base puts before every text, we write
        assert ours(space + PROMPT)["input_ids"] == base(PROMPT)["input_ids"]
        assert ours.convert_tokens_to_ids("<image>") == len(base)
        text = "The answer\n é is"
        assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == text


# Runs of spaces, tabs, line breaks, emoji and CJK between words: where the order of merges shows.
UNITS = [
    "The",
    "a",
    "answer",
    "BECAUSE",
    ":",
    ".",
    "'s",
    " ",
    "  ",
    "     ",
    "\t",
    "\n",
    "\n\n",
    "👍🏽",
    "中文",
    "é",
    "▁",
    "<0x0A",
]
RUNS = [f"BECAUSE:{' ' * n}The{end}" for n in range(1, 40) for end in ("", " " * n, "\n" + " " * n + "x")]


def spaced_texts() -> list[str]:
    chosen = random.Random(0)
    return RUNS + ["".join(chosen.choices(UNITS, k=chosen.randint(1, 14))) for _ in range(500)]


def check_against_sentencepiece(tokenizer, file):
    pieces = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(file))
    texts = spaced_texts()
    found = tokenizer([" " + text for text in texts], add_special_tokens=False).input_ids
    assert found == pieces.encode(texts)


def test_llama_tokens_are_those_of_sentencepiece(llama):
    check_against_sentencepiece(llama.tokenizer, LLAMA / "tokenizer.model")


@pytest.fixture
def lone_model(tmp_path):
    """A language model's folder with a `tokenizer.model` only, in which runs of spaces have LLaMA's scores."""
    spm = pytest.importorskip("sentencepiece")
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    lines = [line for file in sorted(ROOT.glob("recipes/*.py")) for line in file.read_text("utf-8").splitlines()]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=900, minloglevel=2,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    model = model_pb2.ModelProto()
    model.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    runs = [piece for piece in model.pieces if set(piece.piece) == {"▁"}]
    assert len(runs) > 3
    for piece in runs:
        piece.score = -1e9
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return tmp_path


def test_lone_sentencepiece_model_with_runs_of_spaces_last(folders, lone_model, caplog):
    """transformers puts the merge of two spaces first; alone, or in the `tokenizer.json` that it writes beside it."""
    base = AutoTokenizer.from_pretrained(lone_model)
    ours = LavinProcessor.from_vision_text_pretrained(folders / "vision", lone_model).tokenizer
    check_against_sentencepiece(ours, lone_model / "tokenizer.model")
    base.save_pretrained(lone_model)
    assert (lone_model / "tokenizer.json").is_file()
    again = LavinProcessor.from_vision_text_pretrained(folders / "vision", lone_model).tokenizer
    check_against_sentencepiece(again, lone_model / "tokenizer.model")
    assert "differ from SentencePiece's" not in caplog.text
    ours.save_pretrained(lone_model / "ours")
    check_against_sentencepiece(AutoTokenizer.from_pretrained(lone_model / "ours"), lone_model / "tokenizer.model")


def test_sentencepiece_model_that_cannot_be_followed_is_named(folders, lone_model, caplog):
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    model = model_pb2.ModelProto()
    model.ParseFromString((lone_model / "tokenizer.model").read_bytes())
    model.normalizer_spec.remove_extra_whitespaces = True  # which transformers leaves out
    (lone_model / "tokenizer.model").write_bytes(model.SerializeToString())
    with caplog.at_level("WARNING"):
        LavinProcessor.from_vision_text_pretrained(folders / "vision", lone_model)
    assert "differ from SentencePiece's own" in caplog.text and "tokenizer.json" in caplog.text


# ---- images


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- saving


def test_saved_folders_load_without_lavin(folders, tmp_path):
    """Save, load where `lavin` cannot be imported, save from there, load again, for every family in one process."""
    texts = {}
    for family in FAMILIES:
        processor = LavinProcessor.from_vision_text_pretrained(folders / "vision", folders / family)
        processor.save_pretrained(tmp_path / "first" / family)
        texts[family] = [render(processor, user(None, "Why?"), add_generation_prompt=True), "CLIPImageProcessorPil"]
    config = json.loads((tmp_path / "first" / "qwen" / "processor_config.json").read_text())
    assert config["auto_map"] == {"AutoProcessor": "processing_lavin.LavinProcessor"}
    assert config["num_image_tokens"] == 2 and config["image_token"] == "<image>"
    code = """
import json
from transformers import AutoProcessor
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
for source, target in [("first", "second"), ("second", "third")]:
    texts = {}
    for family in sys.argv[1:]:
        processor = AutoProcessor.from_pretrained(f"{source}/{family}", trust_remote_code=True)
        assert type(processor).__module__.startswith("transformers_modules."), type(processor)
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        texts[family] = [text, type(processor.image_processor).__name__]
        processor.save_pretrained(f"{target}/{family}")
    print(json.dumps(texts))
"""
    assert run_fresh(code, *FAMILIES, cwd=tmp_path).splitlines() == [json.dumps(texts)] * 2
    for family in FAMILIES:
        first, third = tmp_path / "first" / family, tmp_path / "third" / family
        for file in [*first.iterdir(), *third.iterdir()]:
            assert str(folders) not in file.read_text() and str(tmp_path) not in file.read_text()
        for name in ("processing_lavin.py", "images_lavin.py", "tokenizer.json", "chat_template.jinja"):
            assert (first / name).read_bytes() == (third / name).read_bytes()
        chat = [user(picture(), PROMPT), assistant(ANSWER)]
        processor, loaded = LavinProcessor.from_pretrained(first), LavinProcessor.from_pretrained(third)
        assert row_ids(loaded, *chat) == row_ids(processor, *chat)


def test_a_subclass_makes_its_own(folders):
    class Own(LavinProcessor):
        pass

    assert type(Own.from_vision_text_pretrained(folders / "vision", folders / "qwen")) is Own


def test_making_one_takes_the_package(folders, monkeypatch):
    """What only makes new ones does not travel with a folder."""
    monkeypatch.setitem(sys.modules, "lavin.pair", None)
    for made in (LavinProcessor, LavinForConditionalGeneration):
        with pytest.raises(ImportError, match="To make a new LaVIN of two checkpoints, install `lavin`"):
            made.from_vision_text_pretrained(folders / "vision", folders / "qwen")


def test_no_call_of_its_own():
    assert "__call__" not in vars(LavinProcessor) and "replace_image_token" in vars(LavinProcessor)


# ---- clear errors


@pytest.mark.parametrize(
    "text, images, message",
    [
        (["<image> a", "<image><image> b"], [2, 1], "Row 0 has 1 image slots.*2 images.*one list of images per row"),
        (["<image> a", "b"], [1, 1], "Row 1 has 0 image slots"),
        (["<image><image> a", "b"], "flat2", "Row 0 has 2 image slots .* but 1 images"),
        (["<image> a", "<image> b", "c"], "flat1", "3 texts with .1, 1, 0. image slots"),
        (["<image> a"], [1, 1], "1 texts with .1. image slots, but images for .1, 1."),
        ("<image> a", None, "Row 0 has 1 image slots .* but 0 images"),
        ("a", [1], "Row 0 has 0 image slots .* but 1 images"),
    ],
)
def test_numbers_of_images_and_slots_per_row(qwen, text, images, message):
    if isinstance(images, str):
        images = [picture()] * int(images[-1])
    elif images is not None:
        images = [[picture()] * count for count in images]
    with pytest.raises(ValueError, match=message):
        qwen(text=text, images=images)


def test_chat_with_a_place_but_no_image(qwen):
    with pytest.raises(ValueError, match="Row 0 has 1 image slots .* but 0 images"):
        row_ids(qwen, user(None, "Why?"))


def test_undecodable_image(qwen, tmp_path):
    broken, cut = tmp_path / "broken.png", tmp_path / "cut.png"
    broken.write_bytes(b"no image")
    noise(64, 64).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    for image, cause in [(str(broken), "broken.png"), ("missing.png", "missing.png"), (str(cut), "cut.png"), (7, "")]:
        with pytest.raises(ValueError, match=f"Cannot read image 1 of row 1.*{cause}.*Pass a PIL image"):
            qwen(text=["a", "<image><image>"], images=[[], [picture(), image]])
    with pytest.raises(ValueError, match="Cannot read image 0"):  # PIL reads the file only now
        collate(qwen, example("Why?", "No.", Image.open(cut)))
    with pytest.raises(ValueError, match="Cannot read image 0 of row 0.*broken.png"):
        row_ids(qwen, {"role": "user", "content": [{"type": "image", "path": str(broken)}]})


def test_truncated_image_tokens(qwen):
    rows = {"images": [picture()] * 3, "messages": [user(None, "Is", None, None, "it?"), assistant("No.")]}
    assert collate(qwen, dict(rows), max_length=100)["input_ids"].shape[1] < 100
    for kwargs in ({}, {"assistant_only_loss": True}):
        with pytest.raises(ValueError, match="^Image features and image tokens do not match.*in row 0.*max_length"):
            collate(qwen, dict(rows), max_length=6, **kwargs)


def test_missing_template(qwen, tmp_path):
    qwen.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match="no chat template.*chat_template.jinja.*DEFAULT_CHAT_TEMPLATE"):
        render(processor, user("Why?"))
    with pytest.raises(ValueError, match="no chat template"):
        collate(processor, example("Why?", "No."))
    assert render(processor, user("Why?"), chat_template=DEFAULT_CHAT_TEMPLATE) == " Image: N/A Why?"


def test_other_bad_input(qwen, folders, tmp_path):
    build = LavinProcessor.from_vision_text_pretrained
    with pytest.raises(ValueError, match='must be "lavin" or "clip", got "?.?siglip'):
        build(folders / "vision", folders / "qwen", preprocessing="siglip")
    with pytest.raises(ValueError, match="`num_image_tokens` must be at least 1, got 0"):
        build(folders / "vision", folders / "qwen", num_image_tokens=0)
    with pytest.raises(ValueError, match="holds '<image>' as an added token.*from_vision_text_pretrained"):
        LavinProcessor(qwen.image_processor, tiny_tokenizer("qwen"), 2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="no vision tower.*llama.*image_size"):
        build(tmp_path, folders / "qwen")
    endless = tiny_tokenizer("qwen")
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no EOS token"):
        build(folders / "vision", tmp_path / "endless")
