"""Installed versions against the ranges that were tested: those that `lavin` itself declares, no second list."""

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .report import FAIL, OK, SKIP, Line


def check_versions() -> Iterator[Line]:
    """A line for Python and each package that LaVIN needs, and one for each extra."""
    # (A folder `lavin.egg-info` may lie before the installed one on the path, with nothing in it.)
    declared = next(found for found in metadata.distributions(name="lavin") if found.requires)
    python, wanted = platform.python_version(), declared.metadata["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(python, prereleases=True):
        yield Line(OK, "python", f"{python} ({wanted})")
    else:
        yield Line(FAIL, "python", f"{python}, and LaVIN needs {wanted}", "Make an environment with such a Python.")
    requirements = [Requirement(text) for text in declared.requires]
    needed = [r for r in requirements if _applies(r, "")]
    yield from map(_compare, needed)
    for extra in declared.metadata.get_all("Provides-Extra") or []:
        own = [r for r in requirements if r not in needed and r.name != declared.name and _applies(r, extra)]
        lines = [_compare(r) for r in own]
        missing = ", ".join(line.name for line in lines if line.found == MISSING)
        if lines and lines[0].found != MISSING:  # without its first package an extra is not in use here
            yield from (line for line in lines if line.status == FAIL and line.found != MISSING)
        fine = ", ".join(f"{line.name} {line.found}" for line in lines if line.status == OK)
        if missing:
            yield Line(SKIP, f"extra {extra}", f"not installed: {missing}" + (f"; installed: {fine}" if fine else ""))
        elif fine:
            yield Line(OK, f"extra {extra}", fine)


MISSING = "not installed"


def _compare(requirement: Requirement) -> Line:
    name, wanted = requirement.name, requirement.specifier
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    if version and wanted.contains(version, prereleases=True):
        return Line(OK, name, version + (f" ({wanted})" if wanted else ""))
    do = f'`pip install -c constraints.txt "{name}{wanted}"` in this environment (constraints.txt, in LaVIN\'s '
    do += "repository, has the versions that are tested together)."
    return Line(FAIL, name, f"{version}, and LaVIN was tested with {wanted}" if version else MISSING, do)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
