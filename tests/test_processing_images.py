"""The processor's images and batches: preprocessing, every kind of image, rows with and without, padding."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_processing import ANSWER, PROMPT, collate, example, folders, noise, picture, qwen, tiny_tokenizer  # noqa: F401  (fixtures)
from transformers import (
    CLIPConfig,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lavin.processing_lavin import LavinProcessor


def expected_pixels(image, mean, std):
    pixels = np.asarray(image, dtype=np.float64) / 255
    return torch.tensor((pixels - mean) / std).permute(2, 0, 1).float()


def test_preprocessing_is_the_references(qwen):
    """RGB, squashed to the tower's square with bicubic, ImageNet's mean and deviation."""
    image = noise(30, 50)
    squashed = image.resize((16, 16), Image.Resampling.BICUBIC)
    expected = expected_pixels(squashed, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = qwen(text="<image>", images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], expected, atol=1e-5, rtol=0)


def test_clip_preprocessing_is_stored(folders, tmp_path):
    processor = LavinProcessor.from_vision_text_pretrained(folders / "vision", folders / "qwen", preprocessing="clip")
    processor.save_pretrained(tmp_path)
    image = noise(32, 16)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = expected_pixels(image.crop((8, 0, 24, 16)), mean, std)
    for candidate in (processor, LavinProcessor.from_pretrained(tmp_path)):
        pixels = candidate(text="<image>", images=image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(9, 7), (1, 1), (40, 3), (3, 40)])
def test_every_kind_of_image(qwen, mode, size):
    pixels = qwen(text="<image>", images=[Image.new(mode, size)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16) and pixels.isfinite().all()


def test_vision_checkpoints(folders, tmp_path):
    CLIPConfig(vision_config={"num_hidden_layers": 12, "image_size": 32}).save_pretrained(tmp_path / "clip")
    SiglipVisionConfig(num_hidden_layers=8, image_size=48).save_pretrained(tmp_path / "siglip")
    for name, size, tokens in [("clip", 32, 3), ("siglip", 48, 2)]:
        processor = LavinProcessor.from_vision_text_pretrained(tmp_path / name, folders / "qwen")
        batch = processor(text="<image>", images=picture(), return_tensors="pt")
        assert batch["pixel_values"].shape[-2:] == (size, size) and batch["input_ids"].shape == (1, tokens)
    given = LavinProcessor.from_vision_text_pretrained(tmp_path / "clip", folders / "qwen", num_image_tokens=5)
    assert given.num_image_tokens == 5


def test_pil_where_torchvision_would_be_taken(qwen):
    """On a machine with torchvision the Auto classes load that backend, which resizes otherwise."""
    other = type("CLIPImageProcessor", (CLIPImageProcessorPil,), {})(size={"height": 16, "width": 16})
    assert type(LavinProcessor(other, qwen.tokenizer, 2).image_processor) is CLIPImageProcessorPil
    assert LavinProcessor(other, qwen.tokenizer, 2).image_processor.size == {"height": 16, "width": 16}


def test_rows_with_and_without_images(qwen):
    texts = ["<image><image> a", "b", "<image> c"]
    image = picture()
    for images in ([[image, image], [], [image]], [[image, image], None, image], [image] * 3):
        if images == [image] * 3:
            texts = ["<image> a", "<image> b", "<image> c"]
        batch = qwen(text=texts, images=images, padding=True, return_tensors="pt")
        assert len(batch["pixel_values"]) == 3
    assert "pixel_values" not in qwen(text=["a", "b"], images=[[], []])
    assert len(qwen(text=["<image> a", "b"], images=[image])["pixel_values"]) == 1


def test_left_padding_by_default(qwen, folders, tmp_path):
    def padding(processor, **kwargs):
        return processor(text=["a b c d", "a"], padding=True, return_tensors="pt", **kwargs)["attention_mask"][1]

    qwen.save_pretrained(tmp_path)
    right = tiny_tokenizer("qwen")
    right.add_special_tokens({"extra_special_tokens": ["<image>"]})
    for processor in (qwen, LavinProcessor.from_pretrained(tmp_path), LavinProcessor(qwen.image_processor, right, 2)):
        assert padding(processor)[0] == 0 and padding(processor)[-1] == 1
        assert padding(processor, padding_side="right")[0] == 1


def test_pad_token_is_no_label(folders):
    expected = {"qwen": "<|endoftext|>", "llama3": "<|reserved_special_token_0|>", "sentencepiece": "<unk>"}
    for family, pad in expected.items():
        tokenizer = LavinProcessor.from_vision_text_pretrained(folders / "vision", folders / family).tokenizer
        assert tokenizer.pad_token == pad and tokenizer.pad_token_id < len(tokenizer) - 1
    gpt2 = LavinProcessor.from_vision_text_pretrained(folders / "vision", folders / "gpt2")
    assert gpt2.tokenizer.pad_token == gpt2.tokenizer.eos_token  # it has no other
    rows = [example(PROMPT, ANSWER), example(PROMPT, ANSWER * 3)]
    labels = collate(gpt2, *rows, completion_only_loss=True)["labels"]
    assert (labels == gpt2.tokenizer.eos_token_id).sum(1).tolist() == [1, 1]
