"""The command `lavin`: a thin layer over functions that can be imported as well."""

import argparse
import sys

from .compare.cli import add_compare_parser
from .data.cli import add_data_parser
from .doctor.cli import add_doctor_parser
from .evaluate.cli import add_eval_parser
from .segments.cli import add_segments_parser
from .serve.cli import add_serve_parser
from .train.cli import add_train_parser


def main(argv: list[str] | None = None) -> int:
    """
    Runs one subcommand.

    Returns:
        `int`: 0; 2 after bad input, whose cause is printed without a traceback; of `lavin train`, that of the run.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["quickstart"]:  # it has a parser of its own
        from .quickstart.quickstart import main as quickstart

        quickstart(argv[1:])
        return 0
    parser = build_parser()
    options, unknown = parser.parse_known_args(argv)
    arguments = vars(options)
    command, run = arguments.pop("command"), arguments.pop("run")
    if command in ("train", "train-segments"):  # what they do not know is for TRL
        arguments["overrides"] = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    from safetensors import SafetensorError

    try:
        return run(**arguments) or 0
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        print(f"lavin {command}: error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; what they import is imported when they run."""
    parser = argparse.ArgumentParser(prog="lavin", description="Teach a frozen language model to see.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="write a LaVIN folder from a vision tower and a language model")
    init.add_argument("--vision", required=True, metavar="NAME", help="CLIP or SigLIP: Hub name or folder")
    init.add_argument("--text", required=True, metavar="NAME", help="decoder-only language model: Hub name or folder")
    init.add_argument(
        "--projector-type",
        choices=("taps", "pool", "taps_pool"),
        help="what image tokens are made of: class tokens (taps, the default), cells of patches (pool), or both",
    )
    init.add_argument("--projector-hidden-size", type=int, metavar="N", help="of the taps; 128 by default")
    init.add_argument(
        "--image-order",
        choices=("first", "interleaved"),
        default="first",
        help="a turn's images before its text (first), or where the messages have them (interleaved)",
    )
    _folder_options(init)
    init.set_defaults(run=run_init)

    convert = commands.add_parser(
        "convert", help="read an adapter of the reference implementation, or InfMLLM's pool-adapter"
    )
    convert.add_argument("checkpoint", metavar="CHECKPOINT.pth")
    convert.add_argument(
        "--text-model", required=True, metavar="DIR", help="LLaMA in transformers' format, or Hub name"
    )
    convert.add_argument("--vision-model", required=True, metavar="DIR", help="CLIP ViT-L/14: folder or Hub name")
    _folder_options(convert)
    stored = convert.add_argument_group("hyper-parameters", "by default those that the checkpoint stores or shows")
    for name in ("--adapter-dim", "--hidden-proj", "--groups"):
        stored.add_argument(name, type=int, metavar="N")
    for name in ("--adapter-scale", "--temperature"):
        stored.add_argument(name, type=float, metavar="X")
    stored.add_argument("--adapter-type", choices=("attn", "block"))
    stored.add_argument("--visual-adapter-type", choices=("router", "router_block", "normal"))
    convert.set_defaults(run=run_convert)

    add_data_parser(commands)
    add_train_parser(commands)
    add_segments_parser(commands)
    add_eval_parser(commands)

    card = commands.add_parser("card", help="write LaVIN's card over a trainer's")
    card.add_argument("folder", metavar="DIR")
    card.add_argument("--push", metavar="REPO", help="replace README.md and results of this Hub repository")
    card.add_argument("--results", nargs="+", metavar="FILE", help="put these results.json of `lavin eval` into it")
    card.set_defaults(run=run_card)

    ask = commands.add_parser("ask", help="ask one question")
    ask.add_argument("folder", metavar="DIR", help="a LaVIN folder or Hub name")
    ask.add_argument("question")
    ask.add_argument("--image", action="append", dest="images", metavar="FILE", help="may be given several times")
    ask.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    ask.add_argument("--device", metavar="DEVICE", help="the GPU where there is one, by default")
    ask.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the frozen towers; bfloat16 on a GPU and float32 on a CPU, by default",
    )
    ask.set_defaults(run=run_ask)

    export = commands.add_parser("export", help="fold the adapter into plain language models for other engines")
    export.add_argument("model", metavar="DIR", help="a LaVIN folder or Hub name")
    export.add_argument("--modality", choices=("text", "image", "both"), default="both")
    export.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    export.add_argument("--revision", metavar="REV")
    export.set_defaults(run=run_export)

    add_compare_parser(commands)
    add_serve_parser(commands)
    add_doctor_parser(commands)

    commands.add_parser("quickstart", help="train and test a tiny LaVIN on this machine (`quickstart --help`)")
    return parser


def _folder_options(parser: argparse.ArgumentParser):
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--full", action="store_true", help="write the base weights too, not only where they are")
    parser.add_argument("--vision-revision", metavar="REV")
    parser.add_argument("--text-revision", metavar="REV")
    parser.add_argument(
        "--vision-feature-layers", type=int, nargs="+", metavar="N", help="blocks to read; every fourth by default"
    )
    parser.add_argument(
        "--pool-size", type=int, metavar="P", help="P x P cells of patches are image tokens (pool); 16 by default"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="pixels on each side of an image; the vision tower's by default"
    )
    parser.add_argument(
        "--preprocessing", choices=("lavin", "clip"), default="lavin", help="images squashed (lavin) or cropped (clip)"
    )


def run_init(**arguments):
    from .init import init_folder

    print(f"Wrote {init_folder(**arguments)}. Train it: trl sft with `model_init_kwargs: {{mma: {{}}}}`.")


def run_convert(**arguments):
    from .convert import convert_checkpoint

    folder, with_processor = convert_checkpoint(**arguments)
    print(f"Wrote {folder}.")
    if not with_processor:
        print(f"No processor was written: {arguments['text_model']} has no tokenizer.")


def run_card(**arguments):
    from .card import card_folder

    print(f"Wrote {card_folder(**arguments)}.")
    if arguments["push"]:
        print(f"Pushed it to {arguments['push']}.")


def run_export(**arguments):
    from .export import export_folder

    for modality, found in export_folder(**arguments).items():
        print(
            f"Wrote {arguments['output']}/{modality}: largest difference of a logit {found['largest_difference']:.2g} "
            f"(largest logit {found['largest_logit']:.3g}, {found['dtype']}), likeliest next token the same at "
            f"{100 * found['same_next_token']:.2f}% of {found['positions']} positions."
        )


def run_ask(**arguments):
    from .ask import ask

    print(ask(**arguments))


if __name__ == "__main__":
    sys.exit(main())
