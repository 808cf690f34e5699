"""From a request to the tensors of its prompt, and to the way its tokens are chosen."""

import dataclasses
from typing import Any

import torch
from jinja2 import TemplateError

from .images import read_images
from .schema import ChatRequest, Limits, Refused


@dataclasses.dataclass
class Prompt:
    """A rendered request: `input_ids` `(length,)`, `pixel_values` of all images or None, tokens left to answer."""

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    max_new_tokens: int
    images: int


def read_prompt(processor, request: ChatRequest, limits: Limits) -> Prompt:
    """
    Renders the messages with the model's own template and reads their images.

    Raises:
        [`Refused`]: if an image is refused or broken, or prompt and answer do not fit into the context.
    """
    conversation, urls, characters = [], [], 0
    for i, message in enumerate(request.messages):
        for j, part in enumerate(message.content):
            if part.type == "text":
                characters += len(part.text)
            else:
                if message.role != "user":
                    raise Refused("Only a user's message may hold images.", f"messages.{i}.content.{j}")
                urls.append((part.image_url.url, f"messages.{i}.content.{j}.image_url"))
        role = "system" if message.role == "developer" else message.role
        conversation.append({"role": role, "content": message.content})
    if characters > limits.context * longest_token(processor):  # more than enough to know, without tokenising it
        raise Refused(
            f"The prompt's text has {characters} characters; the context of {limits.context} tokens cannot hold it.",
            "messages",
            code="context_length_exceeded",
        )
    images = iter(read_images(urls, limits))
    for message in conversation:
        message["content"] = [
            {"type": "text", "text": part.text} if part.type == "text" else {"type": "image", "image": next(images)}
            for part in message["content"]
        ]
    try:
        inputs = processor.apply_chat_template(
            [conversation], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except (ValueError, TemplateError) as error:
        raise Refused(f"The model's chat template refuses the messages: {error}", "messages") from None
    ids = inputs["input_ids"][0]
    asked = request.max_completion_tokens or request.max_tokens
    left = limits.context - len(ids)
    if left < (asked or 1):
        answer = f" and at most {asked} tokens of answer were asked for" if asked else ""
        raise Refused(
            f"The prompt has {len(ids)} tokens{answer}; the context holds {limits.context} tokens, prompt and answer "
            "together.",
            "messages" if left < 1 else "max_completion_tokens" if request.max_completion_tokens else "max_tokens",
            code="context_length_exceeded",
        )
    return Prompt(ids, inputs.get("pixel_values"), asked or min(limits.max_tokens, left), len(urls))


def longest_token(processor) -> int:
    """Characters of the longest token."""
    found = getattr(processor, "_longest_token", None)
    if found is None:
        found = processor._longest_token = max(map(len, processor.tokenizer.get_vocab()))
    return found


def sampling(request: ChatRequest, generation_config) -> dict[str, Any]:
    """
    How a row chooses its tokens: greedily, unless the request or the model's generation config says otherwise. A
    request that gives `top_p` below 1 but no temperature is sampled at 1, as OpenAI's default.
    """
    config = generation_config
    if request.temperature is not None:
        temperature = request.temperature
    elif config.do_sample:
        temperature = 1.0 if config.temperature is None else config.temperature
    else:
        temperature = 1.0 if (request.top_p or 1) < 1 else 0.0
    if temperature < 1e-4:
        return {}
    top_p = request.top_p if request.top_p is not None else (config.do_sample and config.top_p) or 1.0
    top_k = (config.do_sample and config.top_k) or 0
    return {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": request.seed}
