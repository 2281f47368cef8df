"""Run one in-process vLLM engine on a list of jobs, as a child process of the tests.

usage: python -m support.serving.vllm_driver MODEL JOBS.json RESULTS.json

JOBS is {"engine": {LLM arguments}, "runs": [[job, ...], ...]}, and the jobs of a run are submitted
together. A job is {"name", "prompt", "media", "tokencomp", "tokens", "positions", "reset"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)  # fmt: skip

RECORDED: list = []
DEFAULTS: dict = dict(
    max_model_len=4096, max_num_batched_tokens=2048, enforce_eager=True, dtype="float32",
    block_size=32, enable_prefix_caching=True, limit_mm_per_prompt={"image": 4, "video": 2},
    max_num_seqs=8,
)  # fmt: skip


def record_positions() -> None:
    """Record the positions that the stock `forward` receives in the end."""
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
    from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

    def recording(stock):
        def forward(self, input_ids, positions, *args, **kwargs):
            RECORDED.append(positions.clone())
            return stock(self, input_ids, positions, *args, **kwargs)

        return forward

    for model in (
        Qwen2VLForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
        Qwen3_5ForConditionalGeneration,
    ):
        model.forward = recording(model.forward)


def request(job: dict) -> dict:
    """Return the engine's input for a job."""
    from support.serving import media as tiny

    media = tiny.media(job["media"])
    if job.get("metadata") and "video" in media:
        media["video"] = [(v, tiny.metadata(len(v))) for v in media["video"]]
    result = {"prompt": job["prompt"], "multi_modal_data": media}
    if "tokencomp" in job:
        result["mm_processor_kwargs"] = {"tokencomp": job["tokencomp"]}
    return result


def run(llm, jobs: list[dict]) -> dict:
    """Submit jobs together and return their results, or their error, by name."""
    from vllm import SamplingParams

    if any(job.get("reset") for job in jobs):
        llm.reset_prefix_cache()
    RECORDED.clear()
    sampling = [
        SamplingParams(max_tokens=job.get("tokens", 8), temperature=0, logprobs=1, ignore_eos=True)
        for job in jobs
    ]
    try:
        outputs = llm.generate([request(job) for job in jobs], sampling, use_tqdm=False)
    except Exception as error:
        return {job["name"]: {"error": f"{type(error).__name__}: {error}"} for job in jobs}
    results = {}
    for job, out in zip(jobs, outputs, strict=True):
        best = out.outputs[0]
        results[job["name"]] = {
            "tokens": list(best.token_ids),
            "logprobs": [d[t].logprob for t, d in zip(best.token_ids, best.logprobs, strict=True)],
            "prompt": len(out.prompt_token_ids),
            "cached": out.num_cached_tokens,
        }
        if job.get("positions"):
            results[job["name"]]["positions"] = [p.tolist() for p in RECORDED]
    return results


def main() -> None:
    model, jobs_file, results_file = sys.argv[1:]
    plan = json.loads(Path(jobs_file).read_text())
    from vllm import LLM

    record_positions()
    start = time.time()
    llm = LLM(model, **{**DEFAULTS, **plan["engine"]})
    results: dict = {"seconds to load": time.time() - start}
    for jobs in plan["runs"]:
        results.update(run(llm, jobs))
    Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
