"""
The test suites of the installed transformers and PEFT, taken from their source distributions.

They are downloaded through pip's own configuration, kept in a cache folder and imported from there; nothing of them is
copied into this repository. What the mixins import and the distributions leave out is put in its place here.
"""

import importlib
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from generation import GenerationTesterMixin


ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("LAVIN_CONFORMANCE_CACHE", ROOT / "outputs" / "conformance" / "cache"))
SUITES = ("transformers", "peft")
HELPER = "parameterized"  # what the suites themselves need, and nothing else here does


class IndexUnreachable(OSError):
    """The package index did not give what the suites need."""


def _pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INPUT": "1"})
    if result.returncode:
        reason = "\n".join((result.stdout + result.stderr).strip().splitlines()[-3:])
        raise IndexUnreachable(
            f"The test suites come from the package index, which did not answer `pip {arguments[0]}`:\n{reason}\n"
            f"Run this once where pip reaches an index; after that the cache ({CACHE}) serves."
        )


def folder_of(name: str) -> Path:
    """Where the tests of an installed package lie; its name is also their package's."""
    return CACHE / f"{name}-{version(name)}" / f"{name}_tests"


def fetch():
    """
    Downloads and unpacks what is not in the cache yet.

    Raises:
        `IndexUnreachable`: if pip cannot get it; the message has pip's own last lines.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (CACHE / "site" / HELPER).is_dir():
        _pip("install", "--no-deps", "--target", CACHE / "site", HELPER)
    for name in SUITES:
        folder, release = folder_of(name), f"{name}-{version(name)}"
        if folder.is_dir():
            continue
        archive = CACHE / f"{release}.tar.gz"
        if not archive.is_file():
            _pip("download", "--no-deps", "--no-binary", name, "--dest", CACHE, f"{name}=={version(name)}")
        partial = folder.with_suffix(".partial")
        prefix = f"{release}/tests/"
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if member.isfile() and member.name.startswith(prefix)]
            for member in members:
                member.name = member.name.removeprefix(prefix)
            tar.extractall(partial, members=members, filter="data")
        (partial / "__init__.py").touch()
        partial.rename(folder)


def _module(name: str, **contents):
    sys.modules[name] = module = ModuleType(name)
    module.__dict__.update(contents)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules.get(parent) or _module(parent), child, module)
    return module


def picture(url: str) -> str:
    """A small image on disk in place of one on the Hub; the same for the same address."""
    from PIL import Image

    path = CACHE / "pictures" / Path(url).name
    if path.suffix in (".png", ".jpg", ".jpeg") and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_mandelbrot((48, 32), (-2, -1, 1, 1), 40).convert("RGB").save(path)
    return str(path)


def load(name: str, module: str) -> ModuleType:
    """
    A module of a package's test suite.

    Args:
        name (`str`): `"transformers"` or `"peft"`.
        module (`str`): The module in its `tests/`, such as `"test_modeling_common"`.
    """
    package = f"{name}_tests"
    for path in (folder_of(name).parent, CACHE / "site"):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    importlib.import_module(package)
    if name == "transformers" and f"{package}.exporters" not in sys.modules:
        # Left out of the source distribution: the exporters' and the generation mixin, and helpers.
        _module(f"{package}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _module(f"{package}.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
        _module(f"{package}.utils.test_configuration_utils", config_common_kwargs=CONFIG_KWARGS)
        _module("fetch_hub_objects_for_ci", url_to_local_path=picture)
    if name == "peft" and "diffusers" not in sys.modules:
        # Imported for one `isinstance`; not a dependency of PEFT.
        _module("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))
    return importlib.import_module(f"{package}.{module}")


CONFIG_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
