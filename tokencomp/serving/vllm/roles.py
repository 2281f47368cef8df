"""Encoder, prefill and decode in different processes: what they may hand to each other.

    client ──► router ──► encoder   rows of every item, found by the item's hash (EC connector)
                     ├──► prefill   blocks of the KV cache (KV connector)
                     └──► decode    the answer

The router copies `kv_transfer_params` from the answer of the prefill into the request to the
decode. Some connectors find blocks by these numbers alone. A prefill and a decode with different
ratios, reducers or prompts would then answer wrongly, and so would a decode that reads blocks which
the prefill has given to another prompt meanwhile. Therefore `marks` signs these parameters.

A router may replace the pixels of an item by the grid that the encoder has reported in its
`ec_transfer_params`, by media hash. A prefill or decode with other options has another hash, under
which there are no rows, and it has no pixels to encode. It therefore refuses a hash that is not
among those of the encoder, and so does an engine that gets no rows of encoders.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.datastructures import Headers
from torch import Tensor

from tokencomp.serving.limits import RequestError

KV_PARAMS, EC_PARAMS = "kv_transfer_params", "ec_transfer_params"
ALL, ENCODE, PREFILL, DECODE = "all", "encode", "prefill", "decode"
ROLE_FLAGS = ("--kv-transfer-config", "--ec-transfer-config")
ENV_ROUTER_KEY, ROUTER_HEADER = "TOKENCOMP_ROUTER_KEY", "x-tokencomp-router"


# -- who may send transfer parameters --------------------------------------------------------------


def is_router(headers: Headers, key: str | None) -> bool:
    """Whether a request has the key of a router; raises `RequestError` (403) for a wrong key."""
    sent = headers.get(ROUTER_HEADER)
    if sent is None:
        return False
    if key is None or not hmac.compare_digest(sent.encode("latin-1", "replace"), key.encode()):
        raise RequestError(
            f"{ROUTER_HEADER}: not the key of a router of this server. Set {ENV_ROUTER_KEY} to one "
            "value for the router, prefill and decode.",
            403,
        )
    return True


def check_sender(fields: Mapping[str, Any], router: bool) -> None:
    """Refuse transfer parameters, which name hosts, of ordinary clients or in another form."""
    for name, value, direct in _transfers(fields):
        if value is None:
            continue
        if not router:
            raise RequestError(
                f"{name}: only a router may send it, with the key of {ENV_ROUTER_KEY} in the "
                f"header {ROUTER_HEADER}. Leave it out.",
                403,
            )
        if not direct or not isinstance(value, dict):
            raise RequestError(f"{name}: expected an object in the field of that name.")


def _transfers(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Names and values of transfer parameters, and whether they are in the documented field.

    vLLM also takes them from `vllm_xargs`, and on one path from `extra_args` of its parameters.
    """
    sampling = fields.get("sampling_params")
    extra = sampling.get("extra_args") if isinstance(sampling, dict) else None
    for name in (KV_PARAMS, EC_PARAMS):
        yield name, fields.get(name), True
        for inner in (fields.get("vllm_xargs"), extra):
            if isinstance(inner, dict):
                yield name, inner.get(name), False


# -- roles ----------------------------------------------------------------------------------------


def role_of(config: Any, params: Any) -> str:
    """The role that an engine with this config has for a request with these `kv_transfer_params`.

    `ALL` is the whole request, or all of it but the encoder.
    """
    encoder = getattr(config, "ec_transfer_config", None)
    if encoder is not None and encoder.is_ec_producer and not encoder.is_ec_consumer:
        return ENCODE
    asked = params if isinstance(params, dict) else {}
    kind = getattr(getattr(config, "kv_transfer_config", None), "kv_role", None)
    # What the request says precedes the config: connectors of both kinds serve both.
    if asked.get("do_remote_decode") or kind == "kv_producer":
        return PREFILL
    return DECODE if asked.get("do_remote_prefill") or kind == "kv_consumer" else ALL


def transfer_params(sampling: Any, name: str) -> Any:
    """The transfer parameters in the sampling parameters of a request, or None."""
    return (getattr(sampling, "extra_args", None) or {}).get(name)


def forget(client: Any, prompt: Mapping[str, Any]) -> None:
    """Take the media of a refused prompt out of the cache of vLLM's front end.

    It notes what it has sent, and would send the next request with the same media without them,
    while the engine never got them.
    """
    cache = getattr(getattr(client, "renderer", None), "mm_processor_cache", None)
    if cache is None:
        return
    for modality, items in (prompt.get("mm_kwargs") or {}).items():
        for key, item in zip(prompt["mm_hashes"][modality], items, strict=True):
            if item is not None:  # else the engine has it
                cache.invalidate(key)


# -- media without pixels --------------------------------------------------------------------------


def check_grids(prompt: Mapping[str, Any], sampling: Any, config: Any) -> None:
    """Refuse an item without pixels whose rows are nowhere; raises `RequestError` (400).

    A decode also needs them: if its KV cache is full, it computes a prompt again.
    """
    encoder = getattr(config, "ec_transfer_config", None)
    consumes = encoder is not None and encoder.is_ec_consumer
    stored = (transfer_params(sampling, EC_PARAMS) or {}) if consumes else {}
    for modality, items in (prompt.get("mm_kwargs") or {}).items():
        for key, item in zip(prompt["mm_hashes"][modality], items, strict=True):
            if item is None or _has_pixels(item):
                continue
            if key not in stored:
                raise RequestError(
                    f"a grid of modality {modality} without pixels, whose media hash {key[:16]} "
                    f"is not in {EC_PARAMS} of an encoder. Give all roles the same model name, "
                    "--ratio, --reducer, --merge and release of tokencomp, or name the options in "
                    f"the request; send the whole {EC_PARAMS} of the encoder, and start prefill "
                    "and decode as its consumers (--ec-transfer-config)."
                )
            _check_grid(modality, item, stored[key])


def _check_grid(modality: str, item: Mapping[str, Any], entry: Any) -> None:
    """Compare the grid of an item with the encoder's; another one has as many rows at most."""
    reported = entry.get("metadata") if isinstance(entry, Mapping) else None
    name = f"{modality}_grid_thw"
    given = getattr(item.get(name), "data", item.get(name))
    grid = [int(number) for number in given.flatten()] if isinstance(given, Tensor) else None
    if not isinstance(reported, Mapping) or reported.get(name) != grid:
        raise RequestError(
            f"{name} {grid}: the encoder has reported {(reported or {}).get(name)} in {EC_PARAMS}. "
            f"Send the grid and the whole {EC_PARAMS} of the encoder."
        )


def _has_pixels(item: Mapping[str, Any]) -> bool:
    """Whether vLLM can encode an item, or has its embeddings."""
    return any(name.startswith("pixel_values") or name.endswith("_embeds") for name in item)
