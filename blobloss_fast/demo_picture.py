"""The picture of the demo: who gets the gradient, under Dice, blob loss and CC loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .demo import Measured
    from .demo_volume import Volume

# Okabe and Ito: told apart with any colour vision, and in grey.
DICE_COLOUR, BLOB_COLOUR, CC_COLOUR = "#0072B2", "#D55E00", "#009E73"
OTHERS_COLOUR, LARGEST_COLOUR, BACKGROUND_COLOUR = "#E69F00", "#404040", "#D0D0D0"
DECADES = 3  # of the gradient maps' colour scale, down from the brightest voxel
LOSSES = {"dice": "plain Dice", "blob": "blob loss", "cc": "CC loss"}
TITLE = {"fontsize": 14, "fontweight": "bold", "loc": "left"}


def draw(volume: Volume, ids: NDArray[Any], found: Measured, picture: Path) -> None:
    """Writes the PNG, 1400 pixels wide."""
    engine = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.0, hspace=0.02)
    figure = Figure(figsize=(14, 9.6), dpi=100, layout=engine, facecolor="white")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.12])
    upper, lower = halves
    maps = upper.subplots(1, 4)
    scatter, bars = lower.subplots(1, 2, width_ratios=[1.7, 1])

    largest = int(found.voxels.argmax())
    number = len(found.ids)
    others = {name: 1 - share[largest] / share.sum() for name, share in found.shares.items()}
    message = (
        f"{number - 1} of {number} lesions share {others['dice']:.0%} of the lesion gradient under Dice, "
        f"{others['blob']:.0%} under blob loss, {others['cc']:.0%} under CC loss"
    )
    figure.suptitle(
        message if number > 1 else "A single lesion: nothing for blob loss to balance", fontsize=17, fontweight="bold"
    )
    figure.supxlabel(
        "Blob and CC loss: the instances' term alone (main_weight=0). Prediction: a stand-in made from the "
        f"{'label' if volume.image is None else 'image'}, not a network.",
        fontsize=11,
        color="#505050",
    )
    draw_maps(upper, maps, volume, ids, found)
    draw_scatter(scatter, found)
    draw_bars(bars, found, largest)
    figure.savefig(picture)


def draw_maps(figure: Any, panels: Any, volume: Volume, ids: NDArray[Any], found: Measured) -> None:
    cut = busiest_slice(ids)
    shown = ids[cut].T
    how: dict[str, Any] = {
        "origin": "lower",
        "aspect": volume.spacing[1] / volume.spacing[0],
        "interpolation": "nearest",
    }
    inside = shown > 0
    image = (volume.label if volume.image is None else volume.image)[cut].T.astype(float)
    white = image.min() + 1.15 * np.ptp(image)  # leaves the brightest tissue grey, under the colours
    panels[0].imshow(image, **{**how, "interpolation": "bilinear"}, cmap="gray", vmin=image.min(), vmax=white)
    loss = np.full(shown.shape, np.nan)
    loss[inside] = found.losses[np.searchsorted(found.ids, shown[inside])]
    drawn = panels[0].imshow(loss, cmap="viridis", vmin=0, vmax=1, **how)
    figure.colorbar(drawn, ax=panels[0], location="bottom", shrink=0.95, pad=0.02, label="blob Dice loss of the lesion")
    panels[0].set_title(f"Dice {found.main:.2f}, per lesion {found.blob:.2f}", **TITLE)

    shares = {name: found.gradients[name] / found.gradients[name].sum() for name in LOSSES}
    top = max(float(share.max()) for share in shares.values())
    floor = top / 10**DECADES
    norm = LogNorm(vmin=floor, vmax=top)
    for panel, name in zip(panels[1:], LOSSES, strict=True):
        clipped = np.maximum(shares[name][cut].T, floor)
        drawn = panel.imshow(clipped, cmap="inferno", norm=norm, **how)
        panel.contour(inside.astype(float), [0.5], colors="white", linewidths=0.6, alpha=0.7)
        panel.set_title(f"{LOSSES[name][0].upper()}{LOSSES[name][1:]}: |gradient|", **TITLE)
    draw_borders(panels[3], found.zones[cut].T)
    figure.colorbar(
        drawn,
        ax=list(panels[1:]),
        location="bottom",
        shrink=0.95,
        pad=0.02,
        aspect=60,
        extend="min",
        label="voxel's share of the |gradient| of the volume (one log scale, clipped below); white: lesions; "
        "lines: borders of their zones",
    )
    xlim, ylim = window(inside)
    for panel in panels:
        panel.set(xticks=[], yticks=[], xlim=xlim, ylim=ylim)


def draw_borders(panel: Any, zones: NDArray[Any]) -> None:
    """Lines between voxels of different zones."""
    across, along = zones[:, 1:] != zones[:, :-1], zones[1:] != zones[:-1]
    y, x = np.nonzero(across)
    panel.vlines(x + 0.5, y - 0.5, y + 0.5, colors="#56B4E9", linewidth=0.8)
    y, x = np.nonzero(along)
    panel.hlines(y + 0.5, x - 0.5, x + 0.5, colors="#56B4E9", linewidth=0.8)


def window(inside: NDArray[Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    """A square around the lesions, as far as the slice goes: in a whole slice, small lesions are a few pixels."""
    spans = [(positions.min(), positions.max()) for positions in np.nonzero(inside)]
    half = max(0.62 * max(last - first for first, last in spans), 12)
    y, x = (
        (max((first + last) / 2 - half, 0) - 0.5, min((first + last) / 2 + half, size - 1) + 0.5)
        for (first, last), size in zip(spans, inside.shape, strict=True)
    )
    return x, y


def busiest_slice(ids: NDArray[Any]) -> Any:
    """Index of the slice along the last axis that holds the most lesions (2D: everything)."""
    if ids.ndim == 2:
        return slice(None), slice(None)
    lesions = [len(np.unique(ids[..., z])) for z in range(ids.shape[-1])]
    voxels = [np.count_nonzero(ids[..., z]) for z in range(ids.shape[-1])]
    return slice(None), slice(None), max(range(ids.shape[-1]), key=lambda z: (lesions[z], voxels[z]))


def draw_scatter(panel: Any, found: Measured) -> None:
    for name, colour, marker, label in (
        ("dice", DICE_COLOUR, "o", "under plain Dice"),
        ("blob", BLOB_COLOUR, "^", "under blob loss"),
        ("cc", CC_COLOUR, "v", "under CC loss"),
    ):
        seen = found.shares[name] > 0
        panel.scatter(
            found.voxels[seen], found.shares[name][seen], s=55, c=colour, marker=marker, alpha=0.75, lw=0, label=label
        )
    under_dice = found.shares["dice"]
    seen = under_dice > 0
    blob, cc = (np.median(found.shares[name][seen] / under_dice[seen]) for name in ("blob", "cc"))
    panel.set_title(f"Median lesion's share against Dice: blob x {times(blob)}, CC x {times(cc)}", **TITLE)
    panel.set(xscale="log", yscale="log")
    panel.set_xlabel("lesion size (voxels)", fontsize=12)
    panel.set_ylabel("lesion's share of the |gradient|", fontsize=12)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    panel.tick_params(labelsize=11)
    panel.grid(alpha=0.3, linewidth=0.6)
    panel.legend(fontsize=12, frameon=False, loc="upper left")
    panel.spines[["top", "right"]].set_visible(False)


def times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.2g}"


def draw_bars(panel: Any, found: Measured, largest: int) -> None:
    number = len(found.ids)
    for x, name in enumerate(LOSSES):
        share = found.shares[name]
        parts = (
            (share.sum() - share[largest], OTHERS_COLOUR, f"{number - 1} other lesions" if number > 1 else ""),
            (share[largest], LARGEST_COLOUR, "largest lesion"),
            (found.background[name], BACKGROUND_COLOUR, "background"),
        )
        below, last_text = 0.0, -1.0
        for height, colour, label in parts:
            panel.bar(x, height, bottom=below, color=colour, width=0.66, edgecolor="white")
            middle = below + height / 2
            if height > 0.035:
                ink = "white" if colour == LARGEST_COLOUR else "black"
                panel.text(x, middle, f"{height:.0%}", ha="center", va="center", color=ink, fontsize=13)
            if x == len(LOSSES) - 1 and label:
                last_text = max(middle, last_text + 0.06)  # thin parts: no text over another
                panel.text(x + 0.4, last_text, label, ha="left", va="center", fontsize=12)
            below += height
    panel.set_title("Who gets the gradient", **TITLE)
    panel.set(xlim=(-0.4, len(LOSSES) + 0.25), ylim=(0, 1), yticks=[])
    panel.set_xticks(range(len(LOSSES)), list(LOSSES.values()), fontsize=12)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
