"""What the package promises on a GPU, measured: `python -m bench.gpu`, a few minutes on a machine with a CUDA device.

Everything that is timed is compared first. Each stage has a process of its own and a time in which it must be done, so
that one that hangs or breaks the device takes its own rows with it and no others; a row without a value says why.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import blobloss_fast
from bench import gpu_comparisons as gpu_comparisons  # registers its measurements
from bench import gpu_tools
from bench.gpu_contestants import version
from bench.gpu_rows import COPY, FULL, MEASUREMENTS, QUICK, Bar, Bench, Extra, Row, Scale
from bench.gpu_timing import Clock, CudaClock, l2_bytes
from bench.report import MarkerError, number, publish, replace_between_markers, table

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- bench:gpu:start -->", "<!-- bench:gpu:end -->"
RESULTS = ROOT / "bench" / "results"

# Seconds, in the order in which they run; what a stage leaves over the next ones may use. Less than eight minutes.
BUDGET = {"checks": 80, "passes": 60, "losses": 80, "labels": 60, "tests": 120, "memcheck": 40, "initcheck": 30}
QUICK_BUDGET = {"quick tests" if stage == "tests" else stage: seconds for stage, seconds in BUDGET.items()}
SHOWN_FIRST = ("tests", "quick tests", "memcheck", "initcheck")
TOOLS: dict[str, tuple[Bar, Callable[[float], Row]]] = {
    "tests": (gpu_tools.TESTS, gpu_tools.gpu_tests),
    "quick tests": (gpu_tools.TESTS, lambda seconds: gpu_tools.gpu_tests(seconds, gpu_tools.QUICK_TESTS)),
    "memcheck": (gpu_tools.MEMCHECK, lambda seconds: gpu_tools.sanitized(gpu_tools.MEMCHECK, seconds)),
    "initcheck": (gpu_tools.INITCHECK, lambda seconds: gpu_tools.sanitized(gpu_tools.INITCHECK, seconds)),
}
CLOCKS: dict[str, Callable[[], Clock]] = {"cuda": CudaClock, "cpu": lambda: Clock(limit_s=0.05, copy_bytes=2**22)}


@dataclass(frozen=True)
class Plan:
    """What is measured: on which clock, at what scale, within which seconds for each stage."""

    scale: Scale = FULL
    budget: Mapping[str, float] = field(default_factory=lambda: BUDGET)
    clock: str = "cuda"
    skipped: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------ stages


def announced(stage: str) -> list[Bar | Extra]:
    """The rows that a stage has in any case, with a bar or without."""
    if stage in TOOLS:
        return [TOOLS[stage][0]]
    return [bar for measurement in MEASUREMENTS if measurement.stage == stage for bar in measurement.bars]


def bars_of(stage: str) -> list[Bar]:
    return [bar for bar in announced(stage) if isinstance(bar, Bar)]


def stage_rows(stage: str, bench: Bench) -> Iterator[Row]:
    for measurement in MEASUREMENTS:
        if measurement.stage == stage:
            yield from measurement.rows(bench)


def _child(sender: Connection, stage: str, clock: str, scale: Scale) -> None:
    for found in stage_rows(stage, Bench(CLOCKS[clock](), scale)):
        sender.send(found)
    sender.send(None)


def rows_from_child(stage: str, plan: Plan, seconds: float, show: Callable[[Row], None]) -> list[Row]:
    """The rows of a stage from a process of its own, each as it comes; announced ones that do not come say why."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, stage, plan.clock, plan.scale))
    deadline = time.monotonic() + seconds
    rows: list[Row] = []
    reason = ""
    process.start()
    sender.close()
    try:
        while receiver.poll(max(deadline - time.monotonic(), 0)):
            found = receiver.recv()
            if found is None:
                process.join(10)
                break
            rows.append(found)
            show(found)
        else:
            reason = f"cut: the stage of {stage} was not done after its {seconds:.0f} s"
    except EOFError:
        process.join(10)
        reason = f"the process of the stage of {stage} ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join(10)
    names = {found["name"] for found in rows}
    for bar in announced(stage):
        if bar.name not in names:
            rows.append(bar.unmeasured(reason))
            show(rows[-1])
    return rows


