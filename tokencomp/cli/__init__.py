"""The `tokencomp` command. Every command is one file that defines `command`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; user errors end in one message and exit code 2."""
    # Must be set before transformers is imported; what the user sets wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):  # what their encoding lacks must not end a command
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            with contextlib.suppress(ValueError):  # closed
                stream.reconfigure(errors="replace")
    with one_message(), interrupted():
        from tokencomp.cli._app import build_app

        # Not list(...): the command module of that name is an attribute of this package.
        build_app()(args=[*(sys.argv[1:] if argv is None else argv)], prog_name="tokencomp")


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells and typer have it."""


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Print a message at Ctrl-C, which typer only turns into an exit code."""
    try:
        yield
    except SystemExit as leave:
        if leave.code == INTERRUPTED:
            print(
                "stopped. Where a command keeps its answers in a folder, the same command resumes.",
                file=sys.stderr,
            )
        raise


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """End the process with a typed error's message instead of its traceback, exit code 2."""
    from tokencomp.errors import TokenCompError, missing_package

    try:
        yield
    except (TokenCompError, _kernel_error(TokenCompError)) as error:
        _print(error)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        _print(missing)
        raise SystemExit(2) from None


def _print(error: Exception) -> None:
    try:
        from rich.console import Console
        from rich.markup import escape
    except ModuleNotFoundError:  # what is missing may be rich itself
        print(f"error: {error}", file=sys.stderr)
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {escape(str(error))}")


def _kernel_error(without: type[Exception]) -> type[Exception]:
    """The kernels' error type, or `without` if they are not imported."""
    module = sys.modules.get("tokencomp.kernels.errors")
    return without if module is None else module.KernelError
