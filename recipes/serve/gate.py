"""What stands before the app: keys, counts, sizes and times; and errors in OpenAI's shape."""

import asyncio
import hmac
import ipaddress
import time

from fastapi import Request
from fastapi.responses import JSONResponse

from .batcher import CLOSED, Batcher
from .metrics import Metrics
from .schema import Limits, Refused


CHAT = "/v1/chat/completions"
BODY_SECONDS = 30  # for a request's body to arrive


def error_response(error: Refused) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


def retry(status: int) -> dict:
    return {"Retry-After": "1"} if status in (429, 503) else {}


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


async def wait_until_gone(request: Request):
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, limit: int, batcher: Batcher) -> bytes:
    """
    Raises:
        [`Refused`]: 415 unless it is JSON (which a foreign web page cannot send unasked), 413 if it is too large, 408
            if it does not arrive, 503 if the batcher's time is over before that.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("Send JSON with the header `Content-Type: application/json`.", status=415)
    length = request.headers.get("content-length", "")
    size, parts = 0, []

    async def read():
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            else:
                parts.clear()
            # Read on for a while: a client that is still sending would see a broken connection, not the reason.
            if size > 4 * limit:
                return

    if not (length.isdigit() and int(length) > 4 * limit):
        reading, until = asyncio.ensure_future(read()), time.monotonic() + BODY_SECONDS
        try:
            while not reading.done():
                left = until - time.monotonic()
                if left <= 0:
                    raise Refused(f"The body did not arrive within {BODY_SECONDS} seconds.", status=408)
                if batcher.stop_at is not None and time.monotonic() > batcher.stop_at:
                    raise Refused(CLOSED, status=503, headers=retry(503))
                await asyncio.wait([reading], timeout=min(left, 0.5))
            reading.result()
        finally:
            reading.cancel()
    if size > limit or (length.isdigit() and int(length) > limit):
        raise Refused(f"The body has more than {limit} bytes, the most that is read here.", status=413)
    return b"".join(parts)


class Gate:
    """
    Stands before the app: who may ask (before anything is read), how many at once (so that bodies, too, are bounded),
    and what they got, for the metrics. A request that leaves takes its row out of the batch; so does one whose client
    does not read its answer, once its time is over.
    """

    def __init__(self, app, batcher: Batcher, metrics: Metrics, limits: Limits, api_key, local_only: bool):
        self.app, self.batcher, self.metrics, self.limits = app, batcher, metrics, limits
        self.api_key = api_key.strip().encode() if api_key else None
        self.local_only = local_only
        self.requests = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        problem = self.problem(scope)
        is_chat = scope["path"] == CHAT
        if problem is None and is_chat and self.requests >= self.limits.requests:
            message = f"{self.limits.requests} requests are running or waiting, the most that are taken in."
            problem = Refused(message, status=429, code="too_many_requests", headers=retry(429))
        if problem is None and is_chat and self.batcher.stop_at is not None:
            problem = Refused(CLOSED, status=503, headers=retry(503))
        answer = self.app if problem is None else error_response(problem)
        # The app keeps to the time of an answer while somebody reads it.
        longest = self.limits.seconds + BODY_SECONDS if is_chat else None
        begun, status = time.monotonic(), 499

        async def watched(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.requests += is_chat
        try:
            await asyncio.wait_for(answer(scope, receive, watched), longest)
        except asyncio.TimeoutError:  # nobody reads it: returning ends the connection
            pass
        finally:
            self.requests -= is_chat
            if row := scope.get("lavin.row"):
                if not row.ended:
                    self.batcher.cancel(row)
            if is_chat:
                self.metrics.requests.labels(str(status)).inc()
                self.metrics.seconds.observe(time.monotonic() - begun)

    def problem(self, scope) -> Refused | None:
        if scope["path"] == "/health":
            return None
        headers = dict(scope["headers"])
        if self.api_key is not None:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key):
                message = "A valid API key is needed: `Authorization: Bearer KEY`."
                return Refused(message, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        elif self.local_only:
            host = headers.get(b"host", b"").decode("latin-1").rsplit("]", 1)
            host = host[0].removeprefix("[") if len(host) == 2 else host[0].rpartition(":")[0] or host[0]
            if not is_loopback(host):
                return Refused(
                    f"Requests for {host!r} are not answered here: set an API key to allow them.", status=403
                )
        return None
