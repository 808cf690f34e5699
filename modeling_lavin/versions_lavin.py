"""Which versions this code ran with: a folder on the Hub meets whatever its user has installed."""

from importlib.metadata import version

from packaging.version import Version
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The oldest and the newest minor version that the tests ran with.
RAN_WITH = {"torch": ("2.6", "2.15"), "transformers": ("5.18", "5.24"), "peft": ("0.21", "0.21")}


def check_versions():
    """Says in one line, once, which installed versions this code was never run with."""
    strange = []
    for name, (oldest, newest) in RAN_WITH.items():
        installed = Version(version(name))
        if not Version(oldest).release <= installed.release[:2] <= Version(newest).release:
            strange.append(f"{name} {installed} ({oldest} to {newest})")
    if strange:
        logger.warning_once(
            f"This LaVIN's code was never run with {', '.join(strange)}: should anything be wrong, install a version "
            "in this range."
        )
