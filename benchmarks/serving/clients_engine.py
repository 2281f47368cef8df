"""Times one vLLM engine with requests that come at the same time; a child process of `clients.py`.

usage: python -m benchmarks.serving.clients_engine MODEL PLAN.json RESULTS.json
PLAN: {"engine": {LLM arguments}, "frames": n, "side": px, "rounds": n, "clients": [n, ...],
       "answer": tokens, "dtype": name, "device": "cpu" or "cuda", "pruning_flag": true or false,
       "arms": {name: ["image" or "video", tokencomp options or null]}}
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.serving.engine import ARGUMENTS, request, set_pruning_flag


def measure(llm: Any, plan: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Of every arm, one record per round and number of clients."""
    from vllm import SamplingParams

    first = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    answer = SamplingParams(max_tokens=plan["answer"], temperature=0, ignore_eos=True)
    seeds = iter(range(10**6))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in plan["arms"]}
    for number in range(-1, plan["rounds"]):  # round -1 warms up
        for clients in plan["clients"] if number >= 0 else plan["clients"][:1]:
            for name, (kind, spec) in plan["arms"].items():
                record: dict[str, Any] = {"clients": clients}
                for key, sampling in (("first", first), ("all", answer)):
                    prompts = [
                        request(next(seeds), plan["frames"], plan["side"], spec, kind)
                        for _ in range(clients)
                    ]
                    start = time.perf_counter()
                    out = llm.generate(prompts, sampling, use_tqdm=False)
                    record[key] = time.perf_counter() - start
                record["prompt"] = len(out[0].prompt_token_ids)
                if number >= 0:
                    results[name].append(record)
    return results


def main() -> None:
    from vllm import LLM

    model, plan_file, results_file = sys.argv[1:]
    plan = json.loads(Path(plan_file).read_text())
    if plan["pruning_flag"] and plan["device"] == "cpu":
        set_pruning_flag()
    limits = {"limit_mm_per_prompt": {"image": 1, "video": 1}, "max_num_seqs": max(plan["clients"])}
    graphs = {"enforce_eager": plan["device"] == "cpu", "dtype": plan["dtype"]}
    llm = LLM(model, **{**ARGUMENTS, **limits, **graphs, **plan["engine"]})
    Path(results_file).write_text(json.dumps(measure(llm, plan)))


if __name__ == "__main__":
    main()
