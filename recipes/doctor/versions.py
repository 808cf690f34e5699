"""Installed versions against the ranges that were tested: those that `lavin` itself declares, no second list."""

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lavin.recipes.doctor.report import FAIL, OK, SKIP, Line


def check_versions() -> Iterator[Line]:
    """A line for Python and each package that LaVIN needs, and one for each extra."""
    declared = _declared()
    python, wanted = platform.python_version(), declared.metadata["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(python, prereleases=True):
        yield Line(OK, "python", f"{python} ({wanted})")
    else:
        yield Line(FAIL, "python", f"{python}, and LaVIN needs {wanted}", "Make an environment with such a Python.")
    requirements = [Requirement(text) for text in declared.requires or []]
    needed = [r for r in requirements if _applies(r, "")]
    for requirement in needed:
        version = _version(requirement.name)
        if version is None:
            yield Line(FAIL, requirement.name, "not installed", _install(requirement))
        else:
            yield _compare(requirement, version)
    for extra in declared.metadata.get_all("Provides-Extra") or []:
        own = [r for r in requirements if r not in needed and r.name != declared.name and _applies(r, extra)]
        yield from _check_extra(extra, own)


def _check_extra(extra: str, requirements: list[Requirement]) -> Iterator[Line]:
    """One line for an extra, and one for each of its packages that is there in another version."""
    lines = {r.name: _compare(r, version) for r in requirements if (version := _version(r.name)) is not None}
    yield from (line for line in lines.values() if line.status == FAIL)
    fine = ", ".join(f"{name} {line.found}" for name, line in lines.items() if line.status == OK)
    missing = ", ".join(r.name for r in requirements if r.name not in lines)
    if missing:
        yield Line(SKIP, f"extra {extra}", f"not installed: {missing}" + (f"; installed: {fine}" if fine else ""))
    elif fine:
        yield Line(OK, f"extra {extra}", fine)


def _compare(requirement: Requirement, version: str) -> Line:
    if requirement.specifier.contains(version, prereleases=True):
        tested = f" ({requirement.specifier})" if requirement.specifier else ""
        return Line(OK, requirement.name, version + tested)
    found = f"{version}, and LaVIN was tested with {requirement.specifier}"
    return Line(FAIL, requirement.name, found, _install(requirement))


def _install(requirement: Requirement) -> str:
    return (
        f'`pip install -c constraints.txt "{requirement.name}{requirement.specifier}"` in this environment '
        "(constraints.txt, in LaVIN's repository, has the versions that are tested together)."
    )


def _declared() -> metadata.Distribution:
    """`lavin` as installed. (A folder `lavin.egg-info` may lie before it on the path, with nothing in it.)"""
    found = [d for d in metadata.distributions(name="lavin") if d.requires]
    if not found:
        raise metadata.PackageNotFoundError("lavin")
    return found[0]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name) or None
    except metadata.PackageNotFoundError:
        return None
