"""Model types that have passed conformance: dropping tokens equals masking them.

Results are stored in one JSON file per transformers release. Other releases use those of the
nearest older release with results, or else of the oldest.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import resources
from typing import Any

from packaging.version import Version

RESULTS = resources.files("tokencomp.conformance").joinpath("results")
PASSED = ("exact", "entry only")
STATUSES = (*PASSED, "refused", "unverified")
# Tested with a real tower instead, which has no method that conformance could replace.
TESTED = frozenset({"qwen2_audio"})
ENV_ALLOW = "TOKENCOMP_ALLOW_UNTESTED"
_accepted = ContextVar("accepted", default=False)


def releases() -> list[str]:
    """Transformers releases with results, oldest first."""
    names = [f.name.removesuffix(".json") for f in RESULTS.iterdir() if f.name.endswith(".json")]
    return sorted(names, key=Version)


def load(release: str) -> dict[str, Any]:
    """The results of a release."""
    file = RESULTS.joinpath(f"{release}.json")
    table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return table


def nearest(release: str) -> str:
    """The release, the nearest older one with results, or the oldest with results."""
    older = [r for r in releases() if Version(r) <= Version(release)]
    return older[-1] if older else releases()[0]


def newer_release() -> str:
    """The installed transformers release if it is newer than every one with results, else ""."""
    import transformers

    installed: str = transformers.__version__
    return installed if Version(installed) > Version(releases()[-1]) else ""


def standing() -> str:
    """What is known of the installed transformers release, in words."""
    import transformers

    if not newer_release():
        tested = transformers.__version__ in releases()
        words = "tested" if tested else f"as {nearest(transformers.__version__)}, which was tested"
        return f"transformers {transformers.__version__}: {words}"
    check = "check skipped" if allows_untested() else "each model is verified here once"
    newest = releases()[-1]
    return f"transformers {transformers.__version__}: newer than the tested {newest}, {check}"


def allows_untested() -> bool:
    """Whether the environment allows a newer release without a check of the model."""
    return os.environ.get(ENV_ALLOW, "").lower() in ("1", "true", "on", "yes")


def verified_types() -> frozenset[str]:
    """Types that passed under the installed transformers, or under the `nearest` release."""
    import transformers

    return _passed(transformers.__version__)


@functools.cache
def _passed(installed: str) -> frozenset[str]:
    types = load(nearest(installed))["types"]
    return TESTED.union(name for name, row in types.items() if row["status"] in PASSED)


def accepts_unverified() -> bool:
    """Whether this thread accepts unverified model types, see `unverified_accepted`."""
    return _accepted.get()


@contextlib.contextmanager
def unverified_accepted() -> Iterator[None]:
    """Accept unverified model types in this thread, inside the block, to verify them."""
    token = _accepted.set(True)
    try:
        yield
    finally:
        _accepted.reset(token)
