"""Loads a LaVIN and serves it until it is stopped."""

import logging
import math
import os
import socket
import sys
from pathlib import Path

import uvicorn

from lavin.generation_lavin import context_length

from ..load import eos_token_ids, load_model
from .app import create_app
from .batch import check_cache
from .batcher import Batcher
from .gate import is_loopback
from .schema import Limits


# Of a generation config, what the server follows; anything else that is set there is named in a warning.
FOLLOWED = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k",
    "max_new_tokens", "use_cache", "cache_implementation", "transformers_version", "_from_model_config",
    "output_attentions", "output_hidden_states",
}  # fmt: skip


class Server(uvicorn.Server):
    """Gives running requests a time to end when it is asked to stop, and says where it listens."""

    batcher: Batcher
    grace: float
    greeting: str

    async def startup(self, sockets=None):
        await super().startup(sockets)
        if self.started:
            print(self.greeting, flush=True)

    def handle_exit(self, sig, frame):
        self.batcher.stop(self.grace)
        super().handle_exit(sig, frame)


def serve(
    folder: str | os.PathLike,
    revision: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    allowed_local_media_path: str | os.PathLike | None = None,
    max_batch_size: int = 32,
    max_batch_tokens: int = 32_768,
    max_waiting: int = 64,
    max_context: int | None = None,
    max_tokens: int | None = None,
    max_images: int = 8,
    max_image_bytes: int = 10 * 2**20,
    max_image_pixels: int = 40_000_000,
    max_body_bytes: int = 20 * 2**20,
    timeout: float = 300.0,
    grace: float = 30.0,
):
    r"""
    Serves a LaVIN until a signal (Ctrl-C, SIGTERM). The arguments are those of `lavin serve`.

    Raises:
        `OSError`, `ValueError`: if the address cannot be had, the model cannot be read or cannot be batched, or an
            argument makes no sense.
    """
    counts = {"--max-batch-size": max_batch_size, "--max-batch-tokens": max_batch_tokens}
    counts |= {} if max_tokens is None else {"--max-tokens": max_tokens}
    counts |= {"--max-image-bytes": max_image_bytes, "--max-image-pixels": max_image_pixels, "--timeout": timeout}
    for option, value in {**counts, "--max-body-bytes": max_body_bytes}.items():
        if not value > 0:
            raise ValueError(f"{option} must be above 0, got {value}.")
    for option, value in {"--max-waiting": max_waiting, "--max-images": max_images, "--grace": grace}.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{option} must be a number not below 0, got {value}.")
    if api_key is not None and not api_key.strip():
        raise ValueError("The API key is empty.")
    media_path = None
    if allowed_local_media_path is not None:
        media_path = Path(allowed_local_media_path).resolve()
        if not media_path.is_dir():
            raise ValueError(f"--allowed-local-media-path {allowed_local_media_path} is no folder.")
    listening = bind(host, port)  # first: a model takes long to load
    local = is_loopback(host)
    if not local and api_key is None:
        print(
            f"lavin serve: warning: {host} can be reached by other machines, and anybody there may ask: "
            "set an API key (LAVIN_API_KEY).",
            file=sys.stderr,
        )
    model, processor = load_model(folder, device, dtype, revision)
    check_cache(model)
    name = served_model_name or (Path(folder).resolve().name if Path(folder).is_dir() else str(folder))
    context = served_context(context_length(model.config.get_text_config()), max_context)
    limits = Limits(
        context=context,
        max_tokens=max_tokens or model.generation_config.max_new_tokens or Limits.max_tokens,
        body_bytes=max_body_bytes,
        image_bytes=max_image_bytes,
        image_pixels=max_image_pixels,
        images=max_images,
        requests=max_batch_size + max_waiting,
        seconds=timeout,
        media_path=media_path,
    )
    unfollowed = sorted(set(model.generation_config.to_diff_dict()) - FOLLOWED)
    if unfollowed:
        print(
            f"lavin serve: warning: not followed from generation_config.json: {', '.join(unfollowed)}", file=sys.stderr
        )
    batcher = Batcher(model, set(eos_token_ids(model, processor)), max_batch_size, max_batch_tokens)
    app = create_app(batcher, processor, model.generation_config, name, limits, api_key, local)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(name)s: %(message)s")
    server = Server(uvicorn.Config(app, timeout_graceful_shutdown=int(grace) + 10, server_header=False))
    server.batcher, server.grace = batcher, grace
    shown = f"[{host}]" if ":" in host else host
    server.greeting = (
        f"Serving {name} at http://{shown}:{listening.getsockname()[1]}/v1 ({model.device}, context {context} tokens, "
        f"up to {max_batch_size} requests at once). Stop it with Ctrl-C."
    )
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has shut down, and passes the signal on
        pass


def bind(host: str, port: int) -> socket.socket:
    """Takes the address without listening yet: until the model is there, clients are refused rather than kept."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        raise OSError(f"Cannot listen at {host}, port {port}: {error}. Choose another --port or --host.") from error
    return listening


def served_context(own: int | None, wanted: int | None) -> int:
    """
    Raises:
        `ValueError`: if the model has no limit of its own and nothing is wanted, or more is wanted than it has.
    """
    if wanted is None and own is None:
        raise ValueError("The model does not say how many tokens it can read: give --max-context.")
    if wanted is not None and (wanted < 2 or (own is not None and wanted > own)):
        raise ValueError(f"--max-context must be 2 to {own or 'any number'}, got {wanted}.")
    return wanted or own
