"""Models under a release of transformers that is newer than the tested ones: each verified once.

What a release changes can make answers wrong without notice. So the first `patch` of a model under
a newer release runs the checks of `verify` on a tiny model with its config. A model that passes is
noted on disk, in one file per model; later processes read the note:

    patch(model) ── release tested? ── yes ──────────────────────────────┐
                          │ no                                           │
                    note on disk? ── yes ────────────────────────────────┤
                          │ no                                           │
                    checks pass? ── yes ── write the note ───────────────┴─ patched
                          │ no
                    UntestedReleaseError
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tokencomp.adapters.verified import (
    ENV_ALLOW,
    allows_untested,
    newer_release,
    releases,
    unverified_accepted,
)
from tokencomp.conformance.checks import Compress
from tokencomp.conformance.verify import key_of, verify_model
from tokencomp.errors import UntestedReleaseError, UntestedReleaseWarning, UnverifiedModelError
from tokencomp.storage import write_json

logger = logging.getLogger("tokencomp")


def folder() -> Path:
    """The folder of notes: `$XDG_CACHE_HOME/tokencomp/verified`, by default in `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "tokencomp" / "verified"


def verify_release(model: Any, compress: Compress) -> str:
    """Verify a model under a newer release, unless a note says that it has passed.

    Returns "exact" or, where stages between layers are not, "entry only". Raises
    `UntestedReleaseError` if a check fails or cannot run.
    """
    release = newer_release()
    if not release:
        return "exact"
    newest = releases()[-1]
    if allows_untested():
        warnings.warn(
            f"transformers {release} was not tested with this tokencomp (newest: {newest}), and "
            f"{ENV_ALLOW} skips the check of {type(model).__name__}: answers may be wrong.",
            UntestedReleaseWarning,
            stacklevel=4,
        )
        return "exact"
    facts = _facts(model, release)
    path = folder() / f"{_digest(facts)}.json"
    status = _read(path, facts)
    if not status:
        try:
            with unverified_accepted():
                status = verify_model(model, compress).status
        except UnverifiedModelError as error:
            raise UntestedReleaseError(
                f"transformers {release} is newer than {newest}, the newest release that this "
                f"tokencomp was tested with, and a check of {type(model).__name__} failed there. "
                f"{error} Or install the tested release: pip install transformers=={newest}. Or "
                f"install a newer tokencomp. {ENV_ALLOW}=1 skips the check; answers may be wrong."
            ) from error
        _write(path, {**facts, "status": status})
    logger.info("%s: verified here on transformers %s (%s)", facts["model"], release, status)
    return status


def _facts(model: Any, release: str) -> dict[str, str]:
    """What a note depends on. A torch release of another minor number makes another note."""
    own, config, *classes = key_of(model)
    text = repr([config, *((path, [_name(c) for c in found]) for path, found in classes)])
    return {
        "model": _name(own),
        "content": hashlib.sha256(text.encode()).hexdigest(),
        "tokencomp": metadata.version("tokencomp"),
        "transformers": release,
        "torch": ".".join(torch.__version__.split(".")[:2]),
    }


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _digest(facts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _read(path: Path, facts: dict[str, str]) -> str:
    """The status in a note; "": there is none, or it cannot be read."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        known = note["status"] in ("exact", "entry only") and facts.items() <= note.items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return str(note["status"]) if known else ""


def _write(path: Path, note: dict[str, str]) -> None:
    try:
        write_json(path, note)
    except OSError as error:
        logger.warning(
            "%s: %s. The next process verifies the model again; XDG_CACHE_HOME names another "
            "folder.", path, error.strerror or error,
        )  # fmt: skip
