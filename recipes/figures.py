"""Pictures: the loss curve and the routing table."""

import json
from pathlib import Path

import torch


def read_losses(folder: str | Path) -> list[tuple[int, float]]:
    """Reads step and loss from the newest checkpoint's `trainer_state.json` in a training's output folder."""
    states = sorted(Path(folder).glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    if not states:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint-*/trainer_state.json: the training saved no checkpoint."
        )
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_loss(losses: list[tuple[int, float]], path: str | Path, title: str = "MMA fine-tuning of the tiny LaVIN"):
    """Saves the training loss as a PNG, on a logarithmic scale."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot(*zip(*losses, strict=True), color="#2f6f4f", linewidth=1.2)
    axis.set(yscale="log", xlabel="step", ylabel="loss", title=title)
    axis.grid(alpha=0.3, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_routing(table: torch.Tensor, path: str | Path):
    """
    Saves the routing table as a PNG: how much of the first expert each modality uses in each layer.

    Args:
        table (`torch.Tensor` of shape `(layers, 2, 2)`): Expert weights by layer and modality (text, image).
        path (`str` or `Path`): The file to write.
    """
    plt = pyplot()
    first = table[:, :, 0].detach().float().T.numpy()
    figure, axis = plt.subplots(figsize=(1.6 + 0.9 * first.shape[1], 2.4), layout="constrained")
    picture = axis.imshow(first, cmap="BrBG", vmin=0, vmax=1, aspect="auto")
    for row, column in ((r, c) for r in range(first.shape[0]) for c in range(first.shape[1])):
        value = first[row, column]
        axis.text(
            column, row, f"{value:.2f}", ha="center", va="center", color="white" if abs(value - 0.5) > 0.3 else "black"
        )
    axis.set_yticks([0, 1], ["text", "image"])
    axis.set_xticks(range(first.shape[1]), [str(layer + 1) for layer in range(first.shape[1])])
    axis.set(xlabel="layer of the language model", title="Routing: weight of the first expert")
    figure.colorbar(picture, ax=axis)
    figure.savefig(path, dpi=150)
    plt.close(figure)
