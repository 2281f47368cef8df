"""The `tokencomp` command. Every command is one file that defines `command`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence


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
    except (TokenCompError, _kernel_error(TokenCompError)) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        raise SystemExit(2) from None


def _kernel_error(without: type[Exception]) -> type[Exception]:
    """The kernels' error type, or `without` if they are not imported."""
    module = sys.modules.get("tokencomp.kernels.errors")
    return without if module is None else module.KernelError
