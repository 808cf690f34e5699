"""`lavin serve`: keys, full queues, clients that leave, limits of time, stopping, and a model that fails."""

import asyncio
import concurrent.futures
import json
import re
import signal
import threading

import httpx
import openai
import pytest
import torch
from test_serve import QUESTIONS, Offline, folder, half_a_request, metric, offline, start, user, wait_for  # noqa: F401  (fixtures)

from lavin.recipes.serve import app as app_module
from lavin.recipes.serve import gate as gate_module
from lavin.recipes.serve.app import create_app
from lavin.recipes.serve.batcher import Batcher
from lavin.recipes.serve.schema import Limits


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def keyed(start):
    """A server with a key, a long context and two places: one runs, one waits."""
    options = ["--max-batch-size", 1, "--max-waiting", 1, "--max-batch-tokens", 10**7, "--grace", 1]
    return start(*options, LAVIN_API_KEY=" secret\n")


@pytest.fixture(scope="module")
def keyed_client(keyed):
    return openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="secret", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def endless(offline):
    """A request whose answer does not end by itself."""
    for question in QUESTIONS:
        if len(offline.tokens([user(question)], 200)) == 200:
            return {"model": "tiny", "messages": [user(question)], "max_tokens": 900_000}
    raise AssertionError("every answer ends")


KEY = {"Authorization": "Bearer secret"}


def test_api_key(keyed, keyed_client):
    assert keyed_client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="wrong", max_retries=0).models.list()
    for header in ({}, {"Authorization": b"Bearer secret\xe4"}, {"Authorization": "Basic secret"}):
        found = httpx.post(f"{keyed.url}/v1/chat/completions", content=b"{}", headers=header)
        assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{keyed.url}/metrics").status_code == 401
    assert httpx.get(f"{keyed.url}/metrics", headers=KEY).status_code == 200
    assert httpx.get(f"{keyed.url}/health").status_code == 200


def test_the_models_own_answer_length(keyed_client, endless):
    asked = {name: value for name, value in endless.items() if name != "max_tokens"}
    answer = keyed_client.chat.completions.create(**asked)
    assert answer.usage.completion_tokens == 70 and answer.choices[0].finish_reason == "length"


def rows(server, kind: str) -> float:
    text = httpx.get(f"{server.url}/metrics", headers=KEY).text
    return float(re.search(rf"^lavin_{kind}_rows (.*)$", text, flags=re.M)[1])


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_place(keyed, keyed_client, endless, streamed):
    with httpx.Client(headers=KEY, timeout=120) as http:
        request = http.build_request("POST", f"{keyed.url}/v1/chat/completions", json={**endless, "stream": streamed})
        if streamed:
            answer = http.send(request, stream=True)
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            wait_for(lambda: rows(keyed, "running") == 1)
            answer.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                request.extensions["timeout"] = {"read": 1.0}
                http.send(request)
    wait_for(lambda: rows(keyed, "running") == 0)
    assert keyed_client.chat.completions.create(**{**endless, "max_tokens": 3}).usage.completion_tokens == 3


def test_too_many_requests(keyed, keyed_client, endless):
    """One runs, one waits, the third is sent away; when the first leaves, the second gets its answer."""
    running = keyed_client.chat.completions.create(**endless, stream=True)
    next(iter(running))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(keyed_client.chat.completions.create, **{**endless, "max_tokens": 3})
        wait_for(lambda: rows(keyed, "waiting") == 1)
        with pytest.raises(openai.RateLimitError) as error:
            keyed_client.chat.completions.create(**endless)
        assert error.value.response.headers["retry-after"] == "1"
        assert "2 requests are running or waiting" in error.value.body["message"]
        running.close()
        assert waiting.result().usage.completion_tokens == 3


