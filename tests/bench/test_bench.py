"""The benchmark runner: targets, table and file, failures, and the startup measurement."""

import importlib.util
import json
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import app

ROW = {"name": "8 answers", "value": 1.94, "unit": "s", "baseline": 11.64, "ratio": 6.0, "target": "ratio >= 5"}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return the path of the JSON file."""
    return tmp_path / "deep" / "bench.json"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of benchmark modules that the benchmark processes can import."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, results: Path, **modules: str) -> int:
    monkeypatch.setattr(bench, "BENCHMARKS", modules)
    return bench.main(["--json", str(results)])


def write_module(folder: Path, name: str, *lines: str) -> str:
    (folder / f"{name}.py").write_text("def rows():\n" + "".join(f"    {line}\n" for line in lines))
    return name


@pytest.mark.parametrize(
    ("target", "value", "ratio", "met"),
    [
        ("<= 250", 249.9, None, True),
        ("<= 250", 250.1, None, False),
        ("value <= 250 ms", 250, 99.0, True),
        (">= 0.85", 0.84, None, False),
        ("ratio ≥ 5", 1.0, 5.0, True),
        ("ratio >= 5", 99.0, 4.99, False),
        ("ratio <= 1.5", 1.0, None, False),
        ("< 0", -0.1, None, True),
        (None, 1.0, None, None),
    ],
)
def test_a_target_refers_to_the_value_or_the_ratio(
    target: str | None, value: float, ratio: float | None, met: bool | None
) -> None:
    assert bench.target_met({"value": value, "ratio": ratio, "target": target}) is met


@pytest.mark.parametrize("target", ["fast", "5", "<= soon", "speed >= 5", "<= 250 ms or so"])
def test_an_invalid_target_raises(target: str) -> None:
    with pytest.raises(bench.BenchmarkError, match="a target is written"):
        bench.target_met({"value": 1.0, "ratio": 1.0, "target": target})


@pytest.mark.parametrize("row", [{"name": "x", "value": 1.0}, {**ROW, "speed": 3}])
def test_a_row_with_missing_or_unknown_fields_raises(row: dict) -> None:
    with pytest.raises(bench.BenchmarkError, match="a row needs"):
        bench.validate(row)


def test_the_table_shows_values_targets_and_results() -> None:
    rows = [{"benchmark": "b", **bench.validate(row)} for row in (ROW, {**ROW, "ratio": 4.0}, {**ROW, "target": None})]
    header, _, good, bad, free = bench.table(rows).splitlines()
    assert header.split() == ["benchmark", "measure", "value", "unit", "baseline", "ratio", "target", "note"]
    assert "1.94  s" in good and "11.6" in good and good.endswith("pass") and bad.endswith("MISS")
    assert "pass" not in free and "MISS" not in free
    assert good.index("s ") == bad.index("s ") == free.index("s ")


def test_the_file_contains_rows_and_machine(
    monkeypatch: pytest.MonkeyPatch, results: Path, modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, results, good=write_module(modules, "good_rows", f"return [{ROW!r}]")) == 0
    written = json.loads(results.read_text())
    assert written["rows"] == [{"benchmark": "good", **bench.validate(ROW)}] and written["rows"][0]["met"] is True
    assert written["machine"]["cores"] >= 1 and written["machine"]["python"] and written["failures"] == {}
    assert [path.name for path in results.parent.iterdir()] == ["bench.json"]
    assert "1 of 1 targets met." in capsys.readouterr().out


def test_a_missed_target_is_not_a_failure(
    monkeypatch: pytest.MonkeyPatch, results: Path, modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(monkeypatch, results, slow=write_module(modules, "slow_rows", f"return [{ {**ROW, 'ratio': 2.0}!r}]")) == 0
    )
    output = capsys.readouterr().out
    assert "MISS" in output and "0 of 1 targets met." in output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["raise RuntimeError('no weights')"], "no weights"),
        (["import os", "os._exit(3)"], "exited with code 3"),
        (["import os, signal", "os.kill(os.getpid(), signal.SIGKILL)"], "exited with code -9"),
        (["return [{'name': 'x'}]"], "a row needs"),
        (["return 3"], "'int' object is not iterable"),
    ],
)
def test_a_failing_benchmark_is_reported_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
    results: Path,
    modules: Path,
    capsys: pytest.CaptureFixture[str],
    lines: list[str],
    message: str,
) -> None:
    good = write_module(modules, "good_after_bad", f"return [{ROW!r}]")
    assert run(monkeypatch, results, bad=write_module(modules, "bad_rows", *lines), good=good) == 1
    output = capsys.readouterr().out
    assert "bad: FAILED" in output and message in output and "8 answers" in output
    assert message in json.loads(results.read_text())["failures"]["bad"]


def test_a_missing_benchmark_module_is_reported(
    monkeypatch: pytest.MonkeyPatch, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, results, missing="bench.no_such_benchmark") == 1
    assert "missing: FAILED" in capsys.readouterr().out


def test_every_registered_benchmark_module_exists() -> None:
    assert [name for name in bench.BENCHMARKS.values() if importlib.util.find_spec(name) is None] == []


def test_only_selects_benchmarks(monkeypatch: pytest.MonkeyPatch, results: Path, modules: Path) -> None:
    first, second = (
        write_module(modules, "one_row", f"return [{ROW!r}]"),
        write_module(modules, "two_rows", "raise RuntimeError"),
    )
    monkeypatch.setattr(bench, "BENCHMARKS", {"one": first, "two": second})
    assert bench.main(["--only", "one", "--json", str(results)]) == 0
    with pytest.raises(SystemExit):
        bench.main(["--only", "three", "--json", str(results)])


def test_first_page_raises_if_the_process_exits() -> None:
    with pytest.raises(RuntimeError, match="exited with code 7"):
        app.first_page(["-c", "raise SystemExit(7)"])


def test_first_page_waits_for_status_200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    count = 0
    def do_GET(self):
        Handler.count += 1
        open(os.environ["COUNT"], "w").write(str(Handler.count))
        self.send_response(200 if Handler.count > 3 else 503)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(os.environ["GRADIO_SERVER_PORT"])), Handler).serve_forever()
"""
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    assert app.first_page(["-c", server]) > 0
    assert (tmp_path / "count").read_text() == "4"
