"""The chat template: conversations, prefixes, masks of the answers, and image tokens that are typed."""

import json
import random

import pytest
from test_processing import (  # noqa: F401  (fixtures)
    ANSWER,
    PROMPT,
    assistant,
    collate,
    example,
    folders,
    picture,
    processor,
    qwen,
    render,
    row_ids,
    user,
)

from lavin.processing_lavin import LavinProcessor


def test_conversations(qwen):
    system = {"role": "system", "content": "Be brief."}
    end = "<|im_end|>"
    cases = [
        ([user(None, PROMPT)], " Image: <image> " + PROMPT),
        ([{"role": "user", "content": PROMPT}], " Image: N/A " + PROMPT),
        ([user(None, None, "Same?")], " Image: <image><image> Same?"),
        ([user("Is", None, "like", None, "?")], " Image: <image><image> Is like ?"),
        ([user(None)], " Image: <image>"),
        ([user(None, "a", "b")], " Image: <image> ab"),
        ([system, user("Why?")], " Be brief.\n Image: N/A Why?"),
        ([user("Why?"), assistant("No.")], f" Image: N/A Why?\nResponse:No.{end}"),
        (
            [user(None, PROMPT), assistant("A."), user("Why?"), assistant("B."), user(None, "And this?")],
            f" Image: <image> {PROMPT}A.{end} Why?\nResponse:B.{end} Image: <image> And this?",
        ),
    ]
    for messages, expected in cases:
        assert render(qwen, *messages) == expected
    qwen.image_order = "interleaved"
    text = render(qwen, user("Is", None, "like", None, "?"))
    qwen.image_order = "first"
    assert text == " Image: Is <image> like <image> ?"


def test_generation_prompt_and_turns_are_prefixes(processor):
    """What the model saw before it answered is what it was trained on; a longer chat begins with the shorter one."""
    chat = [user(None, "Which is it?"), assistant("A cat."), user("Why?"), assistant("No."), user(None, PROMPT)]
    texts = [render(processor, *chat[:n], add_generation_prompt=n % 2 == 1) for n in range(1, 6)]
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False))
    assert texts[0].endswith("Which is it?\nResponse:")
    assert texts[4].endswith(PROMPT) and not texts[4].endswith("Response:\nResponse:")


def test_continue_final_message(processor):
    chat = [user(None, PROMPT), assistant("The <image> answer")]
    text = render(processor, *chat, continue_final_message=True)
    assert text.endswith(PROMPT + "The <image > answer")
    # TRL's own way with a prompt that ends in the assistant's words
    rows = {"images": [picture()], "prompt": chat, "completion": [assistant(" is B.")]}
    labels = collate(processor, rows, completion_only_loss=True)["labels"][0]
    assert processor.decode(labels[labels != -100], skip_special_tokens=True) == " is B."


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_mask_lies_on_the_answers(processor, side):
    picks = [
        [user(picture(), "Is", picture(), "it?"), assistant("Red."), user(picture(), "Why?"), assistant("A cat.")],
        [user("Why?"), assistant("The answer is A.")],
    ]
    kwargs = {"padding": True, "padding_side": side}
    batch = processor.apply_chat_template(
        picks, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, processor_kwargs=kwargs
    )
    eos = processor.tokenizer.eos_token
    for ids, mask, expected in zip(
        batch["input_ids"], batch["assistant_masks"], [f"Red.{eos}A cat.{eos}", f"The answer is A.{eos}"], strict=True
    ):
        assert processor.decode([i for i, m in zip(ids, mask, strict=True) if m]) == expected


def test_trl_assistant_only_loss(processor):
    utils = pytest.importorskip("trl.chat_template_utils")
    assert utils.has_generation_markers(processor.chat_template)
    assert utils.is_chat_template_stop_token_trained(processor)
    rows = [
        {"images": [picture()] * 2, "messages": [user(None, "Is", None, "it?"), assistant("Red."), user("Why?")]},
        {"images": [], "messages": [user("Why?"), assistant("No."), user("Why?"), assistant("A cat.")]},
    ]
    labels = collate(processor, *rows, assistant_only_loss=True)["labels"]
    eos = processor.tokenizer.eos_token
    assert [processor.decode(row[row != -100]) for row in labels] == [f"Red.{eos}", f"No.{eos}A cat.{eos}"]


