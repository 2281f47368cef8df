"""Times vLLM engines; a child process of the benchmarks of serving.

usage: python -m benchmarks.serving.engine MODEL PLAN.json RESULTS.json
PLAN: {"job": "first", "turns" or "clients", "engine": {LLM arguments}, "frames": n,
       "side": px, "rounds": n, "pruning_flag": true or false, and what the job reads,
       "arms": {name: {"request": tokencomp options or null, "kind": "video" or "image",
                       "engine": {further LLM arguments}}}}

Arms of equal engine arguments share an engine. Engines are built in the order of the arms. No cache
has seen the media of a request.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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
ANSWER, WARM_UP = 16, 2
Results = dict[str, Any]


def request(seed: int, frames: int, side: int, spec: Any, kind: str = "video") -> dict[str, Any]:
    """A prompt with a video of slowly changing noise or an image."""
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


class Engines:
    """The engines of all arms of a plan."""

    def __init__(self, model: str, plan: dict[str, Any]) -> None:
        from vllm import LLM

        self.plan, self.engines = plan, dict[str, Any]()
        for arm in plan["arms"].values():
            arguments = {**ARGUMENTS, **plan["engine"], **arm.get("engine", {})}
            if (key := json.dumps(arm.get("engine"))) not in self.engines:
                self.engines[key] = LLM(model, **arguments)

    def ask(self, name: str, seeds: Sequence[int], tokens: int) -> tuple[float, float, int]:
        """Seconds and processor seconds of answers of so many tokens; tokens of the first prompt.

        Every seed is a request to one arm, and all of them come at once.
        """
        from vllm import SamplingParams

        arm, size = self.plan["arms"][name], (self.plan["frames"], self.plan["side"])
        kind = arm.get("kind", "video")
        prompts = [request(seed, *size, arm["request"], kind) for seed in seeds]
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        engine = self.engines[json.dumps(arm.get("engine"))]
        start, cpu = time.perf_counter(), time.process_time()
        out = engine.generate(prompts, sampling, use_tqdm=False)
        times = time.perf_counter() - start, time.process_time() - cpu
        return *times, len(out[0].prompt_token_ids)


def first(engines: Engines, plan: dict[str, Any]) -> Results:
    """Time to the first token of one request, and throughput of `requests`, per round and arm."""
    seeds = itertools.count()
    results: Results = {
        name: {"ttft": [], "cpu": [], "throughput": [], "prompt": 0} for name in plan["arms"]
    }
    for name in plan["arms"]:  # warm up
        engines.ask(name, [next(seeds)], ANSWER)
    for _ in range(plan["rounds"]):
        for name, found in results.items():  # interleaved: drift affects all equally
            seconds, cpu, found["prompt"] = engines.ask(name, [next(seeds)], 1)
            found["ttft"].append(seconds)
            found["cpu"].append(cpu)
            many = [next(seeds) for _ in range(plan["requests"])]
            found["throughput"].append(len(many) / engines.ask(name, many, ANSWER)[0])
    for values in results.values():
        values["cpu_median_s"] = statistics.median(values["cpu"])
        values["ttft_median_s"] = statistics.median(values["ttft"])
        values["throughput_median_rps"] = statistics.median(values["throughput"])
    return results


def turns(engines: Engines, plan: dict[str, Any]) -> Results:
    """Processor time of the first token. Every round asks each arm about the same video.

    The order is reversed from round to round.
    """
    results: Results = {name: {"cpu": []} for name in plan["arms"]}
    order = list(plan["arms"])
    for number in range(WARM_UP + plan["rounds"]):
        for name in order:
            cpu = engines.ask(name, [number], 1)[1]
            if number >= WARM_UP:
                results[name]["cpu"].append(cpu)
        order.reverse()
    for values in results.values():
        values["cpu_median_s"] = statistics.median(values["cpu"])
    return results


def clients(engines: Engines, plan: dict[str, Any]) -> Results:
    """Of every arm, one record per round and number of clients that ask at the same time."""
    seeds = itertools.count()
    results: Results = {name: [] for name in plan["arms"]}
    for number in range(-1, plan["rounds"]):  # round -1 warms up
        for count in plan["clients"] if number >= 0 else plan["clients"][:1]:
            for name in plan["arms"]:
                record: dict[str, Any] = {"clients": count}
                for key, tokens in (("first", 1), ("all", plan["answer"])):
                    asked = [next(seeds) for _ in range(count)]
                    record[key], _, record["prompt"] = engines.ask(name, asked, tokens)
                if number >= 0:
                    results[name].append(record)
    return results


JOBS: dict[str, Callable[[Engines, dict[str, Any]], Results]] = {
    "first": first,
    "turns": turns,
    "clients": clients,
}


def main() -> None:
    model, plan_file, results_file = sys.argv[1:]
    plan = json.loads(Path(plan_file).read_text())
    if plan["pruning_flag"]:
        set_pruning_flag()
    results = JOBS[plan["job"]](Engines(model, plan), plan)
    Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
