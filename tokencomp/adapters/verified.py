"""Model types for which it has been checked that dropping tokens equals masking them."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Iterator
from importlib import resources

from packaging.version import Version

TABLE = "verified.json"
_local = threading.local()


@functools.cache
def _table() -> dict[str, list[str]]:
    text = resources.files("tokencomp.adapters").joinpath(TABLE).read_text(encoding="utf-8")
    return json.loads(text)


def verified_types() -> frozenset[str]:
    """Verified types under the installed transformers release, or the nearest older one listed.

    Under a release that is older than all of them, the types of the oldest.
    """
    import transformers

    table = {Version(release): types for release, types in _table().items()}
    installed = Version(transformers.__version__)
    older = [release for release in table if release <= installed]
    return frozenset(table[max(older) if older else min(table)])


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
