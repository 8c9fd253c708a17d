"""`blobloss-fast`: what blob loss changes on a volume with lesions, and what it costs; one table and one picture.

Reading order: main, run, stand_in, measure, loop_loss, compare, print_report. demo_volume reads files, demo_picture
draws.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import BlobLoss, CCLoss, connected_components, nearest_instance
from .demo_volume import DemoError, Volume, read_volume

try:
    import rich.box
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress
    from rich.table import Table
    from scipy import ndimage

    from .demo_picture import draw

    MISSING_EXTRA = ""
except ModuleNotFoundError as error:
    MISSING_EXTRA = (error.name or "an extra").split(".")[0]

PICTURE = "blobloss_fast_demo.png"
CREDIT = (
    "Sample volume: Lesjak et al., Neuroinformatics 2017, doi 10.1007/s12021-017-9348-7; Laboratory of Imaging "
    "Technologies, Ljubljana; CC-BY; cropped."
)
ROWS = 8  # lesions shown at either end of a long table
LOGIT_LIMIT = 8.0  # the stand-in is never surer than p = 0.9997


@dataclass(frozen=True)
class Measured:
    """Per lesion (in the order of `ids`) and per volume; every share is of the sum of |gradient| over all voxels."""

    ids: NDArray[Any]
    voxels: NDArray[Any]
    losses: NDArray[Any]
    main: float
    blob: float
    zones: NDArray[Any]  # of the lesions, shape of the volume
    gradients: dict[str, NDArray[Any]]  # "dice", "blob", "cc", "both" (Dice + blob): |gradient|, shape of the volume
    shares: dict[str, NDArray[Any]]
    background: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status (2: something the user can put right)."""
    parser = argparse.ArgumentParser(
        prog="blobloss-fast",
        description="What blob loss changes on a volume with lesions, and what it costs: one table and one picture.",
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        type=Path,
        help="an .npz with `image` and `label` (optional: `instances`, `spacing`) or a NIfTI label (.nii, .nii.gz); "
        "without FILE: real lesions that come with the package",
    )
    parser.add_argument("--image", type=Path, help="NIfTI image that belongs to a NIfTI label")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help=f"folder for {PICTURE} (default: here)")
    parser.add_argument("--device", default="cpu", help="torch device to run and time on (default: cpu)")
    arguments = parser.parse_args(argv)
    try:
        if MISSING_EXTRA:
            raise DemoError(f'the demo needs {MISSING_EXTRA}: pip install "blobloss_fast[demo]"')
        run(arguments.file, arguments.image, arguments.out, arguments.device)
    except DemoError as error:
        sys.stderr.write(f"blobloss-fast: {' '.join(str(error).split())}\n")
        return 2
    return 0


def run(file: Path | None, image: Path | None, out: Path, device_name: str) -> None:
    device = check_device(device_name)
    check_folder(out)
    volume = read_volume(file, image)
    console = Console(highlight=False, soft_wrap=True)
    on_screen = Console(stderr=True)
    with Progress(console=on_screen, transient=True, disable=not on_screen.is_terminal) as progress:
        with step(progress, "stand-in prediction"):
            logits, how = stand_in(volume)
        x = torch.from_numpy(logits).to(device)[None, None]
        target = torch.from_numpy(volume.label.astype(np.float32)).to(device)[None, None]
        with step(progress, "lesions and their gradients"):
            if volume.instances is None:
                ids = connected_components(target)[0]
            else:
                ids = torch.from_numpy(volume.instances.astype(np.int64)).to(device)[None, None]
            found = measure(x, target, ids, volume.spacing)
        times, agreement = compare(x, target, ids, found.ids.tolist(), progress)
        picture = out / PICTURE
        with step(progress, "picture"):
            try:
                draw(volume, ids[0, 0].cpu().numpy(), found, picture)
            except OSError as error:
                raise DemoError(f"{picture}: expected a file that can be written ({error.strerror or error})") from None
    print_report(console, volume, how, found, times, agreement, device)
    console.print(f"Picture: {picture}")
    if file is None:
        console.print(CREDIT)


@contextmanager
def step(progress: Progress, what: str) -> Iterator[None]:
    task = progress.add_task(what, total=None)
    yield
    progress.update(task, total=1, completed=1)


def check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch asserts where CUDA is not compiled in
        first_line = str(error).splitlines()[0] if str(error) else "not available"
        raise DemoError(f"--device {name}: expected a device that this torch can use ({first_line})") from None
    return device


