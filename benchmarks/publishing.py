"""Published numbers come from committed code.

Scripts that write results into `benchmarks/` call `published_from` first. It refuses a checkout
whose code has uncommitted changes, unless `--allow-dirty` is given, which marks the results.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.evaluation.environment import environment, provenance

__all__ = ["MARK", "add_argument", "changed_code", "environment", "provenance", "published_from"]

FOLDER = Path(__file__).resolve().parent
OUTPUTS = (".json", ".jsonl", ".md", ".svg")
MARK = "publishable"


def add_argument(parser: argparse.ArgumentParser) -> None:
    """`--allow-dirty`."""
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="run although the checkout has uncommitted changes; the results are marked as "
        "unpublishable",
    )


def changed_code(root: Path) -> list[str]:
    """Files with uncommitted changes that can change a number.

    Result files and pages under `benchmarks/` are left out: a run that stopped after some models
    has changed them itself, and has to be able to go on.
    """
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    paths = [line[3:].split(" -> ")[-1].strip('"') for line in status.splitlines()]
    return [p for p in paths if not (p.startswith("benchmarks/") and p.endswith(OUTPUTS))]


def published_from(out: Path, allow_dirty: bool, root: Path = FOLDER.parent) -> dict[str, Any]:
    """Check the checkout before a run; returns the facts that go into its provenance.

    Parameters
    ----------
    out
        Where results will be written. Results outside of `benchmarks/` are never published, so
        they need no clean checkout; they are marked like those of `--allow-dirty`.
    allow_dirty
        From the command line.
    root
        The checkout.

    Returns
    -------
    dict
        `commit`, and `publishable: False` where the checkout is not clean.

    Raises
    ------
    OptionError
        The code has uncommitted changes, or its commit is unknown.
    """
    try:
        head, changed = _git(root, "rev-parse", "HEAD").strip(), changed_code(root)
    except (OSError, subprocess.SubprocessError):
        head, changed = "", []
    if head and not changed:
        return {"commit": head}
    inside = (root / "benchmarks").resolve() in (out.resolve(), *out.resolve().parents)
    if inside and not allow_dirty:
        reason = f"uncommitted changes in {', '.join(changed[:3])}" if head else "no known commit"
        raise OptionError(
            f"results in {out} are published, and this checkout has {reason}. Commit the changes, "
            "choose another output folder, or use --allow-dirty, which marks the results as "
            "unpublishable."
        )
    return {"commit": f"{head}+dirty" if head else None, MARK: False}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
