"""`tokencomp play`: a page in the browser to try methods on your own pictures and clips."""

from __future__ import annotations

from typing import Annotated

import typer

from tokencomp.cli import _options as opt


@opt.flat
def command(
    source: opt.Source,
    frames: opt.Frames = "8",
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 7860,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Open a page: drop a picture or a clip, ask, move the ratio, and compare both answers.

    It shows the answers with and without compression, the kept patches over the picture and on
    every frame, visual tokens, the LLM's work and time. It runs offline.
    """
    from tokencomp.cli._playground import Playground, serve

    model, processor = source.loaded
    serve(Playground(model, processor, source.model, frames), host, port, browser)