def check_folder(out: Path) -> None:
    """Before any work: a demo that computes for a minute and then cannot write is a bad demo."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DemoError(f"--out {out}: expected a folder that can be written ({error.strerror or error})") from None


def stand_in(volume: Volume) -> tuple[NDArray[np.float32], str]:
    """Logits in place of a network's, the same in every run, and what they are in words."""
    if volume.image is not None:
        smooth = ndimage.gaussian_filter(volume.image.astype(np.float32), 0.8)
        inside = volume.image != volume.image.min()
        if smooth[volume.label].mean() < smooth[inside].mean():
            smooth = -smooth  # dark lesions
        z = (smooth - smooth[inside].mean()) / max(smooth[inside].std(), 1e-6)
        bright = max(1, int(volume.label.sum()) // 2)
        logits = 10 * (z - np.partition(z, z.size - bright, axis=None)[z.size - bright])
        how = "smoothed z-score of the image, cut where half as many voxels as the label has are above p = 0.5"
    else:
        noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(volume.label.shape), 2)
        blurred = ndimage.gaussian_filter(volume.label.astype(np.float32), 1)
        logits = LOGIT_LIMIT * (2.5 * blurred - 1 + 0.25 * noise / noise.std())
        how = "the label, blurred, with smooth noise as errors (there is no image)"
    return np.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT).astype(np.float32), how


# ---- measurements ---------------------------------------------------------------------------------------------------


def measure(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, spacing: tuple[float, ...] | None = None
) -> Measured:
    """Losses per lesion, and who gets the gradient under plain Dice, the blob term, both, and the zones' term."""
    x = logits.clone().requires_grad_()
    criterion = BlobLoss()
    main_term, blob_term = criterion.terms(x, target, ids)
    of_main = torch.autograd.grad(main_term, x, retain_graph=True)[0]
    of_blob = torch.autograd.grad(blob_term, x)[0]
    zones = nearest_instance(ids, spacing=spacing)
    of_cc = torch.autograd.grad(CCLoss(main_weight=0.0)(x, target, ids, zones), x)[0]
    losses, order = (t[0, 0].detach().cpu().numpy() for t in criterion.instance_losses(logits, target, ids))
    loss_of = {int(k): float(value) for k, value in zip(order, losses, strict=True) if k > 0}

    flat = ids.flatten().cpu().numpy()
    present, slot = np.unique(flat, return_inverse=True)
    voxels = np.bincount(slot)
    lesion = present > 0
    gradients, shares, background = {}, {}, {}
    for name, gradient in (("dice", of_main), ("blob", of_blob), ("cc", of_cc), ("both", of_main + of_blob)):
        magnitude = gradient[0, 0].abs().cpu().numpy().astype(np.float64)
        mass = np.bincount(slot, weights=magnitude.ravel()) / magnitude.sum()
        gradients[name], shares[name] = magnitude, mass[lesion]
        background[name] = float(mass[~lesion].sum())
    return Measured(
        ids=present[lesion],
        voxels=voxels[lesion],
        losses=np.array([loss_of[int(k)] for k in present[lesion]]),
        main=main_term.item(),
        blob=blob_term.item(),
        zones=zones[0, 0].cpu().numpy(),
        gradients=gradients,
        shares=shares,
        background=background,
    )


