"""The typer application, assembled from the command files."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from typing import Annotated

import typer

HELP = "Visual-token compression for multimodal LLMs: fewer tokens at a budget you state."


def build_app() -> typer.Typer:
    """Every module of this package without a leading "_" has a `command`, or a group `app`."""
    app = typer.Typer(
        name="tokencomp",
        help=HELP,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    package = importlib.import_module("tokencomp.cli")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            command_module = importlib.import_module(f"tokencomp.cli.{module.name}")
            if hasattr(command_module, "app"):
                app.add_typer(command_module.app, name=module.name)
                continue
            settings = getattr(command_module, "CONTEXT", None)
            app.command(module.name, context_settings=settings)(command_module.command)
    return app


def _version(show: bool) -> None:
    if show:
        from tokencomp import __version__

        typer.echo(f"tokencomp {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from tokencomp.errors import RatioWarning

    if not sys.warnoptions:  # commands that compress show the ratios reached, servers as a metric
        warnings.simplefilter("ignore", RatioWarning)
