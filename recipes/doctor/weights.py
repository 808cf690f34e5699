"""Weights: can they be read, are they finite, do they fit. Tensor by tensor, so that no model need fit into memory."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from lavin import MMAConfig
from lavin.adapters_lavin import set_adapter_weights
from lavin.files_lavin import ADAPTER_CONFIG, ADAPTER_NAME, ADAPTER_WEIGHTS, read_adapter
from lavin.recipes.doctor.folder import ADAPTER_AGAIN, Folder, base_again, local_file
from lavin.recipes.doctor.report import FAIL, OK, SKIP, Line, said
from lavin.recipes.init import meta_model


def check_adapter(folder: Folder) -> Iterator[Line]:
    """The adapter's values, and its names and shapes against the model that it is for."""
    config, weights = (folder.find(f"{ADAPTER_NAME}/{file}") for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    if weights is None or config is None:
        missing = "its files are missing (see above)" if weights or config else "there is none, as after `lavin init`"
        yield Line(SKIP, "adapter", missing)
        return
    try:
        shapes, bad = read_weights(weights)
        read_adapter(weights)  # compares its digest
    except (SafetensorError, OSError, ValueError) as error:
        yield Line(FAIL, "adapter", f"{ADAPTER_NAME}/{ADAPTER_WEIGHTS} cannot be read: {said(error)}", ADAPTER_AGAIN)
        return
    if bad:
        found = f"NaN or infinity in {len(bad)} of {len(shapes)} tensors: {bad[0]}"
        do = f"Training has diverged: go on from an earlier checkpoint with a lower learning rate. {ADAPTER_AGAIN}"
        yield Line(FAIL, "adapter", found, do)
    else:
        yield Line(OK, "adapter", f"{len(shapes)} tensors, all values finite")
    settings = MMAConfig.from_pretrained(folder.name, subfolder=ADAPTER_NAME)
    try:
        check_fit(folder, settings, shapes)
    except ValueError as error:
        do = (
            "Name the base that it was trained on in config.json, or take the config.json and "
            f"{ADAPTER_NAME}/{ADAPTER_CONFIG} that were saved with it."
        )
        yield Line(FAIL, "adapter fits", said(error), do)
        return
    yield Line(OK, "adapter fits", "every name and shape is that of this base")


def check_fit(folder: Folder, settings: MMAConfig, shapes: dict[str, tuple[int, ...]]):
    """
    Raises:
        `ValueError`: if an adapter of these names and shapes is not one of this model.
    """
    model = meta_model(folder.config, adapter=settings)
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    set_adapter_weights(model, weights, ADAPTER_NAME)


def read_weights(file: str | Path, bar: tqdm | None = None) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """
    Reads a safetensors file through.

    Args:
        file (`str` or `Path`): The file.
        bar (`tqdm`, *optional*): Told of every byte.

    Returns:
        `tuple`: the shape of each tensor, and the names of those that hold NaN or infinity.

    Raises:
        `SafetensorError`: if the file is cut off or no safetensors.
    """
    shapes, bad = {}, []
    with safe_open(str(file), framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118
            tensor = handle.get_tensor(name)
            shapes[name] = tuple(tensor.shape)
            values = tensor.float() if tensor.itemsize == 1 else tensor  # torch does not ask this of 8 bits
            if tensor.is_floating_point() and not values.isfinite().all():
                bad.append(name)
            if bar is not None:
                bar.update(tensor.nbytes)
    return shapes, bad


def check_base_weights(folder: Folder) -> Iterator[Line]:
    """The weights in a full folder, file by file; those of a repository only as far as they are in the cache."""
    index = folder.base_index()
    if not index:
        yield Line(SKIP, "base weights", "a light folder: they are those of the checkpoints it names")
        return
    here = {file: path for file in sorted(index) if (path := local_file(folder.name, None, file))}
    size, failed, count = sum(Path(path).stat().st_size for path in here.values()), False, 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="weights", leave=False, file=sys.stderr) as bar:
        for file, path in here.items():
            found, tensors = _examine_file(file, path, index[file], bar)
            count += tensors
            if found:
                failed = True
                bar.clear()
                yield Line(FAIL, "base weights", found, base_again(folder))
    if len(here) < len(index):
        yield Line(SKIP, "base weights", f"{len(index) - len(here)} of {len(index)} files are not here: not read")
    elif not failed:
        yield Line(OK, "base weights", f"{count} tensors, all values finite (files: {len(index)})")


def _examine_file(file: str, path: str, wanted: set[str] | None, bar: tqdm) -> tuple[str | None, int]:
    """What is wrong with a file of weights, and how many tensors it holds."""
    try:
        shapes, bad = read_weights(path, bar)
    except (SafetensorError, OSError) as error:
        return f"{file} cannot be read: {said(error)}", 0
    if missing := sorted((wanted or set()) - set(shapes)):
        return f"{file} lacks {missing[0]}, which the index places there ({len(missing)} in all)", len(shapes)
    if bad:
        return f"{file} holds NaN or infinity: {bad[0]} ({len(bad)} tensors)", len(shapes)
    return None, len(shapes)
