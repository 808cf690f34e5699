"""The parser of `lavin serve`; what it imports is imported when it runs."""

import os


def add_serve_parser(commands):
    """Adds `lavin serve` to the subcommands of `lavin`."""
    parser = commands.add_parser("serve", help="answer OpenAI's chat API, with images, for many clients at once")
    parser.add_argument("folder", metavar="DIR", help="a LaVIN folder or Hub name")
    parser.add_argument("--revision", metavar="REV")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="%(default)s; 0 for any free one")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("LAVIN_API_KEY"),
        metavar="KEY",
        help="wanted from every client; better given as LAVIN_API_KEY, where no list of processes shows it",
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="the folder's name by default")
    parser.add_argument("--device", metavar="DEVICE", help="a GPU where there is one, else cpu")
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or auto (the checkpoint's); bfloat16 on a GPU, else float32"
    )
    parser.add_argument(
        "--allowed-local-media-path", metavar="DIR", help="images may be `file://` URLs below it; none by default"
    )
    limits = parser.add_argument_group("limits")

    def limit(name: str, default, help: str, kind=int):
        limits.add_argument(name, type=kind, default=default, metavar="N", help=f"{help} (%(default)s)")

    limit("--max-batch-size", 32, "rows decoded together")
    limit("--max-batch-tokens", 32_768, "rows times their longest possible length: bounds the cache's memory")
    limit("--max-waiting", 64, "requests waiting for a place; more get 429")
    limits.add_argument("--max-context", type=int, metavar="N", help="tokens of prompt and answer (the model's own)")
    limits.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest answer in tokens where a request does not say (the model's generation config's, or 512)",
    )
    limit("--max-images", 8, "images in one request")
    limit("--max-image-bytes", 10 * 2**20, "of one image file")
    limit("--max-image-pixels", 40_000_000, "of all images of a request")
    limit("--max-body-bytes", 20 * 2**20, "of one request")
    limit("--timeout", 300.0, "seconds from a request's arrival to its end", float)
    limit("--grace", 30.0, "seconds that running requests get when the server is stopped", float)
    parser.set_defaults(run=run_serve)


def run_serve(**arguments):
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}. `lavin serve` needs the extra: pip install 'lavin[serve]'") from error
    from .server import serve

    serve(**arguments)
