"""The parser of `lavin train`; what its commands import is imported when they run."""


def add_train_parser(commands):
    """Adds `lavin train` to the subcommands of `lavin`."""
    parser = commands.add_parser(
        "train",
        help="check a recipe, then train it with `trl sft`",
        description="Checks a recipe and its rows, then runs unmodified `trl sft` on it, from the newest whole "
        "checkpoint in its `output_dir` if there is one.",
        epilog="Every other option of `trl sft` and `accelerate launch` may follow, such as `--max_steps 100`.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="a recipe of `trl sft`")
    parser.add_argument("--accelerate_config", metavar="FILE.yaml", help="processes, DDP or ZeRO, as accelerate takes")
    parser.set_defaults(run=run_train)


def run_train(config: str, overrides: list[str], accelerate_config: str | None = None) -> int:
    from .train import train

    before = ["--accelerate_config", accelerate_config] if accelerate_config else []
    try:
        return train(config, before + overrides)
    except KeyboardInterrupt:  # while it checks
        return 130
