"""Signed transfer parameters: a decode reads blocks of its prompt alone, once, and in time.

    prefill  kv_transfer_params = {remote_host, remote_port, remote_block_ids, ...}
             adds "tokencomp": "TIME PROMPT SIGNATURE"
    decode   1. SIGNATURE is of these parameters, TIME and PROMPT    else 409: a field was changed
             2. PROMPT is the hash of its own prompt and media       else 409: roles differ
             3. TIME is within the prefill's lease of the blocks     else 409: blocks may be others'
             4. SIGNATURE is used for the first time                 else 409: blocks were freed

NIXL finds blocks by their numbers, and the prefill frees them when a decode has read them, or when
its lease is over. A decode that reads them later gets the KV cache of another prompt, answers
wrongly, and keeps the wrong blocks in its prefix cache. The key is that of the router, which both
roles have.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencomp.serving import KEY
from tokencomp.serving.limits import RequestError
from tokencomp.serving.vllm.process import ENV_METRICS
from tokencomp.serving.vllm.roles import ENV_ROUTER_KEY, KV_PARAMS

LEASE = 30.0  # seconds for which a prefill keeps blocks that nobody reads: vLLM's default
USED = "tokencomp-used-"  # files of used signatures, which all front ends of a server see


def lease_of(config: Any) -> float:
    """Seconds for which a prefill with this config of vLLM keeps blocks that nobody reads."""
    transfer = getattr(config, "kv_transfer_config", None)
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    return float(extra.get("kv_lease_duration", LEASE))


def hash_of(prompt: Mapping[str, Any]) -> str:
    """Hash of token ids and of media hashes, which contain options and release of tokencomp."""
    media = sorted((prompt.get("mm_hashes") or {}).items())
    content = [media, list(prompt["prompt_token_ids"])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def mark_of(prompt_hash: str, params: Mapping[str, Any], key: str | None) -> str:
    """The mark of parameters that a prefill hands over now."""
    now = f"{time.time():.3f}"
    return f"{now} {prompt_hash} {_signature(now, prompt_hash, params, key)}"


def _signature(now: str, prompt_hash: str, params: Mapping[str, Any], key: str | None) -> str:
    fields = {name: value for name, value in params.items() if name != KEY}
    content = json.dumps([now, prompt_hash, fields], sort_keys=True)
    return hmac.new((key or "").encode(), content.encode(), hashlib.sha256).hexdigest()


def check_transfer(
    prompt: Mapping[str, Any], params: Any, key: str | None = None, lease: float = LEASE
) -> None:
    """Compare the prompt of a decode with the prefill's; raises `RequestError` (400 or 409).

    After 409 the decode can answer the same request without these parameters.
    """
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
    parts = given.split(" ") if isinstance(given, str) else []
    if len(parts) != 3:
        raise RequestError(
            f"{KV_PARAMS} of a prefill without {KEY!r}, which says what the prefill has kept. "
            "Start the prefill with `tokencomp serve --engine vllm`, and let the router pass the "
            "whole object."
        )
    now, prompt_hash, signature = parts
    if not hmac.compare_digest(signature, _signature(now, prompt_hash, params, key)):
        raise _unusable(
            f"were changed after the prefill, or it has another {ENV_ROUTER_KEY}. Pass the whole "
            "object on as it is."
        )
    if prompt_hash != hash_of(prompt):
        raise RequestError(
            f"prefill and decode differ in this prompt: {params.get('remote_num_tokens')} tokens "
            f"there, {count} here, or other media, options or releases. Give both roles the same "
            "model name, --ratio, --reducer, --merge and release of tokencomp, or name the options "
            "in the request.",
            409,
        )
    age = time.time() - float(now)
    if age > lease:
        raise _unusable(
            f"are {age:.0f} s old, and the prefill frees blocks after {lease:.0f} s. Check the "
            "clocks of both nodes, or set kv_lease_duration of the connector on both."
        )
    if not _first_use(signature, lease):
        raise _unusable("were used before, and are for one use.")


def _unusable(reason: str) -> RequestError:
    return RequestError(
        f"{KV_PARAMS} {reason} Ask the prefill again, or the decode without {KV_PARAMS}.", 409
    )


def _first_use(signature: str, lease: float) -> bool:
    """Note a signature as used; False if it was. Signatures beyond the lease are forgotten."""
    folder = Path(os.environ.get(ENV_METRICS) or tempfile.gettempdir())
    for file in folder.glob(f"{USED}*"):
        with contextlib.suppress(OSError):  # another front end has removed it
            if file.stat().st_mtime < time.time() - 2 * lease:
                file.unlink()
    try:
        (folder / f"{USED}{signature}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
