"""Check model types against their reference, and write what they have shown.

    python -m benchmarks.conformance [TYPE ...] [-o RESULTS.json] [--page PAGE.md]

Without types: all multimodal types of the installed transformers, in about ten minutes. The exit
code is 1 if a type does worse than in the results that the package carries for this release, or
for the nearest one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.conformance import table
from benchmarks.conformance.run import check_types
from tokencomp.cli import one_message


def main(arguments: list[str] | None = None) -> int:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("-o", "--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--page", type=Path, help="write them as a Markdown page as well")
    args = parser.parse_args(arguments)

    def done(name: str, row: dict[str, Any]) -> None:
        why = table.first_sentence(row["reason"], 100)
        print(f"{row['status']:<12}{name:<28}{why}", flush=True)

    results = table.new_table(check_types(args.types or None, done))
    if args.output is not None:
        table.save(results, args.output)
    if args.page is not None:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        args.page.write_text(table.markdown(results), encoding="utf-8")
    print(", ".join(f"{n} {status}" for status, n in table.counts(results).items()))
    worse = table.worse(results)
    for name, change in worse.items():
        print(f"worse: {name} {change}")
    return 1 if worse else 0


if __name__ == "__main__":
    with one_message():
        raise SystemExit(main())
