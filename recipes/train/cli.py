"""The parser of `lavin train`; what its commands import is imported when they run."""


def add_train_parser(commands):
    """Adds `lavin train` to the subcommands of `lavin`."""
    parser = commands.add_parser("train", help="check a recipe, then train it with `trl sft`")
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="a recipe of `trl sft`")
