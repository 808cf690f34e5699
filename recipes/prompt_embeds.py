"""
Prompts with images as embeddings, for an engine that knows plain language models and takes prompt embeddings.

    python prompt_embeds.py FOLDER "What is this?" --image cat.png --output prompt.pt
    python prompt_embeds.py FOLDER "What is this?" --image cat.png --server http://127.0.0.1:8000/v1

`lavin export` writes this file into the image side's folder. It needs torch, transformers and Pillow.
LaVIN need not be installed, and of the language model only its embeddings are read.
"""

import argparse
import base64
import io
import json
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


try:
    from lavin.images_lavin import to_rgb
except ImportError:  # `lavin export` writes it beside this file
    sys.path.append(str(Path(__file__).parent))
    from images_lavin import to_rgb  # type: ignore[no-redef]


EMBEDDINGS = "input_embeddings.pt"  # engines read every safetensors file of a folder as the model's


@dataclass
class ImageSide:
    """What turns a prompt with images into embeddings; see [`load_image_side`]."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: CLIPImageProcessorPil
    image_tokens: torch.nn.Module
    image_token: str
    embedding: torch.Tensor


def load_image_side(folder: str | Path) -> ImageSide:
    """
    Loads an image side.

    Args:
        folder (`str` or `Path`): The folder `image` that `lavin export` wrote.

    Raises:
        `FileNotFoundError`: if a file of it is missing.
    """
    folder = Path(folder)
    program = folder / "image_tokens.pt2"
    if not program.is_file():
        raise FileNotFoundError(f"{folder} has no image_tokens.pt2: name the folder `image` of `lavin export`.")
    stored = {"image_token": ""}
    image_tokens = torch.export.load(program, extra_files=stored).module()
    return ImageSide(
        AutoTokenizer.from_pretrained(folder),
        CLIPImageProcessorPil.from_pretrained(folder),
        image_tokens,
        stored["image_token"],
        torch.load(folder / EMBEDDINGS, weights_only=True),
    )


def prompt_embeds(side: ImageSide, question: str, images: list[Image.Image]) -> torch.Tensor:
    """
    Embeds one prompt in LaVIN's format, images first.

    Args:
        side ([`ImageSide`]): From [`load_image_side`].
        question (`str`): The user's text.
        images (`list[PIL.Image.Image]`): At least one: the image side's weights are folded for prompts that hold one.

    Returns:
        `torch.Tensor` of shape `(sequence_length, hidden_size)`, in the language model's dtype.

    Raises:
        `ValueError`: if there is no image.
    """
    if not images:
        raise ValueError("The image side is folded for prompts with an image; send text to the text side.")
    pixel_values = side.image_processor([to_rgb(image) for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        features = side.image_tokens(pixel_values)
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": as_text(side, question)}]
    text = side.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    text = text.replace(side.image_token, side.image_token * features.shape[1])
    ids = side.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    is_image = ids == side.tokenizer.convert_tokens_to_ids(side.image_token)
    embeds = side.embedding[ids.masked_fill(is_image, 0)]
    embeds[is_image] = features.flatten(0, 1).to(embeds)
    return embeds


def as_text(side: ImageSide, question: str) -> str:
    """A question in which no special token stands, as LaVIN's processor reads one: `</s>` becomes `</s >`."""
    tokens = {token.content for token in side.tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted({token for token in tokens if len(token) > 1} | {side.image_token}, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, tokens)), lambda found: f"{found[0][:-1]} {found[0][-1]}", question)


def ask_server(server: str, embeds: torch.Tensor, max_tokens: int = 64) -> dict:
    """
    Asks an engine that serves the language model of this folder with OpenAI's completions, greedily.

    Args:
        server (`str`): Address up to `/v1`, of vLLM started with `--enable-prompt-embeds` for example.
        embeds (`torch.Tensor`): From [`prompt_embeds`].
        max_tokens (`int`, *optional*, defaults to 64): Length of the answer at most.

    Returns:
        `dict`: the first choice: `text`, `finish_reason`, and `token_ids` where the engine knows that field.

    Raises:
        `OSError`: if there is no answer, or the engine refuses; the message has its reason.
    """
    file = io.BytesIO()
    torch.save(embeds, file)
    body = {
        "model": _call(server, "models")["data"][0]["id"],
        "prompt_embeds": base64.b64encode(file.getvalue()).decode(),
        "max_tokens": max_tokens,
        "temperature": 0,
        "return_token_ids": True,
    }
    return _call(server, "completions", body)["choices"][0]


def _call(server: str, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.rstrip('/')}/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise OSError(
            f"{request.full_url} refuses: {error.code} {error.read(2000).decode(errors='replace')}"
        ) from error
    except OSError as error:
        raise OSError(f"{request.full_url} does not answer: {error}. Is the engine running there?") from error


def main():
    parser = argparse.ArgumentParser(description="Turn a prompt with images into embeddings.")
    parser.add_argument("folder", metavar="DIR", help="the folder `image` of `lavin export`")
    parser.add_argument("question")
    parser.add_argument("--image", action="append", required=True, metavar="FILE", help="may be given several times")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", metavar="FILE.pt", help="write the embeddings")
    target.add_argument("--server", metavar="URL", help="ask the engine at this address, up to /v1")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="with --server; 64 by default")
    options = parser.parse_args()
    images = [Image.open(path) for path in options.image]
    embeds = prompt_embeds(load_image_side(options.folder), options.question, images)
    if options.server:
        print(ask_server(options.server, embeds, options.max_tokens)["text"])
    else:
        torch.save(embeds, options.output)
        print(f"Wrote {tuple(embeds.shape)} to {options.output}.")


if __name__ == "__main__":
    main()
