"""The README's table of CPU times, from one command: `python -m bench.table`.

Contestants take turns, so that a ratio compares neighbours in time: in every round each fast one is run once, the loop
in the first few rounds only. Values and gradients are checked before a volume is timed; a disagreement ends the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.workloads import (
    CONTESTANTS,
    Workload,
    check_agreement,
    real,
    synthetic,
    why_not,
)

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- bench:cpu:start -->", "<!-- bench:cpu:end -->"

# What the two passes have to move at fp32 logits and int32 ids: forward reads both, backward reads both and writes.
BYTES_PER_VOXEL = 8 + 12


# --------------------------------------------------------------------------------------------------------- measuring


def interleaved(
    steps: Mapping[str, Callable[[], Any]],
    rounds: Mapping[str, int],
    *,
    warm_up: int = 2,
    after_each: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every run of every step: in round r, each step that has more than r rounds is run once."""
    for key, step in steps.items():
        for _ in range(warm_up if key != "loop" else 0):  # the agreement check has run the loop once
            step()
    times: dict[str, list[float]] = {key: [] for key in steps}
    gc.collect()
    gc.disable()
    try:
        for r in range(max(rounds.values())):
            for key, step in steps.items():
                if r < rounds[key]:
                    start = time.perf_counter()
                    step()
                    times[key].append(time.perf_counter() - start)
                    after_each()
    finally:
        gc.enable()
    return times


