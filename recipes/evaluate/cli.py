"""The parser of `lavin eval`; what its commands import is imported when they run."""


def add_eval_parser(commands):
    """Adds `lavin eval` to the subcommands of `lavin`."""
    parser = commands.add_parser("eval", help="ask a benchmark's questions and score the answers")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    del kinds