def measure(plan: Plan, save: Callable[[dict[str, Any]], None] = lambda results: None) -> dict[str, Any]:
    """All stages; progress, and whatever does not hold, on the standard error. Saves what there is after each stage."""
    stamp = machine()
    start, end = time.monotonic(), 0.0
    rows: dict[str, list[Row]] = {}
    with tqdm(total=sum(len(bars_of(stage)) for stage in plan.budget), unit="bar") as bar:

        def show(found: Row) -> None:
            if found["value"] is None or found["holds"] is False:
                said = "not measured" if found["value"] is None else f"MISSED: {shown_value(found)}, {found['bar']}"
                bar.write(f"{found['name']}: {said}: {found['note']}", file=sys.stderr)
            bar.update(found["bar"] is not None)

        for stage, seconds in plan.budget.items():
            end += seconds
            bar.set_postfix_str(stage)
            left = end - (time.monotonic() - start)
            if stage in plan.skipped:
                rows[stage] = [own.unmeasured("left out") for own in announced(stage)]
            elif stage in TOOLS:
                rows[stage] = [TOOLS[stage][1](left)]
            else:
                rows[stage] = rows_from_child(stage, plan, left, show)
            if stage in plan.skipped or stage in TOOLS:
                for found in rows[stage]:
                    show(found)
            results = {"machine": stamp, **_results(plan, rows), "seconds": round(time.monotonic() - start, 1)}
            save(results)
    return results


def _results(plan: Plan, rows: Mapping[str, list[Row]]) -> dict[str, Any]:
    in_order: list[Row] = []
    for stage in sorted(plan.budget, key=lambda stage: stage not in SHOWN_FIRST):
        in_order += rows.get(stage, [bar.unmeasured("the run did not get that far") for bar in announced(stage)])
    bandwidth = next((found["value"] for found in in_order if found["name"] == COPY), None)
    return {"copy_gb_per_s": bandwidth, "quick": plan.scale == QUICK, "rows": in_order}


# ----------------------------------------------------------------------------------------------------------- machine


def machine() -> dict[str, Any]:
    """What the numbers belong to; of the current CUDA device, if there is one."""
    found: dict[str, Any] = dict.fromkeys(("gpu", "driver", "capability", "memory", "L2"))
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "driver": driver(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "L2": f"{l2_bytes(device) / 2**20:.0f} MiB",
        }
    return {
        **found,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "python": platform.python_version(),
        "monai": version("monai"),
        "cupy": version("cupy"),
        "blobloss_fast": blobloss_fast.__version__,
        "date": datetime.date.today().isoformat(),
    }


def driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return found[0] if found else None


def file_name(gpu: str) -> str:
    return f"{re.sub('[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


# ------------------------------------------------------------------------------------------------------------ tables


def shown_value(found: Row) -> str:
    value = found["value"]
    if value is None:
        return "not measured"
    text = f"{value:,}" if isinstance(value, int) else number(value)
    return f"{text} {found['unit']}".strip()


