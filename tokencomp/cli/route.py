"""`tokencomp route`: one address for prefills and decodes of vLLM."""

from __future__ import annotations

from typing import Annotated

import typer

from tokencomp.cli import _options as opt


def command(
    decode: Annotated[
        list[str],
        typer.Option("--decode", help="Address of a decode, http://10.0.0.8:8200; repeatable."),
    ],
    prefill: Annotated[
        list[str] | None,
        typer.Option(
            "--prefill",
            help="Address of a prefill, http://10.0.0.7:8100; repeatable. Without one that can be "
            "reached, decodes answer alone.",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    router_key: opt.RouterKey = None,
    api_key: opt.ApiKey = None,
    allowed_host: opt.AllowedHost = None,
    shutdown_timeout: opt.ShutdownTimeout = 60,
) -> None:
    """Route chat completions to `tokencomp serve --engine vllm` in two roles (docs/nodes.md).

    Each request goes to the prefill and the decode with the fewest requests. The checks of bodies,
    hosts, keys and content types are those of the servers. Prefill and decode know the router by
    the key that all three have in TOKENCOMP_ROUTER_KEY.
    """
    from tokencomp.errors import MissingDependencyError, install
    from tokencomp.serving.bind import Bind

    try:
        from tokencomp.serving.router import run_router
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"routing needs {error.name}: {install('serve')}.") from None
    bind = Bind(host, port, api_key, tuple(allowed_host or ()), shutdown_timeout)
    run_router(prefill or (), decode, router_key, bind)