def dice_loss(prob: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 1 - (2 * (prob * target).sum() + 1e-5) / (prob.sum() + target.sum() + 1e-5)


def loop_loss(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, instances: list[int], advance: Callable[[], None]
) -> torch.Tensor:
    """Blob loss as it is usually written, with its gradient: one masked Dice loss per instance.

    Each instance's backward runs at once, so that memory does not grow with their number (one graph is no faster).
    """
    prob = logits.sigmoid()
    leaf = prob.detach().requires_grad_()
    loss = dice_loss(leaf, target)
    torch.autograd.backward(loss)
    loss = loss.detach()
    for k in instances:
        blob = ids == k
        term = dice_loss(leaf * (blob | (ids == 0)), blob.float()) / len(instances)
        torch.autograd.backward(term)
        loss += term.detach()
        advance()
    torch.autograd.backward(prob, leaf.grad)
    return loss


def compare(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, instances: list[int], progress: Progress
) -> tuple[dict[str, list[float]], tuple[float, float]]:
    """Seconds of each run of the loop, of plain Dice and of ours; raises unless loop and ours agree before that."""
    criterion = BlobLoss()
    task = progress.add_task(f"literal loop over {len(instances)} lesions", total=None)

    def advance() -> None:
        progress.advance(task)

    def loop(x: torch.Tensor) -> torch.Tensor:
        return loop_loss(x, target, ids, instances, advance)

    def plain(x: torch.Tensor) -> torch.Tensor:
        loss = dice_loss(x.sigmoid(), target)
        torch.autograd.backward(loss)
        return loss.detach()

    def ours(x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = criterion(x, target, ids)
        torch.autograd.backward(loss)
        return loss.detach()

    def once(call: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, float]:
        x = logits.clone().requires_grad_()
        wait(x.device)
        start = time.perf_counter()
        value = call(x)
        wait(x.device)
        seconds = time.perf_counter() - start
        if x.grad is None:
            raise RuntimeError("the loss left no gradient")
        return value, x.grad, seconds

    progress.update(task, total=len(instances))
    value_loop, grad_loop, seconds_loop = once(loop)
    value_ours, grad_ours, _ = once(ours)
    value_off = abs(value_loop - value_ours).item()
    grad_off = ((grad_loop - grad_ours).abs().max() / grad_loop.abs().max()).item()
    if not (value_off <= 1e-5 and grad_off <= 1e-4):
        raise RuntimeError(
            f"loop and blobloss_fast disagree, so no time is shown: loss {value_loop.item():.9g} and "
            f"{value_ours.item():.9g}, gradient off by {grad_off:.2g} of its largest entry"
        )
    rounds = max(1, min(5, int(20 / seconds_loop)))
    progress.update(task, total=len(instances) * (1 + rounds))
    seconds: dict[str, list[float]] = {"loop": [], "dice": [], "ours": []}
    for _ in range(rounds):  # in turns, so that a busy machine is as hard on one as on the others
        seconds["loop"].append(once(loop)[2])
        for name, call in (("dice", plain), ("ours", ours)):
            seconds[name].extend(once(call)[2] for _ in range(max(10 // rounds, 3)))
    return seconds, (value_off, grad_off)


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# ---- what the user sees ---------------------------------------------------------------------------------------------


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        name = str(device)
    else:
        name = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.is_file():
            models = [
                line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
            ]
            name = models[0] if models else name
        name += f", {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{name}; torch {torch.__version__}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share >= 1e-6 or share == 0 else "<0.0001 %"


def print_report(
    console: Console,
    volume: Volume,
    how: str,
    found: Measured,
    times: dict[str, list[float]],
    agreement: tuple[float, float],
    device: torch.device,
) -> None:
    number = len(found.ids)
    size = " x ".join(str(n) for n in volume.label.shape)
    lesions = f"{number} lesion{'s' * (number != 1)}"
    console.print(
        f"[bold]{escape(volume.name)}[/]: {size} voxels, {lesions}, {percent(volume.label.mean())} of the voxels"
    )
    console.print(f"Prediction: a stand-in, not a network ({volume.note}{how}).")
    console.print(f"Dice loss {found.main:.3f}; blob term (mean of the lesions' own Dice losses) {found.blob:.3f}\n")

    table = Table(
        title="Share of |gradient|, summed over a lesion's voxels", box=rich.box.SIMPLE_HEAD, title_justify="left"
    )
    for heading in ("lesion", "voxels", "blob loss", "plain Dice", "blob term", "CC term"):
        table.add_column(heading, justify="right")
    order = np.argsort(-found.voxels, kind="stable")
    dice, blob, cc = (found.shares[name] for name in ("dice", "blob", "cc"))

    def row(name: str, voxels: str, loss: str, of_dice: float, of_blob: float, of_cc: float) -> None:
        table.add_row(name, voxels, loss, percent(of_dice), percent(of_blob), percent(of_cc))

    hidden = order[ROWS:-ROWS] if number > 2 * ROWS + 1 else order[:0]
    for i in order:
        if i in hidden:
            if i == hidden[0]:
                sizes = f"{found.voxels[hidden].min()}-{found.voxels[hidden].max()}"
                losses = f"{found.losses[hidden].mean():.3f}"
                row(f"{len(hidden)} left out", sizes, losses, *(share[hidden].sum() for share in (dice, blob, cc)))
            continue
        row(str(found.ids[i]), f"{found.voxels[i]:,}", f"{found.losses[i]:.3f}", dice[i], blob[i], cc[i])
    table.add_section()
    outside = int(volume.label.size - found.voxels.sum())
    row("background", f"{outside:,}", "", *(found.background[name] for name in ("dice", "blob", "cc")))
    console.print(table)
    if number > 1:
        others = {name: percent(share[order[1:]].sum()) for name, share in found.shares.items()}
        console.print(
            f"The {number - 1} lesions beside the largest get {others['dice']} of plain Dice's gradient, "
            f"{others['blob']} of the blob term's, {others['both']} of BlobLoss()'s with "
            f"its default weights (Dice + blob term), {others['cc']} of CCLoss's zones. "
            "Soft false positives dilute the blob term: every lesion is charged with all of them; in CCLoss, the "
            "nearest lesion alone.\n"
        )
    clock = Table(title="Time of loss and gradient", box=rich.box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "median ms", "fastest", "runs", "loop / this"):
        clock.add_column(heading, justify="right" if heading else "left")
    median = {key: statistics.median(seconds) for key, seconds in times.items()}
    for key, name in (
        ("loop", f"literal loop over {lesions}"),
        ("dice", "plain Dice loss, PyTorch"),
        ("ours", "BlobLoss(), Dice + blob term"),
    ):
        fastest, runs = f"{1000 * min(times[key]):.2f}", str(len(times[key]))
        clock.add_row(name, f"{1000 * median[key]:.2f}", fastest, runs, f"{median['loop'] / median[key]:.1f}")
    console.print(clock)
    console.print(
        f"Loop and BlobLoss() agree: loss to {agreement[0]:.1g}, gradient to {agreement[1]:.1g} of its largest entry."
    )
    console.print(f"Hardware: {hardware(device)}. The lesions' ids are given to both; finding them is not timed.")
