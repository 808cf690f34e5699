"""The parser of `lavin train-segments`; what its command imports is imported when it runs."""


def add_segments_parser(commands):
    """Adds `lavin train-segments` to the subcommands of `lavin`."""
    parser = commands.add_parser(
        "train-segments",
        help="train a model in segments, each with parts, data and settings of its own",
        description="Checks all segments of a recipe, prints a plan, and runs `lavin train` on one after the other, "
        "from the segment and the checkpoint where an earlier try was.",
        epilog="Every other option of `trl sft` and `accelerate launch` may follow; it holds for all segments.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="`output_dir`, `common` and a list of `segments`")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and stop")
    parser.set_defaults(run=run_segments)


def run_segments(recipe: str, overrides: list[str], dry_run: bool) -> int:
    from .run import train_segments

    try:
        return train_segments(recipe, overrides, dry_run)
    except KeyboardInterrupt:  # while it checks
        return 130
