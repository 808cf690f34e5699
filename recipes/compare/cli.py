"""The parser of `lavin compare`; what its command imports is imported when it runs."""


def add_compare_parser(commands):
    """Adds `lavin compare` to the subcommands of `lavin`."""
    parser = commands.add_parser(
        "compare",
        help="train recipes on the same data for the same steps; one table and one chart",
        description="Trains MMA and its rivals on the quickstart's questions, each by the script that `trl sft` runs, "
        "in a process of its own, one after the other. Finished runs are kept: the same command goes on where it was "
        "stopped. To begin anew, remove the output folder.",
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE.yaml", help="those of this package, by default")
    parser.add_argument("--output", default="outputs/compare", metavar="DIR", help="default: outputs/compare")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each recipe (3)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="train for so many steps instead of the recipes'")
    parser.add_argument(
        "--search",
        action="store_true",
        help="look for learning rates instead: a third, once and three times each recipe's, and on where the best "
        "is at an edge; one seed, validation questions",
    )
    parser.set_defaults(run=run_compare)


def run_compare(**arguments):
    from .compare import compare

    compare(**arguments)