def test_own_template_and_image_token(folders, tmp_path):
    own = "{% for part in messages[0].content %}{{ part.text if part.type == 'text' else '<|img|>' }}{% endfor %}"
    processor = LavinProcessor.from_vision_text_pretrained(
        folders / "vision", folders / "qwen", image_token="<|img|>", chat_template=own
    )
    text = render(processor, user(None, "a <|img|> <image>"))
    assert text == "<|img|>a <|img| > <image>"  # typed text is text in every template
    processor.save_pretrained(tmp_path)
    loaded = LavinProcessor.from_pretrained(tmp_path)
    assert loaded.image_token == "<|img|>" and loaded.chat_template == loaded.tokenizer.chat_template == own
    default = LavinProcessor.from_vision_text_pretrained(folders / "vision", folders / "qwen", image_token="<|img|>")
    assert render(default, user(None, "a <|img|>")) == " Image: <|img|> a <|img| >"


def test_unknown_roles_and_parts_are_named(qwen):
    with pytest.raises(Exception, match='"user" and "assistant", got "tool"'):
        render(qwen, {"role": "tool", "content": "x"})
    with pytest.raises(Exception, match='got "sound"'):
        render(qwen, {"role": "user", "content": [{"type": "sound"}]})


TYPED = [("What does <image> mean?",), ("<image>", "<image>"), ("<ima", "ge> twice <ima", "ge>"), ("<im<image>age>",)]


@pytest.mark.parametrize("texts", TYPED)
@pytest.mark.parametrize("images", [0, 1])
def test_typed_image_token_stays_text(processor, texts, images):
    chat = [user(*[picture()] * images, *texts), assistant("An <image> tag.")]
    before = json.dumps(chat, default=str)
    ids = row_ids(processor, *chat)
    assert ids.count(processor.image_token_id) == images * processor.num_image_tokens
    text = processor.decode(ids, skip_special_tokens=True)
    assert "<image >" in text or "ge>" in text  # readable
    assert "An <image > tag." in text
    assert json.dumps(chat, default=str) == before
    rows = {"images": [picture()] * images, "prompt": [user(*[None] * images, *texts)], "completion": chat[1:]}
    assert collate(processor, rows)["input_ids"][0].tolist() == ids
    rows = {"images": [picture()] * images, "messages": [user(*[None] * images, *texts), chat[1]]}
    assert collate(processor, rows)["input_ids"][0].tolist() == ids


def test_no_split_of_typed_tokens_makes_an_image(qwen):
    dice = random.Random(0)
    pieces = ["<", "<image>", "<ima", "ge>", "image", ">", " ", "", "a"]
    for _ in range(300):
        texts = ["".join(dice.choices(pieces, k=4)) for _ in range(6)]
        roles = dice.choices(["system", "user", "assistant"], k=3)
        parts = [user(*texts[i : i + 2])["content"] for i in (0, 2, 4)]
        chat = [{"role": role, "content": content} for role, content in zip(roles, parts, strict=True)]
        assert qwen.image_token_id not in row_ids(qwen, *chat), chat


def test_typed_image_token_does_not_shift_images_between_rows(qwen):
    red, blue = picture(color=(255, 0, 0)), picture(color=(0, 0, 255))
    rows = [example("A typed <image>", "x", red), example("Another", "x", blue)]
    batch = collate(qwen, *rows)
    assert (batch["input_ids"] == qwen.image_token_id).sum(1).tolist() == [qwen.num_image_tokens] * 2
    assert batch["pixel_values"][0, 0].mean() > 0 > batch["pixel_values"][1, 0].mean()


def test_typed_image_token_where_only_the_tokenizer_renders(qwen):
    assert "<image >" in qwen.tokenizer.apply_chat_template([user("a <image>")], tokenize=False)
