"""Servers of both engines as processes, with a client."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.serving import http

VLLM_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
"""Environment of vLLM processes that share the two cores of a test machine."""
VLLM = ["--enforce-eager", "--dtype", "float32", "--max-model-len", 8192, "--block-size", 32]
ARGUMENTS = {"hf": ["--max-model-len", 8192], "vllm": ["--", *VLLM, "--max-num-seqs", 16]}
METRICS = {
    "hf": {
        "running": "tokencomp_requests_running", "waiting": "tokencomp_requests_waiting",
        "ended": "tokencomp_end_to_end_seconds_count", "batches": "tokencomp_batch_size",
        "generated": "tokencomp_generated_tokens_total",
    },
    "vllm": {
        "running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting",
        "ended": "vllm:request_success_total", "batches": "",
        "generated": "vllm:generation_tokens_total",
    },
}  # fmt: skip


@dataclass
class Served:
    """A running server of a model that clients call "tiny"."""

    engine: str
    url: str
    process: subprocess.Popen
    folder: Path
    root: Path
    key: str
    routed: bool = False
    """Whether the test sends requests as a router."""

    @property
    def metrics(self) -> dict[str, str]:
        """Names of its metrics."""
        return METRICS[self.engine]

    @property
    def client(self) -> Any:
        """A client of OpenAI."""
        import openai

        return openai.OpenAI(
            base_url=self.url + "/v1", api_key=self.key or "none", max_retries=0, timeout=300
        )

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""
        return not any(http.metric(self.url, self.metrics[n]) for n in ("running", "waiting"))

    @property
    def begun(self) -> float:
        """Number of requests so far."""
        return sum(http.metric(self.url, self.metrics[n]) for n in ("running", "waiting", "ended"))

    def ask(self, *urls: str, text: str = http.QUESTION, **more: Any) -> Any:
        """Return the greedy answer, which goes on after an end token.

        `tokencomp` are options of the request, or `ratio` alone. Fields that OpenAI does not know
        may be among the others.
        """
        options = more.pop("tokencomp", None)
        if "ratio" in more:
            options = {"ratio": more.pop("ratio")}
        body = {"ignore_eos": True} | ({} if options is None else {"tokencomp": options})
        for name in ("repetition_penalty", "mm_processor_kwargs"):
            if name in more:
                body[name] = more.pop(name)
        return self.client.chat.completions.create(
            model="tiny", messages=more.pop("messages", None) or http.messages(text, *urls),
            max_tokens=more.pop("max_tokens", 8), temperature=0, extra_body=body, **more,
        )  # fmt: skip


@contextlib.contextmanager
def started(engine: str, folder: Path, root: Path, *arguments: Any, **env: str) -> Iterator[Served]:
    """Run a server of a folder; that on vLLM has a key, and the tests are skipped without vLLM."""
    key = ""
    if engine == "vllm":
        pytest.importorskip("vllm", reason="vllm is not installed")
        key, env = "secret", {**VLLM_ENV, "TOKENCOMP_API_KEY": "secret", **env}
    words = ["--engine", engine, "--model", folder, "--served-model-name", "tiny", *arguments]
    split = [] if "--" in arguments else ARGUMENTS[engine]
    env = {"OMP_NUM_THREADS": "1", **env}
    with http.process(root / "log", *words, *split, **env) as (url, process):
        yield Served(engine, url, process, folder, root, key, "TOKENCOMP_ROUTER_KEY" in env)


def session(leader: int) -> list[Path]:
    """Return the folders below /proc of the processes of a session that have not ended (Linux)."""
    folders = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, number = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # the process has ended
            continue
        if int(number) == leader and state != "Z":
            folders.append(folder)
    return folders