def copy_bandwidth(megabytes: int = 256, rounds: int = 9) -> float:
    """GB/s, read plus write, of copying a buffer that no cache holds."""
    source = torch.ones(megabytes * 2**18)
    sink = torch.empty_like(source)
    times = interleaved({"copy": lambda: sink.copy_(source)}, {"copy": rounds})["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(times) / 1e9


def measure(workload: Workload, rounds: int, loop_rounds: int, bar: tqdm) -> dict[str, Any]:
    skipped = {key: reason for key in CONTESTANTS if (reason := why_not(key, workload)) is not None}
    keys = [key for key in CONTESTANTS if key not in skipped]
    bar.set_postfix_str(f"{workload.name}: checking agreement")
    errors = check_agreement(workload, keys)
    bar.set_postfix_str(workload.name)
    times = interleaved(
        {key: CONTESTANTS[key].step(workload) for key in keys},
        {key: loop_rounds if key == "loop" else rounds for key in keys},
        after_each=bar.update,
    )
    bar.update((len(CONTESTANTS) * rounds) - sum(len(t) for t in times.values()))  # what was skipped counts as done
    return {
        "name": workload.name,
        "shape": list(workload.instances.shape[2:]),
        "instances": workload.num_instances,
        "foreground": round(float((workload.instances > 0).double().mean()), 6),
        "median_ms": {key: round(statistics.median(t) * 1e3, 4) for key, t in times.items()},
        "min_ms": {key: round(min(t) * 1e3, 4) for key, t in times.items()},
        "rounds": {key: len(t) for key, t in times.items()},
        "relative_error": errors,
        "not_run": skipped,
    }


def measure_scaling(size: int, many: int, rounds: int) -> dict[str, Any]:
    """Ours with many instances against ours with one, in turns: the cost must not depend on their number.

    One instance is taken twice: as one id for the very same mask, and as a volume with one ball, which has next to no
    foreground; the reference lists the foreground, so that ratio shows what the foreground costs.
    """
    volume = synthetic(size, many)
    same_mask = dataclasses.replace(volume, instances=(volume.instances > 0).to(torch.int32), num_instances=1)
    volumes = {"many": volume, "one, same mask": same_mask, "one ball": synthetic(size, 1)}
    for workload in volumes.values():
        check_agreement(workload, ["ours"])
    steps = {name: CONTESTANTS["ours"].step(workload) for name, workload in volumes.items()}
    times = interleaved(steps, dict.fromkeys(steps, rounds))
    medians = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    return {
        "size": size,
        "instances": many,
        "foreground": round(float((volume.instances > 0).float().mean()), 4),
        "median_ms": {name: round(ms, 4) for name, ms in medians.items()},
        "ratio": round(medians["many"] / medians["one, same mask"], 3),
        "ratio_to_one_ball": round(medians["many"] / medians["one ball"], 3),
    }


def machine() -> dict[str, Any]:
    def version(distribution: str) -> str | None:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "monai": version("monai"),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run(
    sizes: Sequence[int], instances: Sequence[int], *, many: int, rounds: int, loop_rounds: int, with_real: bool
) -> dict[str, Any]:
    builders: list[Callable[[], Workload]] = [
        lambda size=size, n=n: synthetic(size, n) for size in sizes for n in instances
    ]
    if with_real:
        builders.append(real)
    with tqdm(total=len(builders) * len(CONTESTANTS) * rounds, unit="step") as bar:
        workloads = [measure(build(), rounds, loop_rounds, bar) for build in builders]
        bar.set_postfix_str(f"{max(sizes)}^3, {many:,} balls against one")
        scaling = measure_scaling(max(sizes), many, rounds)
        bar.set_postfix_str("copy bandwidth")
        bandwidth = copy_bandwidth()
    return {"machine": machine(), "workloads": workloads, "scaling": scaling, "copy_gb_per_s": round(bandwidth, 2)}


# --------------------------------------------------------------------------------------------------------- reporting


def gb_per_s(workload: Mapping[str, Any]) -> float:
    voxels = torch.Size(workload["shape"]).numel()
    return voxels * BYTES_PER_VOXEL / (workload["median_ms"]["ours"] * 1e-3) / 1e9


def as_markdown(results: Mapping[str, Any]) -> str:
    def cell(ms: float | None) -> str:
        return "not run" if ms is None else f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"

    titles = [contestant.title for contestant in CONTESTANTS.values()]
    lines = [
        "| forward + backward, ms | " + " | ".join(titles) + " | loop / BlobLoss | BlobLoss GB/s |",
        "|---|" + "---:|" * (len(titles) + 2),
    ]
    reasons: list[str] = []
    for workload in results["workloads"]:
        ms = workload["median_ms"]
        ratio = f"{ms['loop'] / ms['ours']:,.0f}x" if "loop" in ms else ""
        cells = [cell(ms.get(key)) for key in CONTESTANTS]
        lines.append(f"| {workload['name']} | " + " | ".join(cells) + f" | {ratio} | {gb_per_s(workload):.1f} |")
        for key, reason in workload["not_run"].items():
            sentence = f"{CONTESTANTS[key].title} was not run on {workload['name']}: {reason}."
            if sentence not in reasons:
                reasons.append(sentence)
    scaling, stamp = results["scaling"], results["machine"]
    most = {key: max(w["rounds"].get(key, 0) for w in results["workloads"]) for key in ("loop", "ours")}
    worst = max(error for w in results["workloads"] for error in w["relative_error"].values())
    reading = (
        f"{scaling['instances']:,} instances cost {scaling['ratio']:.2f} times one instance on the same mask ("
        f"BlobLoss, {scaling['size']}^3, {scaling['foreground']:.0%} foreground), and "
        f"{scaling['ratio_to_one_ball']:.2f} times a volume with a single ball and next to no foreground. "
        f"GB/s counts the {BYTES_PER_VOXEL} bytes per voxel that the two passes must move; a "
        f"plain copy on this machine reaches {results['copy_gb_per_s']:.1f} GB/s. Plain Dice and MONAI's DiceLoss "
        "compute the main term only; the others add the mean Dice of the instances, whose ids they are given. Largest "
        f"relative error of any value or gradient against double precision: {worst:.0e}."
    )
    origin = (
        f"{stamp['cpu']}, {stamp['cores']} cores, {stamp['threads']} threads, {stamp['system']}; "
        f"Python {stamp['python']}, torch {stamp['torch']}, Triton {stamp['triton'] or 'absent'}, "
        f"MONAI {stamp['monai'] or 'absent'}; {stamp['date']}. Medians of {most['ours']} interleaved rounds "
        f"({most['loop']} for the loop), one run of `python -m bench.table`."
    )
    lines += ["", reading, *reasons, "", origin]
    return "\n".join(lines)


class MarkerError(ValueError):
    """The file to be updated has no place for the table."""


def replace_between_markers(text: str, table: str, source: str) -> str:
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise MarkerError(f"{source} must hold the line {START} once and, after it, the line {END} once")
    before, after = text.partition(START)[0], text.partition(END)[2]
    return f"{before}{START}\n{table}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], metavar="N", help="edge lengths")
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 50, 1000], metavar="N", help="balls per volume")
    parser.add_argument("--many", type=int, default=10_000, metavar="N", help="balls of the scaling ratio")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="rounds of all but the loop")
    parser.add_argument("--loop-rounds", type=int, default=3, metavar="N", help="rounds of the loop")
    parser.add_argument("--no-real", action="store_true", help="leave the real lesions out")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cpu.json", metavar="FILE")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="file with the markers")
    parser.add_argument("--no-readme", action="store_true", help="print the table only")
    parser.add_argument("--render", action="store_true", help="measure nothing: make the table from the file at --out")
    options = parser.parse_args(arguments)

    if not options.no_readme:  # before minutes of measuring, not after
        try:
            replace_between_markers(options.readme.read_text(encoding="utf-8"), "", str(options.readme))
        except (OSError, MarkerError) as error:
            parser.error(f"{error}; --no-readme prints the table only")
    if options.render:
        results = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        results = run(
            options.sizes,
            options.instances,
            many=options.many,
            rounds=options.rounds,
            loop_rounds=options.loop_rounds,
            with_real=not options.no_real,
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = as_markdown(results)
    print(table)
    if not options.no_readme:
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(replace_between_markers(text, table, str(options.readme)), encoding="utf-8")


if __name__ == "__main__":
    main()
