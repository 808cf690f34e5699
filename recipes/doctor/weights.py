"""Weights: can they be read, are they finite, do they fit. Tensor by tensor, so that no model need fit into memory."""

import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from lavin import MMAConfig
from lavin.adapters_lavin import set_adapter_weights
from lavin.files_lavin import ADAPTER_CONFIG, ADAPTER_NAME, ADAPTER_WEIGHTS, read_adapter

from ..init import meta_model
from .folder import ADAPTER_AGAIN, Folder, local_file
from .report import FAIL, OK, SKIP, Finding, Line, said


FIT_AGAIN = (
    "Name the base that it was trained on in config.json, or take the config.json and "
    f"{ADAPTER_NAME}/{ADAPTER_CONFIG} that were saved with it."
)


def check_adapter(folder: Folder) -> Iterator[Line]:
    """The adapter's values, and its names and shapes against the model that it is for."""
    config, weights = (folder.find(f"{ADAPTER_NAME}/{file}") for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    if weights is None or config is None:
        missing = "its files are missing (see above)" if weights or config else "there is none, as after `lavin init`"
        raise Finding(SKIP, missing)
    tensors = read_adapter(weights)
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        do = f"Training has diverged: go on from an earlier checkpoint with a lower learning rate. {ADAPTER_AGAIN}"
        yield Line(FAIL, "adapter", f"NaN or infinity in {len(bad)} of {len(tensors)} tensors: {bad[0]}", do)
    else:
        yield Line(OK, "adapter", f"{len(tensors)} tensors, all values finite")
    try:
        model = meta_model(folder.config, adapter=MMAConfig.from_pretrained(folder.name, subfolder=ADAPTER_NAME))
        set_adapter_weights(model, {name: value.to("meta") for name, value in tensors.items()}, ADAPTER_NAME)
    except ValueError as error:
        raise Finding(FAIL, f"it does not fit: {said(error)}", FIT_AGAIN) from error


def check_base_weights(folder: Folder) -> Iterator[Line]:
    """The weights in a full folder, file by file; those of a repository only as far as they are in the cache."""
    index = folder.base_index()
    if not index:
        raise Finding(SKIP, "a light folder: they are those of the checkpoints it names")
    here = {file: path for file in sorted(index) if (path := local_file(folder.name, None, file))}
    size, failed, count = sum(Path(path).stat().st_size for path in here.values()), False, 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="weights", leave=False, file=sys.stderr) as bar:
        for file, path in here.items():
            found, tensors = _examine_file(file, path, index[file] or set(), bar)
            count += tensors
            if found:
                failed = True
                bar.clear()
                yield Line(FAIL, "base weights", found, folder.base_again())
    if len(here) < len(index):
        yield Line(SKIP, "base weights", f"{len(index) - len(here)} of {len(index)} files are not here: not read")
    elif not failed:
        yield Line(OK, "base weights", f"{count} tensors, all values finite (files: {len(index)})")


def _examine_file(file: str, path: str, wanted: set[str], bar: tqdm) -> tuple[str | None, int]:
    """What is wrong with a file of weights, and how many tensors it holds."""
    names, bad = set(), []
    try:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                names.add(name)
                values = tensor.float() if tensor.itemsize == 1 else tensor  # torch does not ask this of 8 bits
                if tensor.is_floating_point() and not values.isfinite().all():
                    bad.append(name)
                bar.update(tensor.nbytes)
    except (SafetensorError, OSError) as error:
        return f"{file} cannot be read: {said(error)}", 0
    if missing := sorted(wanted - names):
        return f"{file} lacks {missing[0]}, which the index places there ({len(missing)} in all)", len(names)
    if bad:
        return f"{file} holds NaN or infinity: {bad[0]} ({len(bad)} tensors)", len(names)
    return None, len(names)
