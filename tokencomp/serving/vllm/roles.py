"""Encoder, prefill and decode in different processes: what they may hand to each other.

    client ──► router ──► encoder   rows of every item, found by the item's hash (EC connector)
                     ├──► prefill   blocks of the KV cache (KV connector)
                     └──► decode    the answer

The router copies `kv_transfer_params` from the answer of the prefill into the request to the
decode. Some connectors find blocks by these numbers alone. A prefill and a decode with different
ratios, reducers or prompts would then answer wrongly, or the engine would end. Therefore the front
end of the prefill adds a mark to `kv_transfer_params`, a hash of the prompt and of its media, and
the front end of the decode refuses another mark.

A router may replace the pixels of an item by the grid that the encoder has reported in its
`ec_transfer_params`, by media hash. A prefill or decode with other options has another hash, under
which there are no rows, and it has no pixels to encode. It therefore refuses a hash that is not
among those of the encoder, and so does an engine that gets no rows of encoders.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.serving import KEY
from tokencomp.serving.limits import RequestError

KV_PARAMS, EC_PARAMS = "kv_transfer_params", "ec_transfer_params"
ALL, ENCODE, PREFILL, DECODE = "all", "encode", "prefill", "decode"
ROLE_FLAGS = ("--kv-transfer-config", "--ec-transfer-config")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


# -- who may send transfer parameters --------------------------------------------------------------


def router_networks(routers: Sequence[str]) -> tuple[Network, ...]:
    """The networks of `--router`; raises `OptionError` for what is no address."""
    networks = []
    for text in routers:
        try:
            networks.append(ipaddress.ip_network(text))
        except ValueError:
            raise OptionError(
                f"--router {text!r}: expected an address or a network, such as 10.0.0.7 or "
                "10.1.0.0/16."
            ) from None
    return tuple(networks)


def is_router(scope: Any, networks: Sequence[Network]) -> bool:
    """Whether a request comes from an address of `--router`."""
    try:
        address = ipaddress.ip_address(str((scope.get("client") or ("",))[0]))
    except ValueError:  # a socket file
        return False
    return any(address in network for network in networks)


def check_sender(fields: Mapping[str, Any], router: bool) -> None:
    """Refuse transfer parameters, which name hosts, of ordinary clients or in another form."""
    for name, value, direct in _transfers(fields):
        if value is None:
            continue
        if not router:
            raise RequestError(
                f"{name}: only a router may send it. Leave it out, or ask the operator to name "
                "this address with --router.",
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


# -- prefill and decode ----------------------------------------------------------------------------


def transfer_params(sampling: Any, name: str) -> Any:
    """The transfer parameters in the sampling parameters of a request, or None."""
    return (getattr(sampling, "extra_args", None) or {}).get(name)


def mark_of(prompt: Mapping[str, Any]) -> str:
    """Hash of token ids and of media hashes, which contain options and release of tokencomp."""
    content = [sorted(prompt["mm_hashes"].items()), list(prompt["prompt_token_ids"])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def forget(client: Any, prompt: Mapping[str, Any]) -> None:
    """Take the media of a refused prompt out of the cache of vLLM's front end.

    It notes what it has sent, and would send the next request with the same media without them,
    while the engine never got them.
    """
    cache = getattr(getattr(client, "renderer", None), "mm_processor_cache", None)
    if cache is None:
        return
    for modality, items in prompt["mm_kwargs"].items():
        for key, item in zip(prompt["mm_hashes"][modality], items, strict=True):
            if item is not None:  # else the engine has it
                cache.invalidate(key)


def check_transfer(prompt: Mapping[str, Any], params: Any) -> None:
    """Compare the prompt of a decode with the prefill's; raises `RequestError` (400)."""
    if not isinstance(params, dict):
        return
    if params.get("do_remote_decode") and params.get("remote_block_ids"):
        raise RequestError(
            "remote_block_ids with do_remote_decode: blocks of an earlier turn on the decode "
            "cannot be checked. Leave them out; the prefill holds such blocks in its prefix cache."
        )
    if not params.get("do_remote_prefill"):
        return
    given, count = params.get(KEY), len(prompt["prompt_token_ids"])
    if given is None:
        raise RequestError(
            f"{KV_PARAMS} of a prefill without {KEY!r}, which says what the prefill has kept. "
            "Start the prefill with `tokencomp serve --engine vllm`, and let the router pass the "
            "whole object."
        )
    if given != mark_of(prompt):
        raise RequestError(
            f"prefill and decode differ in this prompt: {params.get('remote_num_tokens')} tokens "
            f"there, {count} here, or other media, options or releases. Give both roles the same "
            "model name, --ratio, --reducer, --merge and release of tokencomp, or name the options "
            "in the request."
        )


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
            if item is not None and not _has_pixels(item) and key not in stored:
                raise RequestError(
                    f"a grid of modality {modality} without pixels, whose media hash {key[:16]} "
                    f"is not in {EC_PARAMS} of an encoder. Give all roles the same model name, "
                    "--ratio, --reducer, --merge and release of tokencomp, or name the options in "
                    f"the request; send the whole {EC_PARAMS} of the encoder, and start prefill "
                    "and decode as its consumers (--ec-transfer-config)."
                )


def _has_pixels(item: Mapping[str, Any]) -> bool:
    """Whether vLLM can encode an item, or has its embeddings."""
    return any(name.startswith("pixel_values") or name.endswith("_embeds") for name in item)
