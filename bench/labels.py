"""Components, zones, and losses from a bare mask against what else finds them: `python -m bench.labels`.

Everything that is timed is compared first, bit for bit where two find the same thing. The contestants take turns, in a
process for each number of threads, with malloc's thresholds raised. `--data DIR` adds crops of the masks in a folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from bench.contestants import CONTESTANTS, check_agreement, why_not
from bench.ratios import is_met
from bench.report import machine_stamp, number, publish, table
from bench.timing import WARM, Report, Setting, Step, in_child, interleaved, machine, milliseconds
from bench.workloads import balls, data_files, real, synthetic
from blobloss_fast import connected_components, nearest_instance

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- bench:labels:start -->", "<!-- bench:labels:end -->"
DENSITIES = (1, 3, 10, 30, 60)  # per cent
MOST_TRANSFORMS = 100  # scipy takes a tenth of a second for each at 128^3

Volume = tuple[str, np.ndarray]  # a name, and a mask uint8 or ids int32
Contestants = Mapping[str, Callable[[np.ndarray], Callable[[], Any]]]


# ---------------------------------------------------------------------------------------------------------- volumes


def masks(size: int, data: Path | None) -> list[Volume]:
    found = [(f"{size}^3, 60 balls", balls(size, 60) > 0)]
    found += [(f"{path.stem}, crop of {size}^3", crop(path, size)) for path in (data_files(data) if data else ())]
    workload = real()
    found.append((workload.name, workload.mask[0, 0].numpy()))
    noise = np.random.default_rng(0).random((size,) * 3)
    found += [(f"{size}^3, noise, {density} %", noise < density / 100) for density in DENSITIES]
    return [(name, np.ascontiguousarray(mask, np.uint8)) for name, mask in found]


def crop(path: Path, size: int) -> np.ndarray:
    """The cube around the centre of mass of the label, as far as the volume goes."""
    with np.load(path) as arrays:
        label = arrays["label"] > 0
    middle = [round(place) for place in ndimage.center_of_mass(label)]
    starts = [min(max(m - size // 2, 0), max(n - size, 0)) for m, n in zip(middle, label.shape, strict=True)]
    return label[tuple(slice(start, start + size) for start in starts)]


def labelled(size: int, data: Path | None) -> list[Volume]:
    found = [(f"{size}^3, {count:,} ball{'s' * (count > 1)}", balls(size, count)) for count in (1, 50, 1000)]
    workload = real()
    found.append((workload.name, workload.instances[0, 0].numpy()))
    for path in data_files(data) if data else ():
        ids = ndimage.label(crop(path, size), np.ones((3, 3, 3)))[0]
        found.append((f"{path.stem}, crop of {size}^3, {ids.max()} lesions", ids.astype(np.int32)))
    return found


# ------------------------------------------------------------------------------------------------------ contestants


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)[None, None]


COMPONENTS: Contestants = {
    "scipy": lambda mask: partial(ndimage.label, mask, np.ones((3,) * mask.ndim)),
    "cc3d": lambda mask: partial(cc3d.connected_components, mask, connectivity=26, return_N=True),
    "ours": lambda mask: partial(connected_components, _tensor(mask)),
}


def one_transform_each(ids: np.ndarray) -> np.ndarray:
    """The definition: a distance transform for every instance, and the first of those that are nearest."""
    zones, nearest = np.ones(ids.shape, np.int32), np.full(ids.shape, np.inf)
    for k in np.unique(ids[ids > 0]):
        distance = ndimage.distance_transform_edt(ids != k)
        closer = distance < nearest
        zones[closer], nearest[closer] = k, distance[closer]
    return zones


def nearest_places(ids: np.ndarray) -> np.ndarray:
    return ndimage.distance_transform_edt(ids == 0, return_distances=False, return_indices=True)


def one_transform(ids: np.ndarray) -> np.ndarray:
    """What one might write: the nearest instance voxel of every voxel, and its id; ties go anywhere."""
    return ids[tuple(nearest_places(ids))]


ZONES: Contestants = {
    "each": lambda ids: partial(one_transform_each, ids),
    "scipy": lambda ids: partial(one_transform, ids),
    "ours": lambda ids: partial(nearest_instance, _tensor(ids)),
}


def check_components(name: str, mask: np.ndarray) -> None:
    (truth, count), (labels, counts) = COMPONENTS["scipy"](mask)(), COMPONENTS["ours"](mask)()
    by_cc3d, count_cc3d = COMPONENTS["cc3d"](mask)()
    if not (count == int(counts) == count_cc3d and np.array_equal(truth, labels[0, 0].numpy())):
        raise AssertionError(f"{name}: our components are not scipy's")
    if not np.array_equal(truth, by_cc3d):
        raise AssertionError(f"{name}: cc3d's components are not scipy's")


def check_zones(name: str, ids: np.ndarray) -> None:
    zones = nearest_instance(_tensor(ids))[0, 0].numpy()
    if len(np.unique(ids)) <= MOST_TRANSFORMS and not np.array_equal(zones, one_transform_each(ids)):
        raise AssertionError(f"{name}: our zones are not those of one transform each")
    places = nearest_places(ids)
    other = ids[tuple(places)]
    differ = zones != other  # which may be where two are as near: then ours is the smaller id
    squared = ((places - np.indices(ids.shape)) ** 2).sum(0)
    for k in np.unique(zones[differ]):
        where = differ & (zones == k)
        voxels, own = np.argwhere(where), np.argwhere(ids == k)
        nearest = np.array([((own - voxel) ** 2).sum(1).min(initial=np.iinfo(np.int64).max) for voxel in voxels])
        if not (np.array_equal(nearest, squared[where]) and (other[where] > k).all()):
            raise AssertionError(f"{name}: scipy's nearest instances are nearer than ours, or the other way round")


# -------------------------------------------------------------------------------------------------------- measuring

# (part, contestant that is slower, contestant that is ours, part of the volume's name, threads) -> at least
BARS = {
    ("components", "cc3d", "60 balls", 2): 5.0,
    ("components", "cc3d", "p19", 2): 2.5,
    ("components", "cc3d", "noise", 2): 0.9,
    ("zones", "scipy", "50 balls", 1): 8.0,
    ("zones", "scipy", "50 balls", 2): 14.0,
    ("losses", "monai_dice", "50 balls", 2): 1.2,
}
TITLES = {"each": "scipy, one transform each", "scipy": "scipy", "cc3d": "cc3d", "ours": "ours"}
LOSSES = ("monai_dice", "monai_dice_ce", "mask", "mask_ce", "mask_cc")


def measure(size: int, data: Path | None, rounds: int, report: Report) -> list[dict[str, Any]]:
    """All rows with one number of threads; runs in a process of its own."""
    rows = []
    for part, contestants, volumes, check in (
        ("components", COMPONENTS, masks(size, data), check_components),
        ("zones", ZONES, labelled(size, data), check_zones),
    ):
        for name, volume in volumes:
            report(0, f"{part}: {name}")
            check(name, volume)
            keys = [key for key in contestants if key != "each" or len(np.unique(volume)) <= MOST_TRANSFORMS]
            steps = {key: Step(contestants[key](volume), warm=0 if key == "each" else WARM) for key in keys}
            how_often = {key: 1 if key == "each" else rounds for key in keys}
            rows.append(_row(part, name, interleaved(steps, how_often)))
            report(1, name)
    for workload in (synthetic(size, 50), synthetic(size, 50, batch=2), real()):
        report(0, f"losses: {workload.name}")
        keys = [key for key in LOSSES if why_not(key, workload) is None]
        check_agreement(workload, keys)
        steps = {key: CONTESTANTS[key].step(workload) for key in keys}
        rows.append(_row("losses", workload.name, interleaved(steps, dict.fromkeys(keys, 2 * rounds))))
        report(1, workload.name)
    return rows


def _row(part: str, name: str, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    medians = {key: milliseconds(seconds) for key, seconds in times.items()}
    ours = medians["mask" if part == "losses" else "ours"]
    row: dict[str, Any] = {"part": part, "name": name, "threads": torch.get_num_threads(), "median_ms": medians}
    for (of, slower, where, threads), bar in BARS.items():
        if of == part and where in name and threads == row["threads"] and slower in medians:
            ratio = medians[slower] / ours
            row |= {"bar": bar, "against": slower, "ratio": ratio, "met": is_met(ratio, bar, True)}
    return row


# ----------------------------------------------------------------------------------------------------------- tables


def as_markdown(results: Mapping[str, Any]) -> str:
    blocks = []
    for part, what in (
        ("components", "`connected_components`, 26 neighbours"),
        ("zones", "`nearest_instance`"),
        ("losses", "forward and backward from a mask"),
    ):
        rows = [row for row in results["rows"] if row["part"] == part]
        keys = list(dict.fromkeys(key for row in rows for key in row["median_ms"]))
        titles = [CONTESTANTS[key].title if part == "losses" else TITLES[key] for key in keys]
        lines = []
        for row in rows:
            ms, verdict = row["median_ms"], ""
            if "bar" in row:
                verdict = f"{number(row['ratio'])} (>= {row['bar']:g}: {'yes' if row['met'] else '**no**'})"
            cells = [number(ms[key]) if key in ms else "" for key in keys]
            lines.append([row["name"], str(row["threads"]), *cells, verdict])
        against = {"components": "cc3d / ours", "zones": "scipy / ours", "losses": "MONAI DiceLoss / BlobLoss"}[part]
        blocks.append(table([f"{what}: ms", "threads", *titles, f"{against} (promised)"], lines))
    note = (
        "Medians of interleaved rounds, each run after untimed ones of 5 ms (not those of one transform each), raised "
        "malloc; all results were compared in the same run, components and zones bit for bit (scipy's single "
        "transform: up to ties). The losses find the instances, and the zones, on the fly."
    )
    return "\n\n".join([*blocks, f"{note} {machine_stamp(results['machine'])}."])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.labels", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--size", type=int, default=128, metavar="N", help="edge length of the synthetic volumes and crops")
    add("--threads", type=int, nargs="+", default=[2, 1], metavar="N", help="numbers of threads")
    add("--data", type=Path, metavar="DIR", help="also crops of the npz files there that hold a binary 3D `label`")
    add("--rounds", type=int, default=15, metavar="N")
    add("--out", type=Path, default=ROOT / "bench" / "results" / "cpu_labels.json", metavar="FILE")
    add("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="file with the markers")
    add("--no-readme", action="store_true", help="print the tables only")
    add("--render", action="store_true", help="measure nothing: make the tables from the file at --out")
    options = parser.parse_args(arguments)
    if not options.render:
        files = len(data_files(options.data)) if options.data else 0
        volumes = 2 + len(DENSITIES) + files + 4 + files + 3  # masks, labels, volumes of losses
        rows: list[dict[str, Any]] = []
        with tqdm(total=volumes * len(options.threads), unit="volume") as bar:
            for threads in options.threads:
                setting = Setting(threads, "raised")

                def show(steps: int, what: str, setting: Setting = setting) -> None:
                    bar.set_postfix_str(f"{setting}: {what}", refresh=False)
                    bar.update(steps)

                rows += in_child(setting, measure, options.size, options.data, options.rounds, report=show)
        results = {"machine": machine(), "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tables = as_markdown(json.loads(options.out.read_text(encoding="utf-8")))
    publish(tables, None if options.no_readme else options.readme, START, END)


if __name__ == "__main__":
    main()
