"""A tiny LaVIN with an adapter, taken through what users do with a large one."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import lavin.recipes.quickstart

from ..init import init_folder
from .report import SKIP, Finding


TOWERS = Path(lavin.recipes.quickstart.__file__).parent / "tiny"  # the quickstart's: 0.9M and 1.7M values
NEW_TOKENS = 8


class Tiny:
    """
    What is known of it so far: a light `folder` as `lavin init` writes it; the `model` in float32 on the CPU, its
    adapter filled with noise, and `processor`; `inputs`, one row with one image, and the `loss` on it; a folder where
    it was `saved` with its adapter.
    """

    folder: Path
    model: Any
    processor: Any
    inputs: dict
    loss: float
    saved: Path

    def __getattr__(self, name: str):
        raise Finding(SKIP, "not tried: the tiny model does not get so far (see above)")

    def build(self, place: Path) -> str:
        init_folder(TOWERS / "vision", TOWERS / "text", place / "light")
        model = AutoModel.from_pretrained(place / "light", mma={}, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(place / "light")
        generator = torch.Generator().manual_seed(0)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():  # as it starts an adapter is the identity, and would show nothing
            for parameter in trained:
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.05, generator=generator))
        self.folder, self.model, self.processor = place / "light", model, processor
        self.inputs = self._inputs("red")
        count = sum(parameter.numel() for parameter in trained)
        return f"`lavin init`, then loaded with an adapter of {count:,} values"

    def _inputs(self, colour: str) -> dict:
        image = Image.new("RGB", (64, 64), colour)
        asked = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "It is a circle."}]
        inputs = self.processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
        image_token = inputs["input_ids"] == self.processor.image_token_id
        return {**inputs, "labels": inputs["input_ids"].masked_fill(image_token, -100)}

    @torch.no_grad()
    def forward(self) -> str:
        red, blue = self.model(**self.inputs), self.model(**self._inputs("blue"))
        if not red.logits.isfinite().all():
            raise FloatingPointError("logits hold NaN or infinity")
        if torch.equal(red.logits, blue.logits):
            raise ValueError("another image gives the same logits")
        self.loss = red.loss.item()
        return f"loss {self.loss:.3f}; another image, other logits"

    def backward(self) -> str:
        backpropagate(self.model.train(), self.inputs)
        count = sum(p.grad is not None for p in self.model.parameters())
        self.model.eval().zero_grad()
        return f"finite gradients in all {count} tensors of the adapter"

    def generate(self) -> str:
        prompt = {key: value for key, value in self.inputs.items() if key != "labels"}
        limits = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        cached, plain = (self.model.generate(**prompt, **limits, use_cache=cache) for cache in (True, False))
        if cached.shape[1] != prompt["input_ids"].shape[1] + NEW_TOKENS or not torch.equal(cached, plain):
            raise ValueError("with and without a cache the tokens differ")
        return f"{NEW_TOKENS} tokens after an image, the same with and without a cache"

    @torch.no_grad()
    def save_and_load(self) -> str:
        folder = self.folder.with_name("saved")
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        again = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        if (tokens := AutoProcessor.from_pretrained(folder).num_image_tokens) != self.processor.num_image_tokens:
            raise ValueError(f"the loaded processor has {tokens} image tokens")
        if not torch.equal(again(**self.inputs).logits, self.model(**self.inputs).logits):
            raise ValueError("the loaded model gives other logits")
        self.saved = folder
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return f"{size / 2**20:.1f} MB, the same logits to the bit"

    def reload(self, device: str | torch.device, **arguments):
        """The saved model, otherwise than in float32 on the CPU, and the inputs there."""
        self.loss  # noqa: B018  (what is compared with it needs it)
        model = AutoModel.from_pretrained(self.saved, **arguments)
        model = model.to(device) if "quantization_config" not in arguments else model
        return model.eval(), {key: value.to(model.device) for key, value in self.inputs.items()}

    def compare_loss(self, loss: float, allowed: float) -> str:
        """
        A loss beside that in float32, as text.

        Raises:
            `FloatingPointError`: if it is off by more than the share `allowed`, NaN included.
        """
        text = f"loss {loss:.3f}, in float32 {self.loss:.3f}"
        if not abs(loss - self.loss) <= allowed * self.loss:
            raise FloatingPointError(f"{text}: too far apart")
        return text


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
