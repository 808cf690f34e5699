"""`lavin serve`: the real command in a process of its own, asked by the real `openai` client."""

import base64
import concurrent.futures
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from conftest import fill
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from lavin import LavinForConditionalGeneration, LavinProcessor
from lavin.recipes.ask import ask
from lavin.recipes.cli import build_parser, main


pytestmark = pytest.mark.slow
QUESTIONS = [
    "What is this?", "Name the largest planet.", "How many sides has a square?", "Is it red?", "Say it again, please.",
    "Question: Which of these is a solid?\nContext: A solid keeps its own shape.\nOptions: (A) tea (B) ice\nResponse:",
    "a", "Describe, in one or two sentences, what can be seen, and say how sure you are of each part of it.",
]  # fmt: skip
COLORS = ["red", "blue", "green", "white"]
NEW = 24


def picture(color: str, size=(40, 20), **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def user(text: str, *urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


class Offline:
    """The same model without a server: each conversation alone, by `generate`."""

    def __init__(self, folder):
        self.processor = LavinProcessor.from_pretrained(folder)
        self.model = LavinForConditionalGeneration.from_pretrained(folder).eval()

    def tokens(self, messages, new=NEW) -> list[int]:
        messages = json.loads(json.dumps(messages))
        for message in messages:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image_url":
                    content = base64.b64decode(part.pop("image_url")["url"].partition(",")[2])
                    part.update(type="image", image=Image.open(io.BytesIO(content)))
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = self.model.generate(**inputs, max_new_tokens=new, do_sample=False)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    def answer(self, messages, new=NEW) -> str:
        ends = self.model.generation_config.eos_token_id  # one of them is ordinary text here: not part of the answer
        tokens = [token for token in self.tokens(messages, new) if token not in ends]
        return self.processor.decode(tokens, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    """A light folder with a filled adapter, a long context, and an EOS that some answers reach."""
    config = LlamaConfig.from_pretrained(pair / "text", max_position_embeddings=10**6, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(pair / "text")  # large weights: no two tokens are about equally likely
    folder = tmp_path_factory.mktemp("served") / "tiny"
    names = str(pair / "vision"), str(pair / "text")
    peft = LavinForConditionalGeneration.from_vision_text_pretrained(*names, mma={})
    fill(peft).save_pretrained(folder)
    LavinProcessor.from_vision_text_pretrained(*names).save_pretrained(folder)
    model = Offline(folder)
    answers = [model.tokens([user(question)]) for question in QUESTIONS]
    seen = [token for answer in answers for token in dict.fromkeys(answer[3:])]
    rare = min(set(seen), key=lambda token: (seen.count(token), token))
    generation = json.loads((folder / "generation_config.json").read_text())
    own = {"eos_token_id": [2, rare], "max_new_tokens": 70}
    (folder / "generation_config.json").write_text(json.dumps({**generation, **own}))
    return folder


@pytest.fixture(scope="module")
def offline(folder):
    return Offline(folder)


@pytest.fixture(scope="module")
def start(folder):
    """Starts the command and waits until it says where it listens."""
    started = []

    def run(*options, **environment):
        command = [sys.executable, "-m", "lavin.recipes.cli", "serve", str(folder), "--port", "0", *map(str, options)]
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment},
        )  # fmt: skip
        started.append(server)
        for line in server.stdout:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                server.url = found[0]
                return server
        raise AssertionError(server.stderr.read())

    yield run
    for server in started:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "allowed" / "below").mkdir(parents=True)
    for place in ("allowed/a b.png", "allowed/below/c.png", "secret.png"):
        (folder / place).write_bytes(picture("red"))
    (folder / "allowed" / "link.png").symlink_to(folder / "secret.png")
    (folder / "allowed" / "inside.png").symlink_to(folder / "allowed" / "below" / "c.png")
    os.mkfifo(folder / "allowed" / "pipe.png")
    (folder / "allowed-not").mkdir()
    (folder / "allowed-not" / "d.png").write_bytes(picture("red"))
    return folder


@pytest.fixture(scope="module")
def server(start, media):
    """Small limits, so that each can be met."""
    limits = {
        "--max-context": 256, "--max-images": 2, "--max-image-bytes": 4000, "--max-image-pixels": 90_000,
        "--max-body-bytes": 40_000, "--max-batch-size": 8, "--max-waiting": 40,
    }  # fmt: skip
    options = [str(word) for option in limits.items() for word in option]
    return start(*options, "--allowed-local-media-path", media / "allowed")


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask_client(client, messages, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": NEW, **options})


def metric(server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def long_answer(offline, *urls: str) -> str:
    """A question whose answer does not end within `NEW` tokens."""
    for question in QUESTIONS:
        if not set(offline.tokens([user(question, *urls)])) & set(offline.model.generation_config.eos_token_id):
            return question
    raise AssertionError("every answer ends")


@pytest.mark.main_path
def test_answers_equal_those_of_lavin_ask(client, folder, offline, tmp_path):
    (tmp_path / "a.png").write_bytes(picture("red"))
    for images in ([], [str(tmp_path / "a.png")]):
        urls = [data_url(Path(path).read_bytes()) for path in images]
        question = long_answer(offline, *urls)
        found = ask_client(client, [user(question, *urls)]).choices[0].message.content
        assert found == ask(folder, question, images, max_new_tokens=NEW)


CONVERSATIONS = {
    "text": [user(QUESTIONS[1])],
    "plain string": [{"role": "user", "content": QUESTIONS[1]}],
    "system": [{"role": "system", "content": "Be short."}, user(QUESTIONS[0], data_url(picture("blue")))],
    "two images": [user(QUESTIONS[0], data_url(picture("blue")), data_url(picture("green")))],
    "an image in an earlier turn": [
        user(QUESTIONS[0], data_url(picture("white"))),
        {"role": "assistant", "content": "It is white."},
        user("Are you sure?"),
    ],
    "an image in a later turn": [
        user(QUESTIONS[1]),
        {"role": "assistant", "content": [{"type": "text", "text": "Jupiter."}]},
        user("And this?", data_url(picture("white"))),
    ],
    "a typed image token": [user("What is <image> for?")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_streamed_or_not(client, offline, name):
    messages = CONVERSATIONS[name]
    expected, tokens = offline.answer(messages), offline.tokens(messages)
    whole = ask_client(client, messages)
    assert whole.choices[0].message.content == expected and whole.model == "tiny"
    assert whole.choices[0].finish_reason == ("length" if len(tokens) == NEW else "stop")
    assert whole.usage.completion_tokens == len(tokens)
    chunks = list(ask_client(client, messages, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and chunks[0].choices[0].delta.role == "assistant"


def test_local_files(client, media, offline):
    expected = offline.answer([user("What?", data_url(picture("red")))])
    for name in ("a%20b.png", "below/c.png", "below/../a%20b.png", "inside.png"):
        found = ask_client(client, [user("What?", f"file://{media}/allowed/{name}")])
        assert found.choices[0].message.content == expected, name


def test_32_clients_at_once(client, offline, server):
    """Text and image rows of different length, streamed and not; more clients than rows in a batch."""
    conversations = []
    for i in range(32):
        urls = [data_url(picture(COLORS[i % 4]))] if i % 2 else []
        conversations.append(([user(f"{QUESTIONS[i % 8]} ({i})", *urls)], 4 + 2 * i))
    expected = [offline.answer(messages, new) for messages, new in conversations]
    steps, tokens = metric(server, "lavin_steps_total"), metric(server, "lavin_generated_tokens_total")

    def one(i):
        messages, new = conversations[i]
        if i % 3:
            return ask_client(client, messages, max_tokens=new).choices[0].message.content
        chunks = ask_client(client, messages, max_completion_tokens=new, max_tokens=None, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(32)))
    assert answers == expected and len(set(expected)) > 16
    steps, tokens = (
        metric(server, "lavin_steps_total") - steps,
        metric(server, "lavin_generated_tokens_total") - tokens,
    )
    assert tokens > 2.5 * steps  # they were answered together


def test_stop_strings_and_sampling(client, offline):
    url = data_url(picture("red"))
    messages = [user(long_answer(offline, url), url)]
    whole = offline.answer(messages)
    stop = whole[len(whole) // 2 :][:2]
    found = ask_client(client, messages, stop=stop).choices[0]
    assert found.message.content == whole[: whole.index(stop)].strip() and found.finish_reason == "stop"
    sampled = [ask_client(client, messages, temperature=1.5, seed=n).choices[0].message.content for n in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2] and whole not in sampled
    sure = ask_client(client, messages, temperature=1.5, top_p=1e-6, seed=3)
    assert (
        sure.choices[0].message.content
        == whole
        == ask_client(client, messages, temperature=0, top_p=0.5).choices[0].message.content
    )


LARGE = data_url(b"x" * 5000)
REFUSED = {
    "n": ({"n": 2}, 400, "`n` is not supported", "n"),
    "logprobs": ({"logprobs": True}, 400, "`logprobs` is not supported", "logprobs"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "`tools`", "tools"),
    "unknown field": ({"extra_body": {"best_of": 3}}, 400, "`best_of` is not known", "best_of"),
    "unknown model": ({"model": "gpt-4"}, 404, "'gpt-4' is not served here; 'tiny' is", "model"),
    "temperature": ({"temperature": 3}, 400, "less than or equal to 2", "temperature"),
    "max_tokens": ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
    "no message": ({"messages": []}, 400, "at least 1 item", "messages"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "'user' or 'assistant'", "messages.0.role"),
    "part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "'audio'", "messages.0.content.0"),
    "image of the assistant": (
        {"messages": [{**user("x", data_url(picture("red"))), "role": "assistant"}]}, 400, "Only a user's", None,
    ),
    "long prompt": (
        {"messages": [user("a b c d " * 100)]}, 400, r"prompt has \d{3} tokens.* holds 256 tokens", "messages",
    ),
    "endless prompt": (
        {"messages": [user("a" * 30_000)]}, 400, "30000 characters; the context of 256 tokens", "messages",
    ),
    "long answer": ({"max_tokens": 250}, 400, r"at most 250 tokens of answer .* holds 256 tokens", "max_tokens"),
    "too many images": (
        {"messages": [user("x", *[data_url(picture("red"))] * 3)]}, 400, "3 images; at most 2", "messages",
    ),
    "large body": ({"messages": [user("x" * 50_000)]}, 413, "more than 40000 bytes", None),
    "remote": ({"messages": [user("x", "http://127.0.0.1:1/a.png")]}, 400, "Remote URLs are not fetched", ...),
    "remote, s": ({"messages": [user("x", "https://example.com/a.png")]}, 400, "Remote URLs are not fetched", ...),
    "path": ({"messages": [user("x", "/etc/passwd")]}, 400, "Images are taken from data URLs", ...),
    "no image": ({"messages": [user("x", data_url(b"no image"))]}, 400, "not a PNG, JPEG, GIF, WebP or BMP", ...),
    "half an image": (
        {"messages": [user("x", data_url(picture("red", (200, 200))[:-40]))]}, 400, "cannot be read", ...,
    ),
    "other format": ({"messages": [user("x", data_url(picture("red", format="TIFF")))]}, 400, "not a PNG", ...),
    "no base64": ({"messages": [user("x", "data:image/png;base64,@@@@")]}, 400, "no base64", ...),
    "no form": ({"messages": [user("x", "data:image/png,abc")]}, 400, "must have the form", ...),
    "large file": ({"messages": [user("x", LARGE)]}, 400, "5000 bytes; at most 4000|5001 bytes; at most 4000", ...),
    "large picture": (
        {"messages": [user("x", data_url(picture("red", (400, 300))))]}, 400, "400 x 300 pixels; at most 90000", ...,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(client, name):
    options, status, message, param = REFUSED[name]
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**{"model": "tiny", "messages": [user("Hello")], **options})
    assert error.value.status_code == status and re.search(message, error.value.body["message"]), error.value.body
    assert error.value.body["type"] == "invalid_request_error"
    assert error.value.body["param"] == ("messages.0.content.0.image_url" if param is ... else param) or param is None


OUTSIDE = {
    "outside": "{}/secret.png", "up": "{}/allowed/../secret.png", "coded": "{}/allowed/%2e%2e/secret.png",
    "link": "{}/allowed/link.png", "begins alike": "{}/allowed-not/d.png", "nothing there": "{}/nothing.png",
    "null": "{}/allowed/a%00b.png", "broken": "[x{}/allowed/below/c.png",
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside_the_folder(client, media, name):
    with pytest.raises(openai.PermissionDeniedError) as error:
        ask_client(client, [user("x", "file://" + OUTSIDE[name].format(media))])
    assert error.value.body["message"] == "The file does not lie below the folder that this server may read."


def test_files_that_are_none(client, media):
    for name, reason in (("pipe.png", "no regular file"), ("gone.png", "No such file"), ("below", "Is a directory")):
        with pytest.raises(openai.BadRequestError, match=reason):
            ask_client(client, [user("x", f"file://{media}/allowed/{name}")])
    with pytest.raises(openai.PermissionDeniedError):
        ask_client(client, [user("x", f"file://elsewhere{media}/allowed/below/c.png")])


def test_bodies_that_are_no_requests(server):
    url = f"{server.url}/v1/chat/completions"
    for body in (
        b"{",
        b"[]",
        b'{"model": 1}',
        b"\xff",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"",
    ):
        found = httpx.post(url, content=body, headers={"Content-Type": "application/json"})
        assert found.status_code == 400 and found.json()["error"]["message"], body
    # What a foreign web page could send without asking, or under a name of its own.
    assert httpx.post(url, content=b"{}").status_code == 415
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
    for host in ("localhost:1", "127.0.0.2", "[::1]:8000"):
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 200, host
    assert httpx.get(url).status_code == 405 and httpx.get(url).headers["allow"] == "POST"
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"


def test_models_health_and_metrics(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.head(f"{server.url}/health").status_code == 200
    before = {name: metric(server, f"lavin_{name}") for name in ("prompt_tokens_total", "images_total")}
    usage = ask_client(client, [user("Hello", data_url(picture("red")))]).usage
    assert metric(server, "lavin_prompt_tokens_total") == before["prompt_tokens_total"] + usage.prompt_tokens
    assert metric(server, "lavin_images_total") == before["images_total"] + 1
    refused = metric(server, 'lavin_requests_total{status="400"}'.replace("{", r"\{"))
    with pytest.raises(openai.BadRequestError):
        ask_client(client, [user("Hello")], n=2)
    assert metric(server, r'lavin_requests_total\{status="400"\}') == refused + 1
    assert metric(server, "lavin_running_rows") == metric(server, "lavin_waiting_rows") == 0


def half_a_request(server) -> socket.socket:
    """A connection over which a body never arrives whole."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
    return connection


def test_a_client_that_leaves_while_it_sends(server):
    left = r'lavin_requests_total\{status="499"\}'
    before = metric(server, left)
    half_a_request(server).close()
    wait_for(lambda: metric(server, left) == before + 1)
    assert metric(server, r'lavin_requests_total\{status="500"\}') == 0


def test_the_readme_names_options_that_exist():
    text = (Path(__file__).parents[1] / "recipes" / "serve" / "README.md").read_text()
    (serve,) = (
        a.choices["serve"] for a in build_parser()._actions if getattr(a, "choices", None) and "serve" in a.choices
    )
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= set(serve._option_string_actions)
    for options, default in re.findall(r"\| ([^|]+) \| (`--[^|]+`) \|", text):
        number = re.match(r"[\d,]+", options)
        action = serve._option_string_actions[default.split("`")[1]]
        if number and action.default:
            value = int(number[0].replace(",", "")) * (2**20 if "MiB" in options else 1)
            assert action.default == value, default


def test_wrong_options(folder, tmp_path, capsys):
    def fails(*options, message):
        assert main(["serve", str(folder), *map(str, options)]) == 2
        captured = capsys.readouterr()
        assert "lavin serve: error:" in captured.err and message in captured.err, captured.err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        fails("--port", taken.getsockname()[1], message="Choose another --port")
    fails("--port", 0, "--max-context", 10**9, message="--max-context must be 2 to 1000000")
    fails("--port", 0, "--max-batch-size", 0, message="--max-batch-size must be above 0")
    fails("--port", 0, "--grace", "inf", message="--grace must be a number not below 0")
    fails("--port", 0, "--dtype", "int8", message="--dtype must be")
    fails("--port", 0, "--device", "cuda:99", message="no device 'cuda:99'")
    fails("--port", 0, "--allowed-local-media-path", tmp_path / "none", message="is no folder")
    fails("--host", "0.0.0.0", "--port", 0, "--dtype", "int8", message="can be reached by other machines")
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 2
