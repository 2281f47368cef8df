"""What `tokencomp list` shows, as a file, so that names need neither torch nor transformers.

    python -m tokencomp.cli.list    # writes it; `make release` does

It counts only while the source is the one that it was written from, while no plugin brings a
reducer, and while torch is not loaded anyway. Otherwise the registries are asked.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tokencomp.storage import write_json

FILE = Path(__file__).with_name("catalogue.json")
PACKAGE = Path(__file__).parents[1]
SOURCES = ("reducers/*.py", "adapters/*.py", "serving/servable.py", "cli/list.py", "method.py")
PLUGINS = "tokencomp.reducers"


def source() -> str:
    """A digest of the files that say which reducers and families there are."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(PACKAGE.glob(pattern)):
            digest.update(file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def stored() -> dict[str, Any] | None:
    """The rows of the file by kind, or None if the registries must be asked."""
    if "torch" in sys.modules or metadata.entry_points(group=PLUGINS) or not FILE.exists():
        return None
    catalogue = json.loads(FILE.read_text(encoding="utf-8"))
    return catalogue["rows"] if catalogue["source"] == source() else None


def write(rows: dict[str, Any]) -> None:
    """Write the rows that the registries give."""
    write_json(FILE, {"source": source(), "rows": rows})
