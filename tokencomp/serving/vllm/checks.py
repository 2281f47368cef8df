"""Start-up checks for engine settings with which compression is wrong or untested."""

from __future__ import annotations

import os

from vllm import envs
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from tokencomp.errors import UnsupportedModelError
from tokencomp.serving import ENV_RULES, ENV_UNTESTED
from tokencomp.serving.vllm import ENV_OFF

logger = init_logger("vllm.tokencomp")
DRAFTERS = (
    "speculative decoding under model runner V1, whose drafters read and write wrong cache slots "
    "after an image, with or without tokencomp (vllm-project/vllm#54498): use runner V2 "
    "(VLLM_USE_V2_MODEL_RUNNER=1, on a GPU)"
)
PIPELINES = (
    "--pipeline-parallel-size above 1 under model runner V2: later stages see no media (use "
    "tensor, or vLLM 0.33 with VLLM_USE_V2_MODEL_RUNNER=0)"
)
MERGING_BACKENDS = ("CPU_ATTN", "FLASH_ATTN")
EC_CONNECTORS = ("ECExampleConnector", "ECCPUConnector")  # of encoders in other processes
KV_CONNECTORS = ("ExampleConnector", "NixlConnector")
BY_NUMBER = ("NixlConnector",)  # find blocks by their numbers, not by what is in them
HEAD_SIZE_OF_CONFIG = ("LMCache", "MoRIIO")  # beginnings of their names


def check_engine(config: VllmConfig, offsets: bool, merging: bool = False) -> None:
    """Refuse engine settings with wrong results, and untested ones unless they are allowed.

    With `offsets` (M-RoPE), full CUDA graphs of model runner V1 become piecewise ones, because a
    replayed full graph would not add them. With `merging`, attention has wider heads.
    """
    wrong = _wrong_for_offsets(config, merging) if offsets or merging else []
    if merging:
        wrong += _wrong_for_merging(config)
    if getattr(config.model_config.multimodal_config, "video_pruning_rate", None):
        wrong.append("--video-pruning-rate compresses the same tokens; use one of the two")
    if getattr(config, "lora_config", None) is not None and current_platform.is_cpu():
        wrong.append(
            "--enable-lora on a CPU, where vLLM answers prompts without an adapter by the last one "
            "of the batch, with or without tokencomp"
        )
    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        wrong.append("VLLM_USE_RUST_FRONTEND, which moves requests past processor and middleware")
    untested = _untested(config)
    if untested and os.environ.get(ENV_UNTESTED) == "1":
        logger.warning("tokencomp: untested engine settings: %s", "; ".join(untested))
        untested = []
    if wrong or untested:
        hint = f" Set {ENV_UNTESTED}=1 to try what is untested." if untested else ""
        raise UnsupportedModelError(
            f"tokencomp cannot serve under these engine settings: {'; '.join(wrong + untested)}."
            f"{hint} Set {ENV_OFF}=off to serve this model without tokencomp."
        )
    if offsets and not runs_v2(config):
        _piecewise(config)


def runs_v2(config: VllmConfig) -> bool:
    """Whether the engine has model runner V2, the only one from vLLM 0.34 on."""
    return bool(getattr(config, "use_v2_model_runner", True))


def _untested(config: VllmConfig) -> list[str]:
    settings = []
    encoder, blocks = _connector(config, "ec"), _connector(config, "kv")
    if encoder and encoder not in EC_CONNECTORS:
        settings.append(
            f"EC connector {encoder} (--ec-transfer-config; use {' or '.join(EC_CONNECTORS)})"
        )
    if blocks and blocks not in KV_CONNECTORS:
        settings.append(
            f"KV connector {blocks} (--kv-transfer-config; use {' or '.join(KV_CONNECTORS)})"
        )
    if blocks in BY_NUMBER and ENV_RULES not in os.environ:
        settings.append(
            f"{blocks} without `tokencomp serve`, which compares the prompts of prefill and decode"
        )
    return settings


def _connector(config: VllmConfig, kind: str) -> str:
    """Name of the connector that hands features ("ec") or blocks ("kv") to other engines, or ""."""
    transfer = getattr(config, f"{kind}_transfer_config")
    return getattr(transfer, f"{kind}_connector", None) or ""


def _wrong_for_offsets(config: VllmConfig, merging: bool) -> list[str]:
    """Return the settings with which offsets or sizes of rows give wrong results."""
    parallel, settings = config.parallel_config, []
    if parallel.pipeline_parallel_size > 1 and runs_v2(config):
        settings.append(PIPELINES)
    if runs_v2(config) and not merging:
        return settings  # it corrects positions before the forward pass, also for drafters
    if parallel.use_ubatching:
        settings.append("dual batch overlap slices rows, not what we know of them (--enable-dbo)")
    if config.speculative_config is not None:
        settings.append("speculative decoding: drafters know no sizes" if merging else DRAFTERS)
    return settings


def _wrong_for_merging(config: VllmConfig) -> list[str]:
    """Return the settings with which attention with wider heads gives wrong results, or none."""
    settings, backend = [], config.attention_config.backend
    if config.parallel_config.prefill_context_parallel_size > 1:
        settings.append("prefill context parallelism reorders rows, not their sizes (--merge)")
    if (name := _connector(config, "kv")).startswith(HEAD_SIZE_OF_CONFIG):
        settings.append(f"{name} takes the head size from the config, not from layers (--merge)")
    if backend is not None and backend.name not in MERGING_BACKENDS:
        settings.append(f"attention backend {backend.name} takes no wider heads (--merge)")
    return settings


def _piecewise(config: VllmConfig) -> None:
    """Replace full CUDA graphs with piecewise ones, so that `forward` runs in every step."""
    compilation = config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        logger.warning("tokencomp: CUDA graph mode %s → PIECEWISE", mode.name)
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
