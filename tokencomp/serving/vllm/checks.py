"""Start-up checks: engine settings under which compression would be wrong, or is unproven."""

from __future__ import annotations

import os
from typing import Any

import vllm
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger

from tokencomp.errors import UnsupportedModelError
from tokencomp.serving.vllm import ENV_OFF, ENV_UNTESTED, TESTED_VERSIONS

logger = init_logger("vllm.tokencomp")


def check_engine(config: VllmConfig, offsets: bool) -> None:
    """Refuse engine settings that this plugin cannot serve exactly.

    Parameters
    ----------
    config
        The engine's configuration. With `offsets`, full CUDA graphs are turned into piecewise
        ones: a replayed full graph would not add the offsets.
    offsets
        True for models whose positions are completed in `forward` (M-RoPE).

    Raises
    ------
    UnsupportedModelError
    """
    wrong = [*_wrong(config), *(_wrong_for_offsets(config) if offsets else ())]
    unproven = [*_unproven(config), *(_unproven_for_offsets(config) if offsets else ())]
    if unproven and os.environ.get(ENV_UNTESTED) == "1":
        logger.warning("tokencomp: untested engine settings: %s", "; ".join(unproven))
        unproven = []
    if wrong or unproven:
        hint = f" Set {ENV_UNTESTED}=1 to try what is untested." if unproven else ""
        raise UnsupportedModelError(
            f"tokencomp cannot serve under these engine settings: {'; '.join(wrong + unproven)}."
            f"{hint} Set {ENV_OFF}=off to serve this model without tokencomp."
        )
    if offsets:
        _piecewise(config)


def check_version() -> list[str]:
    """The complaint about vLLM's version, if there is one."""
    given = vllm.__version__
    if given.startswith(tuple(f"{v}." for v in TESTED_VERSIONS)):
        return []
    tested = ", ".join(f"{v}.x" for v in TESTED_VERSIONS)
    return [f"vLLM {given} (tested: {tested}; install one of these)"]


def _wrong(config: VllmConfig) -> list[str]:
    multimodal: Any = config.model_config.multimodal_config
    if getattr(multimodal, "video_pruning_rate", None):
        return ["--video-pruning-rate compresses the same tokens; use one of the two"]
    return []


def _unproven(config: VllmConfig) -> list[str]:
    multimodal: Any = config.model_config.multimodal_config
    found = check_version()
    if getattr(multimodal, "mm_encoder_tp_mode", None) == "data":
        found.append("--mm-encoder-tp-mode data (use weights)")
    if config.ec_transfer_config is not None:
        found.append("a disaggregated encoder (--ec-transfer-config)")
    if config.kv_transfer_config is not None:
        found.append("disaggregated prefill or KV transfer (--kv-transfer-config)")
    return found


def _wrong_for_offsets(config: VllmConfig) -> list[str]:
    parallel, found = config.parallel_config, []
    if parallel.pipeline_parallel_size > 1:
        found.append("--pipeline-parallel-size above 1: later stages see no media (use tensor)")
    if parallel.use_ubatching:
        found.append("dual batch overlap slices positions (drop --enable-dbo)")
    if config.speculative_config is not None:
        found.append("speculative decoding: the drafter would see position columns")
    return found


def _unproven_for_offsets(config: VllmConfig) -> list[str]:
    if getattr(config, "use_v2_model_runner", False):
        return ["model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0; `tokencomp serve` does)"]
    return []


def _piecewise(config: VllmConfig) -> None:
    compilation = config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        logger.warning("tokencomp: CUDA graph mode %s → PIECEWISE", mode.name)
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
