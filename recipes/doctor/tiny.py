"""A tiny LaVIN with an adapter, taken through what users do with a large one."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import lavin.recipes.quickstart
from lavin.recipes.doctor.report import OK, SKIP, Line
from lavin.recipes.init import init_folder


TOWERS = Path(lavin.recipes.quickstart.__file__).parent / "tiny"  # the quickstart's: 0.9M and 1.7M values
NEW_TOKENS = 8


@dataclass
class Tiny:
    """
    Args:
        folder (`Path`): A light folder, as `lavin init` writes it.
        saved (`Path`): A folder with an adapter, once there is one.
        model ([`LavinPeftModel`]): In float32 on the CPU, its adapter filled with noise.
        processor ([`LavinProcessor`]): Of the same folder.
        inputs (`dict`): One row with one image.
        loss (`float`): On that row in float32, once it is known.
    """

    folder: Path | None = None
    saved: Path | None = None
    model: Any = None
    processor: Any = None
    inputs: dict | None = None
    loss: float | None = None


def build(tiny: Tiny, stack: contextlib.ExitStack) -> Iterator[Line]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lavin-doctor-")))
    init_folder(TOWERS / "vision", TOWERS / "text", folder / "light")
    model = AutoModel.from_pretrained(folder / "light", mma={}, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder / "light")
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():  # as it starts an adapter is the identity, and would show nothing
        for parameter in trained:
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.05, generator=generator))
    tiny.folder, tiny.model, tiny.processor = folder / "light", model, processor
    tiny.inputs = _inputs(processor, "red")
    count = sum(parameter.numel() for parameter in trained)
    yield Line(OK, "tiny model", f"`lavin init`, then loaded with an adapter of {count:,} values")


def _inputs(processor, colour: str) -> dict:
    content = [{"type": "image", "image": Image.new("RGB", (64, 64), colour)}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "It is a circle."}]
    inputs = processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    return dict(inputs)


def forward(tiny: Tiny) -> Iterator[Line]:
    if tiny.model is None:
        yield no_tiny("forward")
        return
    with torch.no_grad():
        red = tiny.model(**tiny.inputs)
        blue = tiny.model(**_inputs(tiny.processor, "blue"))
    if not red.logits.isfinite().all():
        raise FloatingPointError("logits hold NaN or infinity")
    if torch.equal(red.logits, blue.logits):
        raise ValueError("another image gives the same logits")
    tiny.loss = red.loss.item()
    yield Line(OK, "forward", f"loss {tiny.loss:.3f}; another image, other logits")


def backward(tiny: Tiny) -> Iterator[Line]:
    if tiny.model is None:
        yield no_tiny("backward")
        return
    backpropagate(tiny.model.train(), tiny.inputs)
    count = sum(p.grad is not None for p in tiny.model.parameters())
    tiny.model.zero_grad()
    tiny.model.eval()
    yield Line(OK, "backward", f"finite gradients in all {count} tensors of the adapter")


def backpropagate(model, inputs: dict) -> float:
    """
    One backward pass.

    Returns:
        `float`: the loss.

    Raises:
        `FloatingPointError`: if the gradient of something that is trained is missing, zero, NaN or infinite.
    """
    loss = model(**inputs).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if parameter.requires_grad and (grad is None or not grad.isfinite().all() or not grad.any()):
            raise FloatingPointError(f"the gradient of {name} is missing, zero, NaN or infinite")
    return loss.item()


def generate(tiny: Tiny) -> Iterator[Line]:
    if tiny.model is None:
        yield no_tiny("generate")
        return
    prompt = {key: value for key, value in tiny.inputs.items() if key != "labels"}
    length = prompt["input_ids"].shape[1]
    limits = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    cached, plain = (tiny.model.generate(**prompt, **limits, use_cache=cache) for cache in (True, False))
    if cached.shape[1] != length + NEW_TOKENS or not torch.equal(cached, plain):
        raise ValueError("with and without a cache the tokens differ")
    yield Line(OK, "generate", f"{NEW_TOKENS} tokens after an image, the same with and without a cache")


def save_and_load(tiny: Tiny) -> Iterator[Line]:
    if tiny.model is None:
        yield no_tiny("save and load")
        return
    folder = tiny.folder.with_name("saved")
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if (tokens := AutoProcessor.from_pretrained(folder).num_image_tokens) != tiny.processor.num_image_tokens:
        raise ValueError(f"the loaded processor has {tokens} image tokens")
    with torch.no_grad():
        same = torch.equal(again(**tiny.inputs).logits, tiny.model(**tiny.inputs).logits)
    if not same:
        raise ValueError("the loaded model gives other logits")
    tiny.saved = folder
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    yield Line(OK, "save and load", f"{size / 2**20:.1f} MB, the same logits to the bit")


def reload(tiny: Tiny, device: str | torch.device, **arguments):
    """The saved model, otherwise than in float32 on the CPU, and the inputs there."""
    model = AutoModel.from_pretrained(tiny.saved, **arguments)
    if "quantization_config" not in arguments:
        model = model.to(device)
    return model.eval(), {key: value.to(model.device) for key, value in tiny.inputs.items()}


def compare_loss(tiny: Tiny, loss: float, allowed: float) -> str:
    """
    A loss beside that in float32, as text.

    Raises:
        `FloatingPointError`: if it is off by more than the share `allowed`, NaN included.
    """
    text = f"loss {loss:.3f}, in float32 {tiny.loss:.3f}"
    if not abs(loss - tiny.loss) <= allowed * tiny.loss:
        raise FloatingPointError(f"{text}: too far apart")
    return text


def no_tiny(name: str) -> Line:
    return Line(SKIP, name, "not tried: the tiny model does not get so far (see above)")
