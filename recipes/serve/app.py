"""The HTTP side: OpenAI's chat completions over a [`Batcher`], with its errors, limits, health and metrics."""

import asyncio
import copy
import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .answer import AnswerText
from .batch import Ended, Row
from .batcher import Batcher
from .gate import CHAT, Gate, error_response, read_body, retry, wait_until_gone
from .metrics import Metrics
from .prompts import read_prompt, sampling
from .schema import ChatRequest, Limits, Refused, parse_request


def create_app(
    batcher: Batcher,
    processor,
    generation_config,
    name: str,
    limits: Limits,
    api_key: str | None = None,
    local_only: bool = False,
):
    r"""
    Args:
        batcher ([`Batcher`]): Started, and closed at the end, by the app.
        processor ([`LavinProcessor`]): Renders the messages; each thread that does so gets a copy.
        generation_config (`GenerationConfig`): What a request does not say.
        name (`str`): The model's name for requests.
        limits ([`Limits`]): What one request may cost.
        api_key (`str`, *optional*): Wanted as `Authorization: Bearer ...` by everything but `/health`.
        local_only (`bool`, *optional*): Answer only requests addressed to this machine by a local name, so that no
            web page can reach the server under a name of its own.

    Returns:
        An ASGI application.
    """
    metrics = Metrics(batcher, name)
    own = threading.local()

    def copied():
        own.processor = copy.deepcopy(processor)  # a tokenizer serves one thread

    readers = ThreadPoolExecutor(4, "lavin-reader", initializer=copied)
    # The worker decodes while readers tokenise: a tokenizer of its own.
    tokenizer = copy.deepcopy(processor.tokenizer)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app):
        batcher.start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, batcher.close)
        readers.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    about = {"id": name, "object": "model", "created": created, "owned_by": "lavin", "max_model_len": limits.context}

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused):
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(Refused(message, status=error.status_code, headers=error.headers))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception):
        return error_response(Refused(f"The server failed: {type(error).__name__}", status=500))

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health():
        status, code = ("ok", 200) if batcher.healthy else ("failing", 503)
        return JSONResponse({"status": status}, code)

    @app.get("/metrics")
    async def show_metrics():
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str):
        check_name(model)
        return about

    def check_name(model: str):
        if model != name:
            raise Refused(f"The model {model!r} is not served here; {name!r} is.", "model", 404, "model_not_found")

    @app.post(CHAT)
    async def chat(request: Request):
        arrived = time.monotonic()
        try:
            body = parse_request(await read_body(request, limits.body_bytes, batcher))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        check_name(body.model)
        gone = asyncio.create_task(wait_until_gone(request))
        try:
            return await answer(request, body, gone, arrived)
        finally:
            gone.cancel()

    async def answer(request: Request, body: ChatRequest, gone: asyncio.Task, arrived: float):
        loop, deadline = asyncio.get_running_loop(), arrived + limits.seconds
        reading = loop.run_in_executor(readers, lambda: read_prompt(own.processor, body, limits))
        await asyncio.wait(
            [reading, gone], timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
        )
        if not reading.done():
            reading.cancel()  # nothing has begun yet, or nobody takes what comes
            if gone.done():
                return Response(status_code=499)
            raise too_late(limits)
        prompt = reading.result()
        events = asyncio.Queue()

        def emit(event):  # called by the worker
            if body.stream or not isinstance(event, str):
                loop.call_soon_threadsafe(events.put_nowait, event)

        text = AnswerText(tokenizer, body.stop)
        row = Row(
            prompt.input_ids,
            prompt.pixel_values,
            prompt.max_new_tokens,
            text,
            emit,
            **sampling(body, generation_config),
        )
        request.scope["lavin.row"] = row  # the gate cancels it, however this request ends
        metrics.prompt_tokens.inc(len(prompt.input_ids))
        metrics.images.inc(prompt.images)
        batcher.submit(row)

        async def next_event():
            try:
                event = await asyncio.wait_for(events.get(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                batcher.cancel(row)
                raise too_late(limits, running=bool(row.tokens)) from None
            if isinstance(event, (str, Ended)):
                return event
            raise Refused(event.message, status=event.status, headers=retry(event.status))

        first = asyncio.create_task(next_event())
        await asyncio.wait([first, gone], return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            first.cancel()
            batcher.cancel(row)
            return Response(status_code=499)  # nobody reads it
        first = first.result()
        if row.first_token_at:
            metrics.first_token.observe(row.first_token_at - arrived)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = stream(head, first, next_event, row, with_usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        message = {"role": "assistant", "content": text.raw.strip(), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": first.reason}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage(row)}

    return Gate(app, batcher, metrics, limits, api_key, local_only)


async def stream(head: dict, event, next_event, row: Row, with_usage: bool):
    """Server-sent events: the role, pieces of text, the reason of the end, the usage if asked for, `[DONE]`."""

    def chunk(delta: dict, reason: str | None = None, **more) -> str:
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        body = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(body)}\n\n"

    nothing = {"usage": None} if with_usage else {}
    yield chunk({"role": "assistant", "content": ""}, **nothing)
    try:
        while isinstance(event, str):
            yield chunk({"content": event}, **nothing)
            event = await next_event()
    except Refused as error:  # the status is long sent
        yield f"data: {json.dumps(error.body())}\n\n"
        return
    yield chunk({}, event.reason, **nothing)
    if with_usage:
        yield chunk({}, choices=[], usage=usage(row))
    yield "data: [DONE]\n\n"


def usage(row: Row) -> dict:
    prompt, answer = len(row.input_ids), len(row.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def too_late(limits: Limits, running: bool = False) -> Refused:
    if running:  # asking again would take as long again
        message = f"The answer was not complete after {limits.seconds:g} seconds; ask for fewer tokens."
        return Refused(message, status=504, code="timeout", headers={"x-should-retry": "false"})
    message = f"The request waited {limits.seconds:g} seconds without being started."
    return Refused(message, status=503, code="timeout", headers=retry(503))
