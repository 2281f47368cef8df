"""Model types that have passed conformance: dropping tokens equals masking them."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Iterator
from importlib import resources

from packaging.version import Version

RESULTS = "tokencomp.conformance", "results"
PASSED = ("exact", "entry only")
# Their exactness is tested with a real tower, which has no method that conformance could replace.
TESTED = frozenset({"qwen2_audio"})
_local = threading.local()


@functools.cache
def _passed() -> dict[Version, frozenset[str]]:
    """By transformers release: the types that passed, from the results of conformance runs."""
    package, folder = RESULTS
    passed = {}
    for file in resources.files(package).joinpath(folder).iterdir():
        if file.name.endswith(".json"):
            table = json.loads(file.read_text(encoding="utf-8"))
            types = (name for name, row in table["types"].items() if row["status"] in PASSED)
            passed[Version(table["transformers"])] = TESTED.union(types)
    return passed


def verified_types() -> frozenset[str]:
    """Types that passed under the installed transformers, or the nearest older release listed.

    Under a release that is older than all of them, the types of the oldest.
    """
    import transformers

    table, installed = _passed(), Version(transformers.__version__)
    older = [release for release in table if release <= installed]
    return table[max(older) if older else min(table)]


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
