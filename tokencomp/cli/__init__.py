"""The `tokencomp` command. Every command is one file that defines `command`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; user errors end in one message and exit code 2."""
    # Must be set before transformers is imported; what the user sets wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with one_message():
        from tokencomp.cli._app import build_app

        # Not list(...): the command module of that name is an attribute of this package.
        build_app()(args=[*(sys.argv[1:] if argv is None else argv)], prog_name="tokencomp")


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """End the process with a typed error's message instead of its traceback, exit code 2."""
    from tokencomp.errors import TokenCompError, missing_package

    try:
        yield
    except Exception as error:
        message: Any = missing_package(error) if isinstance(error, ModuleNotFoundError) else error
        kernels = sys.modules.get("tokencomp.kernels.errors")  # which import nothing of the package
        typed = TokenCompError if kernels is None else (TokenCompError, kernels.KernelError)
        if not isinstance(message, typed):
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
