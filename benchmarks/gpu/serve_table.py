"""Fill a table of serving under load: one server, all ratios in turn at every number of clients.

python -m benchmarks.gpu.serve_table --model FOLDER --engine vllm --runs FOLDER   # a short one
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.gpu.catalogue import LOADS, LoadTable
from benchmarks.gpu.contribution import Load, ServingFile, table_lines
from benchmarks.gpu.load import load, server
from tokencomp.errors import OptionError
from tokencomp.evaluation.environment import environment
from tokencomp.storage import read_object, write_json, write_lines, write_text

RECORDS, MANIFEST, LOG = "loads.jsonl", "manifest.json", "server.log"


def run_loads(table: LoadTable, folder: Path) -> Path:
    """Measure what is missing in `folder`; finished loads stay.

    Raises
    ------
    OptionError
        The server does not start, or the folder holds loads of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _finished(table, folder)
    loads = list(itertools.product(table.clients, table.ratios))
    missing = [(c, r) for c, r in loads if (c, r) not in {(d["clients"], d["ratio"]) for d in done}]
    if missing:
        arguments = ["--engine", table.engine, *table.arguments]
        with server(table.model, arguments, folder / LOG) as address:
            for ratio in table.ratios:  # compiles kernels, fills pools
                load(address, ratio, 1, 1, 10**6 + round(1000 * ratio), table.work)
            for clients, ratio in missing:
                print(f"{clients} clients at ratio {ratio:g}", flush=True)
                first = 10**4 * (1 + loads.index((clients, ratio)))
                measured = load(address, ratio, clients, table.requests(clients), first, table.work)
                done.append({"ratio": ratio, "clients": clients, **measured})
                write_lines(folder / RECORDS, done)
    return folder


def _finished(table: LoadTable, folder: Path) -> list[dict[str, Any]]:
    """Loads of an earlier call with the same settings."""
    settings = table.settings
    manifest = folder / MANIFEST
    if not manifest.exists():
        write_json(manifest, {"settings": settings, **environment()})
    known = read_object(manifest).get("settings")
    if known != settings:
        raise OptionError(
            f"{folder} holds loads of other settings ({known}) than {settings}. Give another "
            "--runs folder, or remove this one."
        )
    file = folder / RECORDS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def collect_loads(table: LoadTable, folder: Path) -> ServingFile:
    """The result file of a finished folder.

    Raises
    ------
    OptionError
        It does not fit the schema, or the code had uncommitted changes.
    """
    manifest = read_object(folder / MANIFEST)
    about = {
        "model": table.model,
        "engine": table.engine,
        "work": vars(table.work),
        **{k: manifest.get(k) for k in ("date", "commit", "versions", "hardware")},
    }
    loads = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
    try:
        return ServingFile.model_validate({"table": table.name, "about": about, "loads": loads})
    except ValidationError as error:
        raise OptionError(f"these loads cannot be contributed: {error}.") from error


def main() -> None:
    """Measure a few loads of any model, for the first hour on a GPU."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm")
    parser.add_argument("--runs", type=Path, required=True, help="where the files go")
    parser.add_argument("--trial", action="store_true", help="two small requests of each load")
    args = parser.parse_args()
    table = next(iter(LOADS.values()))
    if args.trial:
        table = table.dry()
    arguments = table.arguments if args.engine == table.engine else ("--max-batch", "16")
    table = replace(table, model=args.model, engine=args.engine, arguments=arguments)
    if not args.trial:
        table = replace(table, ratios=(0.0, 0.75), clients=(1, 16), per_client=2, least=16)
    folder = run_loads(table, args.runs)
    loads = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
    checked = [Load.model_validate(load) for load in loads]
    write_text(folder / "loads.md", "\n".join(table_lines(checked)) + "\n")


if __name__ == "__main__":
    main()