def as_markdown(results: Mapping[str, Any]) -> str:
    """What has a bar, the contests, and the rest."""
    bars, rest = [], []
    contests: dict[str, list[Row]] = {}
    for found in results["rows"]:
        cells = [found["name"], _escaped(found["note"]), shown_value(found)]
        if found["bar"] is not None:
            verdict = {True: "yes", False: "**no**", None: ""}[found["holds"]]
            bars.append([*cells, found["bar"], verdict])
        elif found["name"].count(": ") == 2:
            contests.setdefault(found["name"].partition(": ")[0], []).append(found)
        else:
            rest.append(cells)
    blocks = [table(["promised", "of", "measured", "bar", "holds"], bars, left=2)]
    blocks += [_contest(part, rows) for part, rows in contests.items()]
    if rest:
        blocks.append(table(["also measured", "of", ""], rest, left=2))
    return "\n\n".join([*blocks, _origin(results)])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _contest(part: str, rows: Sequence[Row]) -> str:
    """A row for each volume, a column for each contestant, and below it why some have no time."""
    places = {tuple(found["name"].split(": ")[1:]): found for found in rows}
    volumes, titles = (list(dict.fromkeys(place[i] for place in places)) for i in range(2))
    lines: list[list[str]] = []
    reasons: dict[str, str] = {}
    for volume in volumes:
        cells = []
        for title in titles:
            found = places.get((volume, title), {"value": None, "note": None})
            cells.append("" if found["value"] is None else number(found["value"]))
            if found["note"] is not None and found["value"] is None:
                reasons.setdefault(f"{title} ({found['note']})", volume)
        lines.append([volume, *cells])
    shown = table([f"{part}: {rows[0]['unit']}", *titles], lines)
    return f"{shown}\n\nNot timed: {'; '.join(reasons)}." if reasons else shown


def _origin(results: Mapping[str, Any]) -> str:
    stamp = results["machine"]
    quick = "A quick run: fewer rounds. " if results["quick"] else ""
    return (
        f"{quick}fp32 where no dtype is named; medians of CUDA events in turns, each after the L2 cache was flushed; "
        f"all results were compared first. {stamp['gpu']}, {stamp['memory']}, L2 {stamp['L2']}, driver "
        f"{stamp['driver']}; blobloss_fast {stamp['blobloss_fast']}; Python {stamp['python']}, torch {stamp['torch']}, "
        f"CUDA {stamp['cuda']}, Triton {stamp['triton']}, MONAI {stamp['monai'] or 'absent'}, CuPy "
        f"{stamp['cupy'] or 'absent'}; {stamp['date']}."
    )


# ----------------------------------------------------------------------------------------------------------- command


def latest_results(folder: Path) -> Path:
    """The file of this machine's GPU, or else the last one that another GPU's run has left."""
    if torch.cuda.is_available():
        own = folder / file_name(torch.cuda.get_device_name())
        if own.is_file():
            return own
    dates = {}
    for path in sorted(folder.glob("*.json")):
        stamp = json.loads(path.read_text(encoding="utf-8")).get("machine", {})
        if "gpu" in stamp:
            dates[path] = stamp["date"]
    if not dates:
        raise FileNotFoundError(f"there is no file of bench.gpu in {folder}")
    return max(dates, key=dates.__getitem__)


def _write(folder: Path, results: Mapping[str, Any]) -> None:
    file = folder / file_name(results["machine"]["gpu"] or "no gpu")
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer rounds, and 128^3 in place of 256^3 for many and giant instances")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the file, which is named after the GPU")
    add("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="file with the markers")
    add("--no-readme", action="store_true", help="print the tables only")
    add("--render", action="store_true", help="measure nothing: make the tables from a file in --out")
    add("--skip-tests", action="store_true", help="leave the tests out")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> None:
    """`plan` is for tests, which have no GPU."""
    parser, options = parsed(arguments)
    if plan is None:
        skipped = ("tests", "quick tests") if options.skip_tests else ()
        plan = Plan(QUICK, QUICK_BUDGET, skipped=skipped) if options.quick else Plan(skipped=skipped)
    if not options.render and plan.clock == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "python -m bench.gpu needs a CUDA device, and a PyTorch built for it: this one sees none\n")
    if not options.no_readme:  # before minutes of measuring, not after
        try:
            replace_between_markers(options.readme.read_text(encoding="utf-8"), "", str(options.readme), START, END)
        except (OSError, MarkerError) as error:
            parser.error(f"{error}; --no-readme prints the tables only")
    if options.render:
        try:
            results = json.loads(latest_results(options.out).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            parser.error(f"--render needs the results of an earlier run: {error}")
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        results = measure(plan, partial(_write, options.out))
    publish(as_markdown(results), None if options.no_readme else options.readme, START, END)


if __name__ == "__main__":
    main()
