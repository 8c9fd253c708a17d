"""The README's tables of CPU times, from one command: `python -m bench.table`.

Contestants take turns, so that a ratio compares neighbours in time: in every round each fast one is run twice and timed
once, the loop in the first few rounds only. Values and gradients are checked before a volume is timed; a disagreement
ends the run.
Every number of threads and every malloc setting has a process of its own. `python -m bench.ratios` measures the ratios
alone, and `--data DIR` adds the volumes of a folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import ratios
from bench.contestants import CONTESTANTS, TABLE, check_agreement, why_not
from bench.report import MarkerError, as_markdown, publish, replace_between_markers
from bench.timing import MALLOC, Report, Setting, copy_bandwidth, in_child, interleaved, machine, milliseconds
from bench.workloads import SCENES, Workload, data_files, from_file, real, scene

ROOT = Path(__file__).resolve().parents[1]

# A volume to measure: its edge length if it is synthetic, what is in it, and how it is made (by name, for a child).
Volume = tuple[int | None, str, Callable[[], Workload]]


def volumes_of(sizes: Sequence[int], scenes: Sequence[str], real_ones: bool, data: Path | None) -> list[Volume]:
    volumes: list[Volume] = [(size, kind, partial(scene, size, kind)) for size in sizes for kind in scenes]
    if real_ones:
        volumes.append((None, "real", real))
    if data is not None:
        volumes += [(None, "real", partial(from_file, path)) for path in data_files(data)]
    return volumes


def measure_volumes(volumes: Sequence[Volume], rounds: int, loop_seconds: float, report: Report) -> dict[str, Any]:
    """Every contestant on every volume; runs in a process of its own."""
    measured = [measure(volume, rounds, loop_seconds, report) for volume in volumes]
    return {"copy_gb_per_s": copy_bandwidth(), "volumes": measured}


def measure(volume: Volume, rounds: int, loop_seconds: float, report: Report) -> dict[str, Any]:
    size, kind, build = volume
    workload = build()
    report(0, workload.name)
    skipped = {key: reason for key in TABLE if (reason := why_not(key, workload)) is not None}
    agreements = check_agreement(workload, [key for key in TABLE if key not in skipped])
    skipped |= {key: agreement.reason for key, agreement in agreements.items() if agreement.reason is not None}
    keys = [key for key in TABLE if key not in skipped]
    how_often = dict.fromkeys(keys, rounds)
    if "loop" in how_often:
        how_often["loop"] = max(1, min(rounds, int(loop_seconds / agreements["loop"].seconds)))
    times = interleaved(
        {key: CONTESTANTS[key].step(workload) for key in keys}, how_often, after_each=lambda: report(1, workload.name)
    )
    report(len(TABLE) * rounds - sum(how_often.values()), workload.name)  # what was skipped counts as done
    return {
        "name": workload.name,
        "size": size,
        "scene": kind,
        "shape": list(workload.instances.shape[2:]),
        "instances": workload.num_instances,
        "foreground": round(float((workload.instances > 0).double().mean()), 6),
        "median_ms": {key: milliseconds(t) for key, t in times.items()},
        "min_ms": {key: round(min(t) * 1e3, 4) for key, t in times.items()},
        "rounds": how_often,
        "relative_error": {key: float(f"{agreements[key].error:.3g}") for key in keys},
        "not_run": skipped,
    }


def run_volumes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The first setting sees all volumes, the others one kind of the synthetic ones and the package's real one."""
    settings = [Setting(threads, malloc) for threads, malloc in itertools.product(options.threads, options.malloc)]
    volumes = volumes_of(options.sizes, options.scenes, not options.no_real, options.data)
    few = str(ratios.FEW) if str(ratios.FEW) in options.scenes else options.scenes[0]
    some = volumes if options.everywhere else volumes_of(options.sizes, [few], not options.no_real, None)
    plan = [(setting, some if index else volumes) for index, setting in enumerate(settings)]
    results = []
    with tqdm(total=sum(len(v) for _, v in plan) * len(TABLE) * options.rounds, unit="step") as bar:
        for setting, chosen in plan:
            measured = in_child(
                setting, measure_volumes, chosen, options.rounds, options.loop_seconds, report=_shown_on(bar, setting)
            )
            results.append({"threads": setting.threads, "malloc": setting.malloc, **measured})
    return results


def run_ratios(options: argparse.Namespace) -> dict[str, Any]:
    scale = ratios.Scale(*options.ratio_scale)
    with tqdm(total=ratios.number_of_rounds(options.ratio_rounds), unit="round") as bar:
        measured = []
        for malloc in ("raised", "default"):
            setting = Setting(2, malloc)
            report = _shown_on(bar, setting)
            measured.append(in_child(setting, ratios.measure, scale, malloc, options.ratio_rounds, report=report))
    return {"machine": machine(), "settings": measured}


def _shown_on(bar: tqdm, setting: Setting) -> Report:
    def show(steps: int, what: str) -> None:
        bar.set_postfix_str(f"{setting}: {what}", refresh=False)
        bar.update(steps)

    return show


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[64, 128, 192], metavar="N", help="edge lengths")
    add("--scenes", nargs="+", default=list(SCENES), metavar="S", help="numbers of balls, giant, 'salt and pepper'")
    add("--threads", type=int, nargs="+", default=[2, 1], metavar="N", help="numbers of threads")
    add("--malloc", nargs="+", default=["raised", "default"], choices=MALLOC, help="thresholds of malloc")
    add("--everywhere", action="store_true", help="all volumes in all settings, not in the first alone")
    add("--data", type=Path, metavar="DIR", help="also the npz files there that hold a binary 3D `label`")
    add("--no-real", action="store_true", help="leave the real lesions of the package out")
    add("--rounds", type=int, default=15, metavar="N", help="rounds of all but the loop")
    add("--loop-seconds", type=float, default=4, metavar="T", help="the loop has as many rounds as fit in, at least 1")
    add("--ratio-rounds", type=int, default=41, metavar="N", help="most rounds of a ratio")
    add("--ratio-scale", type=int, nargs=3, default=ratios.Scale(), metavar="N", help="two edge lengths, most balls")
    add("--only", choices=("volumes", "ratios"), help="measure one part, and keep the other from the file at --out")
    add("--out", type=Path, default=ROOT / "bench" / "results" / "cpu.json", metavar="FILE")
    add("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="file with the markers")
    add("--no-readme", action="store_true", help="print the tables only")
    add("--render", action="store_true", help="measure nothing: make the tables from the file at --out")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parser, options = parsed(arguments)
    if not options.no_readme:  # before minutes of measuring, not after
        try:
            replace_between_markers(options.readme.read_text(encoding="utf-8"), "", str(options.readme))
        except (OSError, MarkerError) as error:
            parser.error(f"{error}; --no-readme prints the tables only")
    results: dict[str, Any] = {}
    if options.render or options.only:
        try:
            results = json.loads(options.out.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            parser.error(f"--render and --only need the results of an earlier run: {error}")
    if not options.render:
        if options.only != "ratios":
            results |= {"machine": machine(), "settings": run_volumes(options)}
        if options.only != "volumes":
            results["ratios"] = run_ratios(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    publish(as_markdown(results), None if options.no_readme else options.readme)


if __name__ == "__main__":
    main()
