"""Run engines in turn, each in another child process of the tests.

usage: python -m support.serving.roles_driver MODEL STEPS.json RESULTS.json

STEPS is [{"name", "engine": {LLM arguments}, "runs": [[job, ...], ...], "kill": bool}]. All engines
are forks of one process, which imports vLLM once. One that is to be killed ends without any
clean-up after its runs. The results of a step have those of `vllm_driver.run` by number of the run
and name of the job, "encoded" (the number of items that the vision tower has encoded after the
start) and "widths" (what vLLM's connectors announce, by modality).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from support.serving import vllm_driver

ENCODED: list[int] = []


def count_encoded() -> None:
    """Record how many items every call of the vision step has."""
    from tokencomp.serving.vllm.model import CompressingModel

    stock = CompressingModel.embed_multimodal

    def embed(self: Any, **kwargs: Any) -> Any:
        items = stock(self, **kwargs)
        ENCODED.append(len(items))
        return items

    CompressingModel.embed_multimodal = embed  # type: ignore[method-assign]


def step(model: str, plan: dict[str, Any], file: Path) -> None:
    """Start an engine, run its jobs, and write the results."""
    from vllm import LLM

    llm = LLM(model, **{**vllm_driver.DEFAULTS, **plan["engine"]})
    ENCODED.clear()
    runs = [vllm_driver.run(llm, jobs) for jobs in plan["runs"]]
    transfer = llm.llm_engine.vllm_config.ec_transfer_config
    widths = transfer.mm_encoder_output_widths if transfer is not None else {}
    file.write_text(json.dumps({"runs": runs, "encoded": sum(ENCODED), "widths": widths}))
    if plan.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    model, steps_file, results_file = sys.argv[1:]
    import vllm  # noqa: F401  # before the forks

    vllm_driver.record_positions()
    count_encoded()
    fork, results = multiprocessing.get_context("fork"), {}
    for plan in json.loads(Path(steps_file).read_text()):
        file = Path(results_file).with_suffix(".step")
        file.unlink(missing_ok=True)
        process = fork.Process(target=step, args=(model, plan, file))
        process.start()
        process.join()
        wanted = -signal.SIGKILL if plan.get("kill") else 0
        assert process.exitcode == wanted, (plan["name"], process.exitcode)
        results[plan["name"]] = json.loads(file.read_text())
    Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
