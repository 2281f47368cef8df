"""Arguments after `--`, which are for `vllm serve`, and those that are refused there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # it ships no types

from tokencomp.errors import OptionError

OWN = ("--host", "--api-key", "--allowed-local-media-path")
"""Flags that tokencomp must read itself, because its rules follow from them."""
SERVERS = ("--grpc", "--grpc-port")
"""Flags of further servers of vLLM, whose requests do not pass its middleware."""


def check_flags(flags: Sequence[str]) -> None:
    """Raise `OptionError` for flags that vLLM would take past the rules of this server."""
    for flag in OWN:
        if sets(flags, flag):
            own = flag.replace("local-", "")
            raise OptionError(f"{flag} after `--`: put {own} before it, where tokencomp sees it.")
    for flag in SERVERS:
        if sets(flags, flag):
            raise OptionError(
                f"{flag}: the key and the limits of tokencomp hold for HTTP alone. Leave it out, "
                "or run `vllm serve` itself."
            )


def given_flags(arguments: Sequence[str]) -> list[str]:
    """Names of the flags as vLLM reads them: with `-` for `_`, and those in files of `--config`."""
    names = [argument for argument in arguments if argument.startswith("--")]
    for text in _configs(arguments):
        try:
            content = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError):
            continue  # vLLM cannot read it either; its error says why
        pairs = content.items() if isinstance(content, dict) else ()
        # vLLM makes no flags of false and of empty lists.
        names += [f"--{key}" for key, value in pairs if value is not False and value != []]
    return [re.split(r"[=.]", name, maxsplit=1)[0].replace("_", "-") for name in names]


def written(arguments: Sequence[str]) -> str:
    """The arguments, and what is in files of `--config`."""
    return " ".join([*arguments, *_configs(arguments)])


def _configs(arguments: Sequence[str]) -> list[str]:
    """Contents of the files of `--config`."""
    texts = []
    for argument, value in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, _, path = argument.partition("=")
        if name == "--config":
            with contextlib.suppress(OSError, ValueError):
                texts.append(Path(path or value).read_text(encoding="utf-8"))
    return texts


def sets(flags: Sequence[str], flag: str) -> bool:
    """Whether a flag is among those given, of which argparse takes the beginnings."""
    return any(flag.startswith(name) for name in flags if len(name) > 2)
