"""Times one vLLM engine; a child process of `run.py`.

usage: python -m benchmarks.serving.engine MODEL ARMS.json RESULTS.json
ARMS: {"engine": {LLM arguments}, "frames": n, "side": px, "rounds": n, "requests": n,
       "arms": {name: tokencomp options or null}, "pruning_flag": true or false}
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ARGUMENTS: dict[str, Any] = {
    "max_model_len": 4096, "max_num_batched_tokens": 4096, "dtype": "float32",
    "enforce_eager": True, "enable_prefix_caching": False, "mm_processor_cache_gb": 0,
    "limit_mm_per_prompt": {"image": 0, "video": 1}, "max_num_seqs": 8,
}  # fmt: skip
TURN = (
    "<|im_start|>user\n<|vision_start|><|{kind}_pad|><|vision_end|>What happens in the {kind}?"
    "<|im_end|>\n<|im_start|>assistant\n"
)


def request(seed: int, frames: int, side: int, spec: Any, kind: str = "video") -> dict[str, Any]:
    """A prompt that no cache has seen, with a video of slowly changing noise or an image."""
    random = np.random.RandomState(seed)
    text: dict[str, Any] = {"prompt": TURN.format(kind=kind)}
    if spec is not None:
        text["mm_processor_kwargs"] = {"tokencomp": spec}
    if kind == "image":
        small = Image.fromarray((random.rand(16, 16, 3) * 255).astype("uint8"))
        return {**text, "multi_modal_data": {"image": small.resize((side, side))}}
    base, step = random.rand(side, side, 3), random.rand(side, side, 3) / frames
    video = np.stack([((base + i * step) % 1 * 255).astype("uint8") for i in range(frames)])
    known = {
        "fps": 2.0, "total_num_frames": frames, "duration": frames / 2,
        "frames_indices": list(range(frames)), "video_backend": "bench", "do_sample_frames": False,
    }  # fmt: skip
    return {**text, "multi_modal_data": {"video": [(video, known)]}}


def set_pruning_flag() -> None:
    """Let vLLM's own pruning run on CPU: `CPUModelRunner.load_model` leaves the runner's flag off,
    so the position columns of pruned embeddings are never cut off."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    own = CPUModelRunner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        self.is_multimodal_pruning_enabled = True

    CPUModelRunner.load_model = load_model


def main() -> None:
    model, plan_file, results_file = sys.argv[1:]
    plan = json.loads(Path(plan_file).read_text())
    from vllm import LLM, SamplingParams

    if plan["pruning_flag"]:
        set_pruning_flag()
    llm = LLM(model, **ARGUMENTS, **plan["engine"])
    first = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    several = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    shape = plan["frames"], plan["side"]
    seeds = iter(range(10**6))
    results: dict[str, Any] = {
        name: {"ttft": [], "cpu": [], "throughput": [], "prompt": 0} for name in plan["arms"]
    }
    for spec in plan["arms"].values():  # warm up
        llm.generate([request(next(seeds), *shape, spec)], several, use_tqdm=False)
    for _ in range(plan["rounds"]):
        for name, spec in plan["arms"].items():  # interleaved: drift affects all equally
            one = [request(next(seeds), *shape, spec)]
            start, cpu = time.perf_counter(), time.process_time()
            out = llm.generate(one, first, use_tqdm=False)
            results[name]["ttft"].append(time.perf_counter() - start)
            results[name]["cpu"].append(time.process_time() - cpu)
            results[name]["prompt"] = len(out[0].prompt_token_ids)
            many = [request(next(seeds), *shape, spec) for _ in range(plan["requests"])]
            start = time.perf_counter()
            llm.generate(many, several, use_tqdm=False)
            results[name]["throughput"].append(plan["requests"] / (time.perf_counter() - start))
    for values in results.values():
        values["cpu_median_s"] = statistics.median(values["cpu"])
        values["ttft_median_s"] = statistics.median(values["ttft"])
        values["throughput_median_rps"] = statistics.median(values["throughput"])
    Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
