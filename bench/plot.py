"""The picture of the measured times, docs/bench_cpu.png, from bench/results/cpu.json: `python -m bench.plot`.

Needs matplotlib: `pip install ".[demo]"`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.contestants import CONTESTANTS
from bench.ratios import BYTES_PER_VOXEL
from bench.report import HEADLINE_SIZE, setting_name

ROOT = Path(__file__).resolve().parents[1]

# Colours of Okabe and Ito, which colour-blind people can tell apart.
COLOURS = {
    "loop": "#d55e00",
    "scatter_add": "#e69f00",
    "reference": "#009e73",
    "monai_dice": "#8c8c8c",
    "ours": "#0072b2",
}


def curves(setting: Mapping[str, Any], size: int) -> dict[str, tuple[list[int], list[float]]]:
    """For each contestant the numbers of balls that were timed, and the median times in ms."""
    volumes = [volume for volume in setting["volumes"] if volume["size"] == size and volume["scene"].isdigit()]
    volumes.sort(key=lambda volume: volume["instances"])
    found = {}
    for key in COLOURS:
        timed = [volume for volume in volumes if key in volume["median_ms"]]
        if timed:
            found[key] = [v["instances"] for v in timed], [v["median_ms"][key] for v in timed]
    return found


def spread(heights: Sequence[float], least: float) -> list[float]:
    """The positions of labels, in the same order, moved apart until neighbours are `least` from each other."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for _ in range(200):
        for low, high in itertools.pairwise(order):
            missing = least - (placed[high] - placed[low])
            if missing > 1e-9:
                placed[low] -= missing / 2
                placed[high] += missing / 2
    return placed


def draw(results: Mapping[str, Any], size: int, file: Path) -> None:
    setting = results["settings"][0]
    lines = curves(setting, size)
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for key, (counts, ms) in lines.items():
        ours = key == "ours"
        axes.plot(
            counts,
            ms,
            color=COLOURS[key],
            marker="o",
            markersize=7 if ours else 5,
            linewidth=2.8 if ours else 1.8,
            zorder=3 if ours else 2,
        )
    floor = size**3 * BYTES_PER_VOXEL / setting["copy_gb_per_s"] / 1e6
    axes.axhline(floor, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    counts = sorted({count for xs, _ in lines.values() for count in xs})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
    axes.set_xlabel(f"instances in a volume of {size}³ voxels")
    axes.set_ylabel("forward + backward, ms")
    machine = results["machine"]
    axes.set_title(f"{machine['cpu']}, {setting_name(setting)}, fp32", loc="left", fontsize=10, color="#444444")
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, lines, counts[-1], floor)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _label_ends(axes: Axes, lines: Mapping[str, tuple[list[int], list[float]]], last: int, floor: float) -> None:
    """Names beside the last points, in the colours of their lines; a line that ends early is named where it ends."""
    low, high = axes.get_ylim()
    full = [key for key, (counts, _) in lines.items() if counts[-1] == last]
    names = [*(CONTESTANTS[key].title for key in full), "speed of a copy"]
    colours = [*(COLOURS[key] for key in full), "#444444"]
    heights = [math.log(value / low) / math.log(high / low) for value in [*(lines[key][1][-1] for key in full), floor]]
    for name, colour, height in zip(names, colours, spread(heights, 0.065), strict=True):
        axes.text(
            1.015, height, name, color=colour, transform=axes.transAxes, va="center",
            fontweight="bold" if name == CONTESTANTS["ours"].title else "normal",
        )  # fmt: skip
    for key, (counts, ms) in lines.items():
        if key not in full:
            axes.annotate(
                f"{CONTESTANTS[key].title}, as far as its graph fits into memory", (counts[-1], ms[-1]), xytext=(10, 0),
                textcoords="offset points", color=COLOURS[key], va="center",
            )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "cpu.json", metavar="FILE")
    parser.add_argument("--size", type=int, default=HEADLINE_SIZE, metavar="N", help="edge length of the volumes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench_cpu.png", metavar="FILE")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text(encoding="utf-8"))
    if not results.get("settings") or not curves(results["settings"][0], options.size):
        parser.error(f"{options.results} has no synthetic volumes of {options.size}^3: run python -m bench.table")
    draw(results, options.size, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
