"""Fill one published table on a GPU, and write the file to send.

    python -m benchmarks.gpu.tables images-qwen2.5-vl-7b
    python -m benchmarks.gpu.tables images-qwen2.5-vl-7b --dry-run   # two questions, any machine

Without a name it lists the tables with their hours. Needs `pip install -e ".[eval]"` and a clean
checkout; the table of serving needs vLLM instead (`pip install -e ".[vllm]"`). Stop it at any time:
run again, it goes on after the last finished batch of answers. The file comes to `results/NAME/`;
`results/README.md` says what to do with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu.catalogue import LOADS, TABLES, LoadTable, Table, table
from benchmarks.gpu.contribution import Contribution, ServingFile, collect
from benchmarks.gpu.serve_table import collect_loads, run_loads
from benchmarks.publishing import changed_code
from tokencomp.cli import main as tokencomp
from tokencomp.errors import OptionError, TokenCompError
from tokencomp.evaluation.environment import process_rank
from tokencomp.storage import write_text

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, runs: Path, results: Path, dry: bool) -> Path | None:
    """Take all steps; returns the result file, or None after a trial.

    Raises
    ------
    OptionError
        Code has uncommitted changes, or a step failed.
    """
    chosen = table(name)
    if dry:
        chosen, runs = chosen.dry(), runs / "dry-run"
    elif changed := changed_code(ROOT):
        raise OptionError(
            f"{', '.join(changed[:3])} has uncommitted changes: results need a clean checkout."
        )
    folder = runs / name
    if isinstance(chosen, LoadTable):
        run_loads(chosen, folder)
    else:
        run_steps(chosen, folder)
    if dry or process_rank()[0]:  # one process of several writes the file
        return None
    file: ServingFile | Contribution
    if isinstance(chosen, LoadTable):
        file = collect_loads(chosen, folder)
    else:
        file = collect(name, [folder / f"step-{n}" for n in range(len(chosen.steps))])
    gpu = "-".join(file.about.hardware.get("gpus", [])[:1]).replace(" ", "-") or "cpu"
    path = results / name / f"{gpu}-{file.about.commit[:9]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, file.model_dump_json(indent=1) + "\n")
    return path


def run_steps(chosen: Table, folder: Path) -> None:
    """Take all steps of a table of accuracy."""
    for number, arguments in enumerate(chosen.commands(str(folder))):
        print(
            f"step {number + 1} of {len(chosen.steps)}: tokencomp {' '.join(arguments)}", flush=True
        )
        try:
            tokencomp(arguments)
        except SystemExit as leave:
            if leave.code:
                raise OptionError(f"step {number + 1} ended with exit code {leave.code}.") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fill one published table on a GPU.")
    parser.add_argument("name", nargs="?", help="a table; without it, all are listed")
    parser.add_argument("--dry-run", action="store_true", help="two questions on a tiny model")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="run folders")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args(arguments)
    if options.name is None:
        every: list[Table | LoadTable] = [*TABLES.values(), *LOADS.values()]
        for one in every:
            print(f"{one.name:<28}{one.hours:>4g} h on one H100 (estimate)  {one.title}")
        return 0
    try:
        path = run(options.name, options.runs, options.results, options.dry_run)
    except TokenCompError as error:
        print(f"error: {error}")
        return 2
    if path is not None:
        print(f"send {path}: see results/README.md")
    elif options.dry_run:
        print("the trial took every step")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
