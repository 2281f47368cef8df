"""mlx_vlm.server with compression: `tokencomp serve --engine mlx`, or, without typer and torch,

python -m tokencomp.mlx.serve --ratio 0.5 [--reducer NAME] -- --model MODEL [--port 8080 ...]

`--budget 512` may stand in place of `--ratio`.
"""

from __future__ import annotations

import argparse
import json
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


def run(
    model: str,
    ratio: float | None,
    budget: int | None,
    reducer: str,
    host: str,
    port: int,
    extra: Sequence[str],
) -> None:
    """Serve a model until the process is interrupted; `extra` are arguments of mlx_vlm.server.

    Raises
    ------
    OptionError, RatioError, UnknownNameError, MissingDependencyError
        An option that mlx_vlm.server would take without compression, or a bad ratio or reducer.
    UnsupportedModelError
        A folder with a model of another type; models of the hub are looked at when they are loaded.
    """
    method = ChosenMethod(ratio, reducer, budget=budget)
    config = Path(model) / "config.json"
    if config.is_file():
        check_model(json.loads(config.read_text(encoding="utf-8")).get("model_type"))
    serve(method, ["--model", model, "--host", host, "--port", str(port), *extra])


def serve(method: ChosenMethod, arguments: Sequence[str]) -> None:
    """Run mlx_vlm.server, which patches every model that it loads, or refuses it.

    Raises `OptionError` for models that it would run uncompressed, or drafts.
    """
    for flag, reason in REFUSED.items():
        if any(a == flag or a.startswith(f"{flag}=") for a in arguments):
            raise OptionError(f"{flag}: {reason}. Leave it out, or run mlx_vlm.server itself.")
    original = generation.ResponseGenerator._initialize_model

    def initialize(self: Any) -> None:
        original(self)
        patch(self.model, method.ratio, method.reducer, budget=method.budget, **method.options)

    generation.ResponseGenerator._initialize_model = initialize
    sys.argv = ["mlx_vlm.server", *arguments]
    cli.main()


def main() -> None:
    """Run the server from the command line above."""
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
        serve(ChosenMethod(args.ratio, args.reducer, budget=args.budget), args.arguments)
    except TokenCompError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
