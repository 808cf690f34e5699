"""The parser of `lavin doctor`; what it imports is imported when it runs."""


def add_doctor_parser(commands):
    """Adds `lavin doctor` to the subcommands of `lavin`."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine, or a LaVIN folder",
        description="Checks this machine, or with --model a LaVIN folder: one line for each thing, and on a red one "
        "what to do. Exit code: 0 where nothing failed, else 1.",
        epilog="OK: fine. WARN: works, with a limit. FAIL: does not work. skip: not there, not needed or not checked.",
    )
    parser.add_argument(
        "--model", metavar="DIR", help="check this LaVIN folder or Hub name instead; no code in it is run"
    )
    parser.set_defaults(run=run_doctor)


def run_doctor(model: str | None = None) -> int:
    from .report import examine

    if model is not None:
        from .model import model_checks

        return examine(model_checks(model))
    from .machine import machine_checks

    with machine_checks() as checks:
        return examine(checks)
