"""A request of OpenAI's chat API: what is understood, what is refused, and what it may cost."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, ValidationError, field_validator


# Messages and their parts, more than any context holds: reading each takes time in which nobody else is heard.
OBJECTS = 20_000
# What is known, but not done here: accepted with these values only, which ask for nothing.
NEUTRAL = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# What changes no answer, so may be anything.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# The same of a message, so that an answer's can be sent back as it is.
NEUTRAL_IN_MESSAGE = {"tool_calls": ([],), "annotations": ([],)}
IGNORED_IN_MESSAGE = {"name"}


class Refused(Exception):
    """
    An error answer in OpenAI's shape.

    Args:
        message (`str`): What is wrong and what would be right.
        param (`str`, *optional*): The field of the request.
        status (`int`, *optional*, defaults to 400): HTTP status.
        code (`str`, *optional*): For programs.
        headers (`dict`, *optional*): Of the answer.
    """

    def __init__(self, message, param=None, status=400, code=None, headers=None):
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.headers = message, param, status, code, headers or {}

    def body(self) -> dict:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """
    What one request may cost.

    Args:
        context (`int`): Tokens of prompt and answer together.
        max_tokens (`int`): Longest answer where the request does not say.
        body_bytes, image_bytes (`int`): Of the request's body; of one image file.
        image_pixels, images (`int`): Of all images of one request together; images in one request.
        requests (`int`): Taken in at once, running and waiting; more get 429.
        seconds (`float`): From a request's arrival to the end of its answer.
        media_path (`Path`, *optional*): Images may be files below this folder; nowhere by default.
    """

    context: int
    max_tokens: int = 512
    body_bytes: int = 20 * 2**20
    image_bytes: int = 10 * 2**20
    image_pixels: int = 40_000_000
    images: int = 8
    requests: int = 96
    seconds: float = 300.0
    media_path: Path | None = None


class ImageURL(BaseModel):
    url: str
    detail: str | None = None  # every image becomes the tower's size


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], FailFast()]

    @field_validator("content", mode="before")
    @classmethod
    def one_form(cls, content):
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields of a chat completion that are understood; `other` names what is refused."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, StringConstraints(min_length=1, max_length=200)]] | None = Field(None, max_length=4)
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def one_form(cls, stop):
        return [stop] if isinstance(stop, str) else stop


def parse_request(body: bytes) -> ChatRequest:
    """
    Raises:
        [`Refused`]: if the body is no valid request, or asks for what this server does not do.
    """
    if body.count(b"{") > OBJECTS:
        raise Refused(f"The body holds more than {OBJECTS} objects (braces), the most that are read here.")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or None
        raise Refused(f"{where or 'The body'}: {first['msg']}", where) from None
    check_others(request.model_extra, NEUTRAL, IGNORED)
    for i, message in enumerate(request.messages):
        check_others(message.model_extra, NEUTRAL_IN_MESSAGE, IGNORED_IN_MESSAGE, f"messages.{i}.")
    return request


def check_others(fields: dict, neutral: dict, ignored: set, place: str = ""):
    """
    Raises:
        [`Refused`]: if fields that are not done here ask for something.
    """
    for name, value in fields.items():
        if name in ignored or value is None or value in neutral.get(name, ()):
            continue
        if name in neutral:
            message = f"`{name}` is not supported: leave it out, or at {neutral[name][0]!r}."
        else:
            message = f"`{name}` is not known here; leave it out."
        raise Refused(message, place + name)
