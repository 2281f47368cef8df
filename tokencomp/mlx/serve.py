"""mlx_vlm.server with compression: `tokencomp serve --engine mlx`, or, without typer and torch,

python -m tokencomp.mlx.serve --ratio 0.5 [--reducer NAME] -- --model MODEL [--port 8080 ...]

`--budget 512` may stand in place of `--ratio`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_vlm.server import cli, generation

from tokencomp.errors import OptionError, TokenCompError
from tokencomp.mlx.method import ChosenMethod
from tokencomp.mlx.patching import check_model, patch

REFUSED = {
    "--reranker-model": "this model would run uncompressed",
    "--embedding-model": "this model would run uncompressed",
    "--draft-model": "drafts on compressed prompts were not tested",
}


def command(
    model: str,
    ratio: float | None,
    budget: int | None,
    reducer: str,
    host: str,
    port: int,
    extra: Sequence[str],
) -> list[str]:
    """The command line that serves a model; `extra` are further arguments of mlx_vlm.server.

    Raises
    ------
    OptionError, RatioError, UnknownNameError, MissingDependencyError
        An option that mlx_vlm.server would take without compression, or a bad ratio or reducer.
    UnsupportedModelError
        A folder with a model of another type; models of the hub are looked at when they are loaded.
    """
    refuse_arguments(extra)
    method = ChosenMethod(ratio, reducer, budget=budget)
    config = Path(model) / "config.json"
    if config.is_file():
        check_model(json.loads(config.read_text(encoding="utf-8")).get("model_type"))
    own = ["--reducer", reducer, *f"--{method.amount}".split(), "--"]
    address = ["--model", model, "--host", host, "--port", str(port)]
    return [sys.executable, "-m", "tokencomp.mlx.serve", *own, *address, *extra]


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Raise `OptionError` for models that the server would run uncompressed, or drafts."""
    for flag, reason in REFUSED.items():
        if any(a == flag or a.startswith(f"{flag}=") for a in arguments):
            raise OptionError(f"{flag}: {reason}. Leave it out, or run mlx_vlm.server itself.")


def patch_loaded_models(method: ChosenMethod) -> None:
    """Let every model that the server loads be patched; one that cannot be is refused."""
    original = generation.ResponseGenerator._initialize_model

    def initialize(self: Any) -> None:
        original(self)
        patch(self.model, method.ratio, method.reducer, budget=method.budget, **method.options)

    generation.ResponseGenerator._initialize_model = initialize


def main() -> None:
    """Run the server until the process is interrupted."""
    parser = argparse.ArgumentParser(
        prog="tokencomp.mlx.serve",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--ratio", help="fraction of visual tokens that leave; 0.5 by default")
    parser.add_argument("--budget", type=int, help="instead: tokens of every image that stay")
    parser.add_argument("--reducer", default="auto", help="which stay: kcentre by default")
    parser.add_argument("arguments", nargs="*", help="of mlx_vlm.server, after `--`")
    args = parser.parse_args()
    try:
        refuse_arguments(args.arguments)
        method = ChosenMethod(args.ratio, args.reducer, budget=args.budget)
    except TokenCompError as error:
        parser.exit(2, f"error: {error}\n")
    patch_loaded_models(method)
    sys.argv = ["mlx_vlm.server", *args.arguments]
    cli.main()


def run(*arguments: Any) -> None:
    """Replace this process with the server. Arguments and errors are those of `command`."""
    line = command(*arguments)
    os.execv(line[0], line)


if __name__ == "__main__":
    main()
