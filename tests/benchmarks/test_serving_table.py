"""The table of serving under load: times by hand, a server of canned answers, and a trial."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks.gpu import load, recompute, serve_table, tables
from benchmarks.gpu.catalogue import LOADS
from benchmarks.gpu.contribution import read
from benchmarks.gpu.serving_file import ServingFile, percentile, table_lines
from tokencomp.errors import OptionError

NAME = "serving-qwen2.5-vl-7b"
COMMIT = "0" * 40
SMALL = load.Work(images=1, side=32, tokens=3)


class Canned(BaseHTTPRequestHandler):
    """Streams three pieces of text, or refuses requests of ratio 0.9."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        refused = body["mm_processor_kwargs"]["tokencomp"]["ratio"] == 0.9
        self.send_response(400 if refused else 200)
        self.end_headers()
        deltas = [{"role": "assistant"}, {"content": "a"}, {"content": "b"}, {"content": "c"}]
        for delta in [] if refused else deltas:
            line = json.dumps({"choices": [{"delta": delta}]})
            self.wfile.write(f"data: {line}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def canned() -> Iterator[str]:
    Canned.seen.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_clients_note_the_first_token_and_every_piece(canned: str) -> None:
    measured = load.load(canned, 0.5, 3, 5, 100, SMALL)
    assert [answer["pieces"] for answer in measured["requests"]] == [3] * 5
    assert all(0 < answer["first"] <= answer["total"] for answer in measured["requests"])
    urls = {body["messages"][0]["content"][0]["image_url"]["url"] for body in Canned.seen}
    assert len(urls) == 5, "no two requests have the same picture"
    refused = load.load(canned, 0.9, 1, 1, 0, SMALL)["requests"]
    assert "400" in refused[0]["error"]


def test_a_run_goes_on_where_it_stopped(canned: str, tmp_path: Path, monkeypatch) -> None:
    table = replace(
        LOADS[NAME], clients=(1, 2), ratios=(0.0, 0.5), per_client=1, least=1, work=SMALL
    )
    monkeypatch.setattr(serve_table, "server", lambda *_: contextlib.nullcontext(canned))
    folder = serve_table.run_loads(table, tmp_path / "runs")
    lines = (folder / serve_table.RECORDS).read_text().splitlines()
    assert [(json.loads(s)["clients"], json.loads(s)["ratio"]) for s in lines] == [
        (1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5),
    ]  # fmt: skip
    (folder / serve_table.RECORDS).write_text("\n".join(lines[:3]) + "\n")
    serve_table.run_loads(table, folder)
    again = (folder / serve_table.RECORDS).read_text().splitlines()
    assert again[:3] == lines[:3] and len(again) == 4
    with pytest.raises(OptionError, match="other settings"):
        serve_table.run_loads(replace(table, ratios=(0.0, 0.75)), folder)


def made_up(**changes: Any) -> dict[str, Any]:
    """A result file: 20 requests a setting, the fastest first."""
    loads = [
        {
            "ratio": ratio, "clients": 8, "seconds": seconds,
            "requests": [
                {"first": 0.01 * factor * (k + 1), "total": 1.0, "pieces": 10} for k in range(20)
            ],
        }
        for ratio, seconds, factor in ((0.0, 10.0, 2), (0.75, 5.0, 1))
    ]  # fmt: skip
    about = {
        "model": "m", "engine": "vllm", "work": {"images": 2}, "date": "2026-11-26",
        "commit": COMMIT, "versions": {"vllm": "1"}, "hardware": {"gpus": ["H100"]},
    }  # fmt: skip
    return {"table": NAME, "about": about, "loads": loads, **changes}


def test_the_table_follows_from_the_times(tmp_path: Path) -> None:
    assert percentile(list(range(1, 21)), 0.95) == 19 and percentile([3.0], 0.95) == 3.0
    file = ServingFile.model_validate(made_up())
    row = [cell.strip() for cell in table_lines(file.loads)[3].strip("|").split("|")]
    # The median of 10 … 200 ms is 105 ms, half of ratio 0's; 20 requests in 5 s, against 10 s.
    assert row == ["8", "0.75", "20", "0", "105", "190", "2.00", "4.00", "2.00", "40"]
    path = tmp_path / NAME / "H100.json"
    path.parent.mkdir()
    path.write_text(file.model_dump_json())
    assert read(path) == file
    assert recompute.main(["--results", str(tmp_path)]) == 0
    assert "| 8 | 0.75 | 20 | 0 | 105 |" in (tmp_path / "tables.md").read_text()


@pytest.mark.long
def test_the_trial_serves_the_embedded_model(tmp_path: Path, capsys) -> None:
    """The command of the table, with the server that runs on any machine."""
    pytest.importorskip("starlette")
    assert tables.main([NAME, "--dry-run", "--runs", str(tmp_path)]) == 0
    assert "the trial took every step" in capsys.readouterr().out
    file = tmp_path / "dry-run" / NAME / serve_table.RECORDS
    loads = [json.loads(line) for line in file.read_text().splitlines()]
    assert {load["ratio"] for load in loads} == {0.0, 0.75}
    assert all("error" not in answer for load in loads for answer in load["requests"])
