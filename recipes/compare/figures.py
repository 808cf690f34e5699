"""The comparison's chart."""

import statistics
from pathlib import Path

from ..figures import pyplot


COLOURS = {"IMG": "#b3541e", "TXT": "#8a8a8a", "NO": "#c9b458", "AVG": "#2f6f4f"}


def plot(results: dict[str, list[dict]], path: Path):
    """
    Saves the chart: each recipe's scores with its seeds; beside it, scores and text ability over what was trained.

    Args:
        results (`dict`): The results of each recipe, a list over its seeds.
        path (`Path`): The PNG to write.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(3, 2))
    width = 0.8 / len(COLOURS)
    for i, (column, colour) in enumerate(COLOURS.items()):
        for place, some in enumerate(results.values()):
            values, x = [result["scores"][column] for result in some], place + (i - 1.5) * width
            axes[0].bar(x, statistics.mean(values), width, color=colour, label=column if place == 0 else None)
            axes[0].plot([x] * len(values), values, "k.", markersize=3)
    axes[0].set_xticks(range(len(results)), [name.replace(", ", ",\n") for name in results], rotation=30, ha="right")
    axes[0].legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    trained = {name: some for name, some in results.items() if some[0]["trained"]}
    for name, some in trained.items():
        x, y = some[0]["trained"], statistics.mean(result["scores"]["AVG"] for result in some)
        axes[1].plot(x, y, "o", color=COLOURS["AVG"], label="AVG" if name == next(iter(trained)) else None)
        kept = statistics.mean(result["text"]["skill"] for result in some)
        axes[1].plot(x, kept, "s", color="#4a6fa5", label="text ability" if name == next(iter(trained)) else None)
        axes[1].annotate(name, (x, y), fontsize=8, xytext=(4, -9), textcoords="offset points")
    axes[1].set(xscale="log", xlabel="trained parameters")
    axes[1].margins(x=0.2)
    axes[1].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.set_ylabel("percent right")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