def test_time_is_limited(start, endless):
    server = start("--timeout", "1.5", "--max-batch-size", 1, "--max-batch-tokens", 10**7)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        begun = [pool.submit(client.chat.completions.create, **endless) for _ in range(3)]
        statuses = []
        for answer in begun:
            with pytest.raises(openai.InternalServerError) as error:
                answer.result()
            statuses.append(error.value.status_code)
    assert set(statuses) <= {503, 504} and 504 in statuses  # 503: never begun
    with pytest.raises(openai.APIError, match="not complete after 1.5 seconds"):
        list(client.chat.completions.create(**endless, stream=True))
    assert httpx.get(f"{server.url}/health").status_code == 200
    wait_for(lambda: metric(server, "lavin_running_rows") == 0)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_stopping(start, endless, sent):
    """A short answer is completed, an endless one gets an error after the time of grace, and the process ends."""
    server = start("--grace", 2, "--max-batch-tokens", 10**8)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = iter(client.chat.completions.create(**endless, stream=True))
    next(stream)
    sending = half_a_request(server)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        short = pool.submit(client.chat.completions.create, **{**endless, "max_tokens": 100})
        wait_for(lambda: metric(server, "lavin_running_rows") == 2 or short.done())
        server.send_signal(sent)
        assert short.result().usage.completion_tokens == 100
    with pytest.raises(openai.APIError, match="shutting down"):
        for _ in stream:
            pass
    answer = b"".join(iter(lambda: sending.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503") and b"The server is shutting down." in answer
    _, errors = server.communicate(timeout=60)
    assert server.returncode == (0 if sent == signal.SIGINT else -signal.SIGTERM)
    assert "Traceback" not in errors


def test_a_failing_model_is_a_500_and_the_server_lives_on(folder, monkeypatch):
    """The app in this process, so that its model can be made to fail."""
    offline = Offline(folder)
    batcher = Batcher(offline.model, {2})
    app = create_app(batcher, offline.processor, offline.model.generation_config, "tiny", Limits(context=256))
    body = {"model": "tiny", "messages": [user(QUESTIONS[0])], "max_tokens": 4}

    async def talk():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:

            async def status(path, **options):
                answer = await http.request("POST" if options else "GET", path, timeout=60, **options)
                return answer.status_code, answer.text

            path = "/v1/chat/completions"
            assert (await status("/health"))[0] == 503
            batcher.start()
            assert (await status(path, json=body))[0] == 200
            with monkeypatch.context() as patch:
                memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
                patch.setattr(offline.model, "forward", lambda **kwargs: (_ for _ in ()).throw(memory))
                for options in ({}, {"stream": True}):
                    code, text = await status(path, json={**body, **options})
                    error = json.loads(text)["error"]
                    assert code == 500 and error["type"] == "server_error" and "Tried to allocate" in error["message"]
                assert (await status("/health"))[0] == 200
                await status(path, json=body)
                assert (await status("/health"))[0] == 503  # three times in a row
            assert (await status(path, json=body))[0] == 200 == (await status("/health"))[0]
            batcher.close()
            assert (await status(path, json=body))[0] == 503 == (await status("/health"))[0]

    asyncio.run(talk())


class Client:
    """One request to an app in this process, whose every move is the test's."""

    def __init__(self, app, **body):
        head = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/chat/completions"}
        headers = [(b"content-type", b"application/json")]
        scope = {**head, "raw_path": b"", "query_string": b"", "headers": headers, "scheme": "http", "asgi": {}}
        self.body = json.dumps({"model": "tiny", "messages": [user(QUESTIONS[0])], **body}).encode()
        self.heard, self.left, self.reads = [], asyncio.Event(), asyncio.Event()
        self.reads.set()
        self.asked = asyncio.create_task(app(scope, self.receive, self.send))

    async def receive(self):
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.heard.append(message)
        await self.reads.wait()


@pytest.fixture
def app(folder):
    """An app in this process, for what a test must hold still."""
    offline = Offline(folder)
    batcher = Batcher(offline.model, set())
    limits = Limits(context=10**6, requests=1, seconds=2.0)
    batcher.start()
    yield create_app(batcher, offline.processor, offline.model.generation_config, "tiny", limits)
    batcher.close()


def test_a_client_that_leaves_while_its_prompt_is_read(app, monkeypatch):
    """Its place is free at once, and the next one's answer is whole."""
    reading, go_on, read_prompt = threading.Event(), threading.Event(), app_module.read_prompt

    def slow(*arguments):
        reading.set()
        assert go_on.wait(60)
        return read_prompt(*arguments)

    async def talk():
        with monkeypatch.context() as patch:
            patch.setattr(app_module, "read_prompt", slow)
            first = Client(app, max_tokens=3)
            await asyncio.to_thread(reading.wait, 60)
            first.left.set()
            await asyncio.wait_for(first.asked, 60)
        assert first.heard[0]["status"] == 499 and app.requests == 0
        second = Client(app, max_tokens=3)
        await asyncio.wait_for(second.asked, 60)
        go_on.set()
        assert json.loads(second.heard[1]["body"])["usage"]["completion_tokens"] == 3

    asyncio.run(talk())


def test_a_client_that_does_not_read_its_answer(app, monkeypatch):
    """Its row leaves when its time is over, though nothing can be sent any more."""
    monkeypatch.setattr(gate_module, "BODY_SECONDS", 0.5)

    async def talk():
        client = Client(app, max_tokens=900_000, stream=True)
        while len(client.heard) < 3:
            await asyncio.sleep(0.01)
        client.reads.clear()
        assert app.requests == 1
        await asyncio.wait_for(client.asked, 60)
        while app.batcher.running:
            await asyncio.sleep(0.01)
        assert app.requests == 0

    asyncio.run(asyncio.wait_for(talk(), 120))
