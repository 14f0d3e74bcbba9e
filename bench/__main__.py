"""`python -m bench [--only NAME] [--json FILE]`: run the benchmarks and print one table with pass or miss, and JSON.

A benchmark is a module named in BENCHMARKS with `rows() -> list[dict]`. A row has

- `name`, `value`, `unit`: for example "8 answers to one photo", 1.9, "s";
- `baseline`, `ratio` (or None): a reference measured in the same run, and the comparison with it;
- `target` (or None): "<= 250" refers to the value, "ratio >= 5" to the ratio;
- `note`: how it was measured.

Each module runs in a separate process, so that its threads and memory do not affect the others.
"""

import argparse
import importlib
import json
import operator
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from storage.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = {
    "app": "bench.app",
    "recipes": "bench.recipes",
    "rewards": "bench.rewards",
    "moondream": "bench.moondream",
    "tiny": "bench.tiny",
    "playground": "bench.playground",
    "grpo": "bench.grpo",
    "latency": "bench.latency",
    "learning": "bench.learning",
    "evaluate": "bench.evaluate",
    "usage": "bench.usage",
    "endpoint": "bench.endpoint",
    "guests": "bench.guests",
    "previews": "bench.previews",
}
FIELDS = ("name", "value", "unit", "baseline", "ratio", "target", "note")
COMPARISONS = {
    "<=": operator.le,
    ">=": operator.ge,
    "≤": operator.le,
    "≥": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
TARGET = re.compile(
    r"\s*(?P<field>value|ratio)?\s*(?P<operator><=|>=|≤|≥|<|>)\s*(?P<limit>-?\d+(?:\.\d+)?)\s*(?P<unit>\S*)\s*"
)
LIBRARIES = ("torch", "transformers", "gradio", "opencv-python-headless", "numpy")
MARKS = {True: "pass", False: "MISS", None: ""}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks. Returns 1 if one failed, else 0; a missed target is not a failure."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the playground against its targets.")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="run only this benchmark; repeatable")
    parser.add_argument("--json", type=Path, default=ROOT / "bench-results" / "bench.json", help="output file")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for name in options.only or BENCHMARKS:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        try:
            rows += [{"benchmark": name, **validate(row)} for row in measure(BENCHMARKS[name])]
        except BenchmarkError as error:
            failures[name] = str(error)
    print(table(rows))
    for name, reason in failures.items():
        print(f"\n{name}: FAILED: {reason}")
    write(options.json, {**machine(), "rows": rows, "failures": failures})
    print(f"\n{summary(rows, failures)} Saved to {options.json}.")
    return 1 if failures else 0


class BenchmarkError(Exception):
    """Raised when a benchmark cannot be measured. The message says why."""


def measure(module: str) -> list[dict[str, Any]]:
    """Run one module in a separate process and return its rows. Raises BenchmarkError if the process fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        program = "import sys; from bench.__main__ import _write_rows; _write_rows(*sys.argv[1:])"
        command = [sys.executable, "-c", program, module, str(file)]
        run = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        sys.stderr.write(run.stdout)
        if run.returncode != 0:
            lines = run.stdout.strip().splitlines() or [f"exited with code {run.returncode} without output"]
            raise BenchmarkError(lines[-1])
        return json.loads(file.read_text())


def _write_rows(module: str, file: str) -> None:
    Path(file).write_text(json.dumps(list(importlib.import_module(module).rows())))


def validate(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with all fields in order and `met`: True, False, or None without a target."""
    unknown = set(row) - set(FIELDS)
    if unknown or not {"name", "value", "unit"} <= set(row):
        raise BenchmarkError(f"a row needs name, value and unit, and may have {', '.join(FIELDS[3:])}; got {row}")
    complete = {field: row.get(field) for field in FIELDS}
    return {**complete, "met": target_met(complete)}


def target_met(row: dict[str, Any]) -> bool | None:
    """Return whether the row's value or ratio meets its target; None without a target."""
    if not row["target"]:
        return None
    target = TARGET.fullmatch(str(row["target"]))
    if target is None:
        raise BenchmarkError(f'a target is written like "<= 250" or "ratio >= 5", not {row["target"]!r}')
    number = row[target["field"] or "value"]
    return number is not None and COMPARISONS[target["operator"]](number, float(target["limit"]))


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as aligned text."""
    header = ("benchmark", "measure", "value", "unit", "baseline", "ratio", "target", "", "note")
    lines = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    numeric = {2, 4, 5}
    aligned = [
        "  ".join(
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in [aligned[0], "  ".join("-" * width for width in widths), *aligned[1:]])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    value, baseline, ratio = (_number(row[field]) for field in ("value", "baseline", "ratio"))
    benchmark, name, unit, target, note = (
        str(row[field] or "") for field in ("benchmark", "name", "unit", "target", "note")
    )
    return benchmark, name, value, unit, baseline, ratio, target, MARKS[row["met"]], note


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def summary(rows: list[dict[str, Any]], failures: dict[str, str]) -> str:
    """Return one sentence with the number of targets met and of failures."""
    with_target = [row for row in rows if row["met"] is not None]
    failed = f", {len(failures)} benchmarks failed" if failures else ""
    return f"{sum(row['met'] for row in with_target)} of {len(with_target)} targets met{failed}."


def machine() -> dict[str, Any]:
    """Describe the machine and the commit."""
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "python": platform.python_version(),
            "libraries": {name: _version(name) for name in LIBRARIES},
        },
    }


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def write(file: Path, result: dict[str, Any]) -> None:
    """Write the result as JSON, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
