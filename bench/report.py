"""From the measured numbers to the tables of the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.contestants import CONTESTANTS, TABLE
from bench.ratios import BACKWARD_BYTES, BYTES_PER_VOXEL, FEW, FORWARD_BYTES

START, END = "<!-- bench:cpu:start -->", "<!-- bench:cpu:end -->"
HEADLINE_SIZE = 128


class MarkerError(ValueError):
    """The file to be updated has no place for the table."""


def replace_between_markers(text: str, table: str, source: str, start: str = START, end: str = END) -> str:
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise MarkerError(f"{source} must hold the line {start} once and, after it, the line {end} once")
    before, after = text.partition(start)[0], text.partition(end)[2]
    return f"{before}{start}\n{table}\n{end}{after}"


def publish(tables: str, readme: Path | None, start: str = START, end: str = END) -> None:
    """Print tables, and put them between the markers of a file, if there is one."""
    print(tables)
    if readme is not None:
        text = readme.read_text(encoding="utf-8")
        readme.write_text(replace_between_markers(text, tables, str(readme), start, end), encoding="utf-8")


def as_markdown(results: Mapping[str, Any]) -> str:
    """All tables; a part that was not measured is left out."""
    blocks = []
    if results.get("settings"):
        blocks += [_volumes(results["settings"]), _reading(results["settings"]), _settings(results["settings"])]
    if results.get("ratios"):
        blocks += [_ratios(results["ratios"]["settings"]), _parts(results["ratios"]["settings"])]
    origin = _origin(results["machine"], results.get("settings"))
    if results.get("ratios") and results["ratios"]["machine"] != results["machine"]:
        origin += f" The ratios: {machine_stamp(results['ratios']['machine'])}."
    return "\n\n".join([*filter(None, blocks), origin])


def number(value: float, digits: int = 3) -> str:
    """So many digits, or all that stand before the point."""
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first columns, `left` of them, are text and the others numbers."""
    rule = "|" + "---|" * left + "---:|" * (len(header) - left)
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def gb_per_s(volume: Mapping[str, Any], key: str) -> float:
    """The bytes that the two passes must move, over the time of a contestant."""
    voxels = torch.Size(volume["shape"]).numel()
    return voxels * BYTES_PER_VOXEL / (volume["median_ms"][key] * 1e-3) / 1e9


# ------------------------------------------------------------------------------------------------------ the big table


