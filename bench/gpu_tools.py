"""The rows of bench.gpu that other programs find: the tests of the GPU, and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import blobloss_fast
from bench.gpu_rows import Bar, Row
from bench.gpu_timing import UnmeasuredError

ROOT = Path(__file__).resolve().parents[1]
CUDA_FOLDERS = Path("/usr/local")
TESTS = Bar("GPU tests", "failures", "<=", 0)
MEMCHECK = Bar("compute-sanitizer memcheck", "errors", "<=", 0)
INITCHECK = Bar("compute-sanitizer initcheck", "errors", "<=", 0)
QUICK_TESTS = ("-m", "gpu and not slow", "tests")
MOST_NAMES = 3  # of failures that a note names


class StoppedError(UnmeasuredError):
    """A program took too long; what it had said."""

    def __init__(self, seconds: float, output: str) -> None:
        super().__init__(f"stopped: it was not done after {seconds:.0f} s")
        self.output = output


def run(command: Sequence[str], seconds: float, extra: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of a program, which is stopped with all it has started after so many seconds."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    first = (str(Path(blobloss_fast.__file__).parents[1]), str(ROOT), environment.get("PYTHONPATH", ""))
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, first)), **(extra or {})}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise StoppedError(seconds, output) from None
            raise
    return process.returncode, output


def gpu_tests(seconds: float, arguments: Sequence[str] = ("-m", "gpu", "tests")) -> Row:
    """The number of failures and errors; a failure stops nothing."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    try:
        status, output = run([*command, *arguments], seconds)
        return row_of_tests(status, output)
    except StoppedError as error:
        marks = "".join(re.findall(r"^([.sxXFE]+)(?: +\[ *\d+%\])?$", error.output, re.MULTILINE))
        note, failures = f"{error}, {marks.count('.')} passed by then", marks.count("F") + marks.count("E")
        return TESTS.row(failures, note) if failures else TESTS.unmeasured(note)


def row_of_tests(status: int, output: str) -> Row:
    """From pytest's summary, as in "1 failed, 20 passed, 3 skipped in 4.56s"."""
    lines = output.strip().splitlines() or [""]
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|skipped|error)", line)), "")
    found = re.findall(r"(\d+) (\w+)", summary.partition(" in ")[0])
    counts = {what.rstrip("s"): int(number) for number, what in found}
    failures = counts.get("failed", 0) + counts.get("error", 0)
    if status not in (0, 1) and not failures:
        return TESTS.unmeasured(f"pytest ended with status {status}: {lines[-1]}")
    if not failures and not counts.get("passed"):
        return TESTS.unmeasured(f"no test ran: {summary or lines[-1]}")
    note = ", ".join(f"{counts.get(what, 0)} {what}" for what in ("passed", "skipped"))
    names = [line.split(" - ")[0] for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return TESTS.row(failures, "; ".join(filter(None, [note, ", ".join(names[:MOST_NAMES]) + more])))


def sanitizer() -> str:
    """Where compute-sanitizer is."""
    places = sorted(CUDA_FOLDERS.glob("cuda*/bin/compute-sanitizer"), reverse=True)
    found = shutil.which("compute-sanitizer") or next(map(str, places), None)
    if found is None:
        raise UnmeasuredError(f"compute-sanitizer is neither on the PATH nor in {CUDA_FOLDERS}/cuda*/bin")
    return found


def sanitized(bar: Bar, seconds: float, arguments: Sequence[str] = ("-m", "bench.gpu_sanitize")) -> Row:
    tool = bar.name.split()[-1]
    try:
        command = [sanitizer(), "--tool", tool, "--report-api-errors", "no", sys.executable, *arguments]
        return row_of_sanitizer(bar, *run(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    except UnmeasuredError as error:
        return bar.unmeasured(str(error))


def row_of_sanitizer(bar: Bar, status: int, output: str) -> Row:
    """The count of its summary; what went wrong without one is no measurement."""
    lines = output.strip().splitlines() or [""]
    summary = re.search(r"ERROR SUMMARY: (\d+) error", output)
    done = re.search(r"^\d+ cases$", output, re.MULTILINE)
    errors = int(summary[1]) if summary else None
    if errors is None or (not errors and not done):
        said = next((line for line in reversed(lines) if line.strip("= ")), "")
        return bar.unmeasured(f"it ended with status {status}, not done: {said}")
    first = next(
        (line.strip("= ") for line in lines if re.match(r"=+ (Invalid|Uninit|Program hit|Misaligned)", line)), ""
    )
    return bar.row(errors, "; ".join(filter(None, [done[0] if done else f"status {status}, not done", first])))
