"""Memory of the vLLM server over thousands of requests whose media no cache has seen."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import openai
from support.serving import http
from support.serving.processes import session
from support.serving.vllm_environment import ENV

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux"),
]

SETTINGS = [
    {"reducer": "divprune", "ratio": 0.75}, {"ratio": 0}, {"reducer": "bipartite", "ratio": 0.5},
    {"reducer": "uniform", "ratio": 0.9}, {"ratio": 0.75, "tower_ratio": 0.5}, {"ratio": 2},
]  # fmt: skip
WARM_UP, ROUND, MOST_ROUNDS = 2500, 500, 8


def resident(leader: int) -> int:
    """Return the memory in MB of all processes of a server, which are one session.

    Pages of files are left out, as the system takes them back when it likes.
    """
    kilobytes = 0
    for folder in session(leader):
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:  # the process has ended
            continue
        kilobytes += sum(int(x.split()[1]) for x in lines if x.startswith("RssAnon:"))
    return kilobytes // 1000


def test_memory_stays_flat_over_2000_requests(tiny_folder: Any, tmp_path: Path) -> None:
    """The engine keeps no media (`--mm-processor-cache-gb 0`), so each request is processed.

    Its KV cache is small, because memory of the cache counts only when it is first written.
    """
    arguments = ["--engine", "vllm", "--model", tiny_folder("qwen2_vl")]
    arguments += ["--served-model-name", "tiny", "--", "--enforce-eager", "--dtype", "float32"]
    arguments += ["--max-model-len", 2048, "--max-num-seqs", 16, "--mm-processor-cache-gb", 0]
    arguments += ["--num-gpu-blocks-override", 256]
    with http.process(tmp_path / "log", *arguments, **ENV) as (url, process):
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300)

        def ask(number: int) -> None:
            options = SETTINGS[number % len(SETTINGS)]
            wrong = options["ratio"] > 1
            media = [http.image_url(number, 112, 84)] * (number % 7 > 0 or wrong)
            if number % 20 == 0 and not wrong:
                media = [http.video_url(number, 4)]
            request = {
                "model": "tiny", "messages": http.messages("What color?", *media), "max_tokens": 2,
                "extra_body": {"mm_processor_kwargs": {"tokencomp": options}},
            }  # fmt: skip
            if wrong:
                with pytest.raises(openai.BadRequestError):
                    client.chat.completions.create(**request)
            else:
                client.chat.completions.create(**request)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(WARM_UP)))
            first, seen = WARM_UP, [resident(process.pid)]
            for _ in range(MOST_ROUNDS):  # until the allocators of all processes have filled
                list(pool.map(ask, range(first, first + ROUND)))
                first, seen = first + ROUND, [*seen, resident(process.pid)]
                if seen[-1] - seen[-2] < 5:
                    break
            list(pool.map(ask, range(first, first + 2000)))
        after = resident(process.pid)
        print(f"resident memory in MB after {WARM_UP} requests and rounds of {ROUND}: {seen}")
        print(f"after 2000 more: {after}")
        assert after - seen[-1] < 50
        assert http.metric(url, "vllm:num_requests_running") == 0
