"""Times engines that take turns in one process; a child process of `ratio_zero.py`.

usage: python -m benchmarks.serving.pair MODEL PLAN.json RESULTS.json
PLAN: {"frames": n, "side": px, "rounds": n,
       "arms": {name: {"engine": {LLM arguments}, "request": tokencomp options or null}}}

Arms of equal engine arguments share an engine. Engines are built in the order of the arms. Each
round asks every arm once, and the order is reversed from round to round.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.serving.engine import ARGUMENTS, request

WARM_UP = 2


def main() -> None:
    model, plan_file, results_file = sys.argv[1:]
    plan = json.loads(Path(plan_file).read_text())
    from vllm import LLM, SamplingParams

    engines: dict[str, Any] = {}
    for arm in plan["arms"].values():
        key = json.dumps(arm["engine"])
        if key not in engines:
            engines[key] = LLM(model, **ARGUMENTS, **arm["engine"])
    first = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    results: dict[str, Any] = {name: {"cpu": []} for name in plan["arms"]}
    order = list(plan["arms"])
    for number in range(WARM_UP + plan["rounds"]):
        for name in order:
            arm = plan["arms"][name]
            # All arms of a round see the same video. No cache keeps it.
            media = request(number, plan["frames"], plan["side"], arm["request"])
            cpu = time.process_time()
            engines[json.dumps(arm["engine"])].generate([media], first, use_tqdm=False)
            if number >= WARM_UP:
                results[name]["cpu"].append(time.process_time() - cpu)
        order.reverse()
    for values in results.values():
        values["cpu_median_s"] = statistics.median(values["cpu"])
    Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
