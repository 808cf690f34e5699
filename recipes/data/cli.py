"""The parser of `lavin data`; what its commands import is imported when they run."""


def add_data_parser(commands):
    """Adds `lavin data` to the subcommands of `lavin`."""
    parser = commands.add_parser("data", help="prepare a data set for `trl sft`")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    del kinds
