"""Model types that have passed conformance: dropping tokens equals masking them.

The results of conformance runs are one JSON file per transformers release. A release without
results of its own takes those of the nearest older release, and one that is older than all of them
takes the oldest.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Iterator
from importlib import resources
from typing import Any

from packaging.version import Version

from tokencomp.errors import unknown_name

RESULTS = resources.files("tokencomp.conformance").joinpath("results")
PASSED = ("exact", "entry only")
STATUSES = (*PASSED, "refused", "unverified")
# Their exactness is tested with a real tower, which has no method that conformance could replace.
TESTED = frozenset({"qwen2_audio"})
_local = threading.local()


def releases() -> list[str]:
    """Transformers releases with results, oldest first."""
    names = [f.name.removesuffix(".json") for f in RESULTS.iterdir() if f.name.endswith(".json")]
    return sorted(names, key=Version)


def load(release: str) -> dict[str, Any]:
    """The table of a release.

    Raises
    ------
    UnknownNameError
        No results of that release.
    """
    if release not in releases():
        raise unknown_name("transformers release", release, releases())
    file = RESULTS.joinpath(f"{release}.json")
    table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return table


def nearest(release: str) -> str:
    """The release itself, the nearest older one with results, or the oldest with results."""
    older = [r for r in releases() if Version(r) <= Version(release)]
    return older[-1] if older else releases()[0]


def verified_types() -> frozenset[str]:
    """Types that passed under the installed transformers, or under the `nearest` release."""
    import transformers

    return _passed(transformers.__version__)


@functools.cache
def _passed(installed: str) -> frozenset[str]:
    types = load(nearest(installed))["types"]
    return TESTED.union(name for name, row in types.items() if row["status"] in PASSED)


def accepts_unverified() -> bool:
    """Whether this thread takes models of unverified types, see `unverified_accepted`."""
    return getattr(_local, "accepted", 0) > 0


@contextlib.contextmanager
def unverified_accepted() -> Iterator[None]:
    """Take models of unverified types inside the block, in this thread: to verify them."""
    _local.accepted = getattr(_local, "accepted", 0) + 1
    try:
        yield
    finally:
        _local.accepted -= 1
