"""mlx_vlm.server with compression: `tokencomp serve --engine mlx`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_vlm.server import cli, generation

from tokencomp.errors import MergeWarning, OptionError, UnsupportedCacheError
from tokencomp.mlx.method import MlxMethod
from tokencomp.mlx.patching import apply, check_model
from tokencomp.mlx.weights import QUANTIZED

REFUSED = {
    "--reranker-model": "this model would run uncompressed",
    "--embedding-model": "this model would run uncompressed",
    "--decision-model": "this model would run uncompressed",
    "--draft-model": "drafts on compressed prompts were not tested",
    "--reload": "the server would run in another process, uncompressed",
}


def run(model: str, method: MlxMethod, host: str, port: int, extra: Sequence[str]) -> None:
    """Serve a model until the process is interrupted; `extra` are arguments of mlx_vlm.server.

    Every other model that the server loads is patched as well, or refused: a folder now, a model of
    the hub when it is loaded. Options that would run without compression raise `OptionError`.
    """
    names = [a.partition("=")[0] for a in extra if len(a) > 2]
    for flag, reason in REFUSED.items():
        if any(flag.startswith(name) for name in names):  # argparse takes the beginning of a name
            raise OptionError(f"{flag}: {reason}. Leave it out, or run mlx_vlm.server itself.")
    config = Path(model) / "config.json"
    if config.is_file():
        check_model(json.loads(config.read_text(encoding="utf-8")).get("model_type"))
    original = generation.ResponseGenerator._initialize_model

    def initialize(self: Any) -> None:
        original(self)
        fitting = method
        if method.weighs and self.kv_bits is not None:
            if method.merge is True:
                raise UnsupportedCacheError(QUANTIZED)
            warnings.warn(f"merge='auto' drops here: {QUANTIZED}", MergeWarning, stacklevel=2)
            fitting = replace(method, merge=False)
        apply(self.model, fitting)

    generation.ResponseGenerator._initialize_model = initialize
    own = ["--model", model, "--host", host, "--port", str(port)]
    sys.argv = ["mlx_vlm.server", *own, *extra]
    cli.main()