def _timed(volumes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The contestants that have a time on any of the volumes."""
    return [key for key in TABLE if any(key in volume["median_ms"] for volume in volumes)]


def _cells(volume: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    ms = volume["median_ms"]
    return [f"{number(ms[key])} ({number(gb_per_s(volume, key), 2)})" if key in ms else "not timed" for key in keys]


def _headline_size(setting: Mapping[str, Any]) -> int | None:
    sizes = {volume["size"] for volume in setting["volumes"]} - {None}
    return HEADLINE_SIZE if HEADLINE_SIZE in sizes else max(sizes, default=None)


def _shown(setting: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One size in full, the usual number of balls at the others, and the real masks; the rest is in the json."""
    size, few = _headline_size(setting), str(FEW)
    return [volume for volume in setting["volumes"] if volume["size"] in (size, None) or volume["scene"] == few]


def setting_name(setting: Mapping[str, Any]) -> str:
    return f"{setting['threads']} thread{'s' * (setting['threads'] > 1)}, {setting['malloc']} malloc"


def _volumes(settings: Sequence[Mapping[str, Any]]) -> str:
    first, shown = settings[0], _shown(settings[0])
    keys = _timed(shown)
    header = [f"{setting_name(first)}: ms (GB/s)", *(CONTESTANTS[key].title for key in keys), "loop / BlobLoss"]
    rows = []
    for volume in shown:
        ms = volume["median_ms"]
        ratio = f"{number(ms['loop'] / ms['ours'])}x" if "loop" in ms else ""
        rows.append([volume["name"], *_cells(volume, keys), ratio])
    return table(header, rows)


def _reading(settings: Sequence[Mapping[str, Any]]) -> str:
    first, volumes = settings[0], [volume for setting in settings for volume in setting["volumes"]]
    reasons = [
        f"{CONTESTANTS[key].title} on {volume['name']} ({reason})"
        for volume in _shown(first)
        for key, reason in volume["not_run"].items()
    ]
    missing = f" Not timed: {'; '.join(reasons)}." if reasons else ""
    worst = max(error for volume in volumes for error in volume["relative_error"].values())
    return (
        f"GB/s counts {BYTES_PER_VOXEL} bytes per voxel: reading fp32 logits twice and int32 labels once, and writing "
        f"the gradient; copying memory reaches {first['copy_gb_per_s']:.1f} GB/s here with {setting_name(first)}, and "
        "volumes that fit into a cache can be faster. Plain Dice and MONAI's losses are the main term alone; the "
        "others add the mean over the instances, whose ids they are given. Largest relative error of any value or "
        f"gradient against double precision: {worst:.0e}.{missing}"
    )


def _settings(settings: Sequence[Mapping[str, Any]]) -> str | None:
    """The same volume with other numbers of threads and the other malloc."""
    same = [(setting, _usual(setting)) for setting in settings]
    if len(settings) == 1 or len({volume["name"] for _, volume in same}) > 1:
        return None
    keys = _timed([volume for _, volume in same])
    header = [f"{same[0][1]['name']}: ms (GB/s)", *(CONTESTANTS[key].title for key in keys), "copy, GB/s"]
    rows = [
        [setting_name(setting), *_cells(volume, keys), f"{setting['copy_gb_per_s']:.1f}"] for setting, volume in same
    ]
    return table(header, rows)


def _usual(setting: Mapping[str, Any]) -> Mapping[str, Any]:
    """The usual number of balls at the size that is shown in full, or else the first volume."""
    wanted = (_headline_size(setting), str(FEW))
    volumes = setting["volumes"]
    return next((volume for volume in volumes if (volume["size"], volume["scene"]) == wanted), volumes[0])


# ------------------------------------------------------------------------------------------------------------- ratios


def _ratios(settings: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for setting in settings:
        for entry in setting["ratios"]:
            (top, on_top), (bottom, on_bottom) = entry["sides"]
            losses = top if top == bottom else f"{top} / {bottom}"
            on = on_top if on_top == on_bottom else f"{on_top} / {on_bottom}"
            bar = f"{'>=' if entry['at_least'] else '<='} {entry['bar']:,g}"
            made_of, ratio, verdict = "", "", f"not run: {entry.get('not_run')}"
            if "not_run" not in entry:
                made_of = " / ".join(map(number, entry["median_ms"]))
                ratio, verdict = number(entry["ratio"], 4), "yes" if entry["met"] else "**no**"
            rows.append([losses, on, setting["malloc"], made_of, ratio, bar, verdict])
    threads = settings[0]["threads"]
    header = ["ratio of times", f"on ({threads} threads)", "malloc", "ms / ms", "ratio", "promised", "met"]
    return table(header, rows, left=3)


def _parts(settings: Sequence[Mapping[str, Any]]) -> str | None:
    rows = []
    for setting in settings:
        for entry in setting.get("parts", ()):
            ms = entry["median_ms"]
            ms_per_byte = entry["voxels"] / setting["copy_gb_per_s"] / 1e6
            forward_floor, backward_floor = FORWARD_BYTES * ms_per_byte, BACKWARD_BYTES * ms_per_byte
            cells = (ms["labels"], ms["forward"], forward_floor, ms["backward"], backward_floor, ms["whole"])
            rows.append([entry["name"], *map(number, cells)])
    header = ["`BlobLoss()(logits, mask)`, ms", "labels", "forward", "its floor", "backward", "its floor", "in one go"]
    note = "Floor: the bytes that the pass must move, at the speed of a copy."
    return f"{table(header, rows)}\n\n{note}" if rows else None


# ------------------------------------------------------------------------------------------------------------- origin


def machine_stamp(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; blobloss_fast {machine['blobloss_fast']}, "
        f"{machine['backend']}; Python {machine['python']}, torch {machine['torch']}, MONAI "
        f"{machine['monai'] or 'absent'}; {machine['date']}"
    )


def _origin(machine: Mapping[str, Any], settings: Sequence[Mapping[str, Any]] | None) -> str:
    rounds = ""
    if settings:
        counts = [volume["rounds"] for setting in settings for volume in setting["volumes"]]
        loops = sorted({count["loop"] for count in counts if "loop" in count})
        most = max(count["ours"] for count in counts)
        span = "" if not loops else str(loops[0]) if len(loops) == 1 else f"{loops[0]} to {loops[-1]}"
        of_the_loop = f" ({span} of the loop)" if span else ""
        rounds = (
            f" Medians of {most} interleaved rounds{of_the_loop}, each run but the loop's after untimed ones of 5 "
            "ms; all volumes are in bench/results/cpu.json."
        )
    return f"{machine_stamp(machine)}.{rounds}"
