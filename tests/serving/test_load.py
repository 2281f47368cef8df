"""Memory of both servers over thousands of requests, and a vLLM server that fails."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai")

from safetensors.torch import load_file, save_file  # noqa: E402
from support.serving import http  # noqa: E402
from support.serving.processes import session, started  # noqa: E402

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux"),
]

SETTINGS = [
    {"reducer": "divprune", "ratio": 0.75}, {"ratio": 0}, {"reducer": "bipartite", "ratio": 0.5},
    {"reducer": "uniform", "ratio": 0.9}, {"ratio": 0.75, "tower_ratio": 0.5}, {"ratio": 2},
]  # fmt: skip
WARM_UP, ROUND, MOST_ROUNDS, LAST = 2500, 500, 8, 2000
# vLLM keeps no media, so that each request is processed, and few blocks of its KV cache: memory of
# the cache counts only when it is first written.
SMALL = ["--", "--enforce-eager", "--dtype", "float32", "--max-model-len", 2048]
SMALL += ["--max-num-seqs", 16, "--mm-processor-cache-gb", 0, "--num-gpu-blocks-override", 256]


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


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_memory_stays_flat_over_2000_requests(
    engine: str, tiny_folder: Any, tmp_path: Path
) -> None:
    """Once the allocators of all processes have filled."""
    arguments = SMALL if engine == "vllm" else []
    with started(engine, tiny_folder("qwen2_vl"), tmp_path, *arguments) as served:

        def ask(number: int) -> None:
            options = SETTINGS[number % len(SETTINGS)]
            wrong = options["ratio"] > 1
            media = [http.image_url(number, 112, 84)] * (number % 7 > 0 or wrong)
            if number % 20 == 0 and not wrong:
                media = [http.video_url(number, 4)]
            if wrong:
                with pytest.raises(openai.BadRequestError):
                    served.ask(*media, tokencomp=options)
            else:
                served.ask(*media, tokencomp=options, max_tokens=2)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(WARM_UP)))
            first, seen = WARM_UP, [resident(served.process.pid)]
            for _ in range(MOST_ROUNDS):
                list(pool.map(ask, range(first, first + ROUND)))
                first, seen = first + ROUND, [*seen, resident(served.process.pid)]
                if seen[-1] - seen[-2] < 5:
                    break
            list(pool.map(ask, range(first, first + LAST)))
        after = resident(served.process.pid)
        print(f"resident memory in MB after {WARM_UP} requests and rounds of {ROUND}: {seen}")
        print(f"after {LAST} more: {after}")
        assert after - seen[-1] < 50
        assert served.idle


def overflowing(folder: Path, target: Path) -> Path:
    """Copy a model, with a patch embedding so large that features of pictures are NaN."""
    shutil.copytree(folder, target)
    (weights,) = target.glob("*.safetensors")
    tensors = load_file(weights)
    (name,) = (n for n in tensors if n.endswith("patch_embed.proj.weight"))
    tensors[name] *= 1e30
    save_file(tensors, weights, {"format": "pt"})
    return target


def wait_until_ended(leader: int) -> None:
    """Wait until no process of a server is left."""
    end = time.monotonic() + 20
    while session(leader):
        assert time.monotonic() < end
        time.sleep(0.1)


def variable(pid: int, name: str) -> str:
    """Return a variable in the environment with which a process was started."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(p.partition(b"=")[2].decode() for p in pairs if p.startswith(name.encode() + b"="))


def test_a_server_whose_engine_dies_ends_with_an_error(tiny_folder: Any, tmp_path: Path) -> None:
    """So that a supervisor starts it again; the folder of its metrics goes with it."""
    with started("vllm", tiny_folder("qwen2_vl"), tmp_path, *SMALL) as served:
        leader = served.process.pid
        metrics = Path(variable(leader, "PROMETHEUS_MULTIPROC_DIR"))
        assert metrics.is_dir()
        engines = [
            folder for folder in session(leader) if (folder / "comm").read_text()[:4] == "VLLM"
        ]
        for folder in engines:
            if int(folder.name) != leader:
                os.kill(int(folder.name), signal.SIGKILL)
        assert served.process.wait(timeout=60) == 70
        assert not metrics.exists()
        wait_until_ended(leader)


def test_one_client_cannot_spoil_answers_of_others_nor_leave_processes_behind(
    tiny_folder: Any, tmp_path: Path
) -> None:
    """On vLLM, whose KV cache has a few blocks here, which are soon used again."""
    model = overflowing(tiny_folder("qwen2_vl"), tmp_path / "model")
    few = ["--", "--enforce-eager", "--dtype", "float32", "--max-model-len", 512, "--block-size"]
    few += [32, "--num-gpu-blocks-override", 20, "--no-enable-prefix-caching"]
    with started("vllm", model, tmp_path, *few) as served:
        texts = [f"Question {i}: " + "word " * 20 * (i % 4) for i in range(12)]

        def answers() -> list[str]:
            made = [served.ask(text=text, max_tokens=16) for text in texts]
            return [answer.choices[0].message.content for answer in made]

        before = answers()
        assert len(set(before)) > 1
        for i in range(8):
            served.ask(http.image_url(i), ratio=0)
        assert http.metric(served.url, "tokencomp_nonfinite_items_total") == 8
        assert answers() == before

        leader = served.process.pid
        assert len(session(leader)) > 2  # server, engine and worker
        os.kill(leader, signal.SIGKILL)
        served.process.wait()
        wait_until_ended(leader)
