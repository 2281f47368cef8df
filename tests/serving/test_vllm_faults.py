"""A vLLM server whose vision tower overflows, and which is killed in the end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import openai
from safetensors.torch import load_file, save_file
from support.serving import http
from support.serving.processes import session
from support.serving.vllm_environment import ENV

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux"),
]


def overflowing(folder: Path, target: Path) -> Path:
    """Copy a model, with a patch embedding so large that features of pictures are NaN."""
    shutil.copytree(folder, target)
    (weights,) = target.glob("*.safetensors")
    tensors = load_file(weights)
    (name,) = (n for n in tensors if n.endswith("patch_embed.proj.weight"))
    tensors[name] *= 1e30
    save_file(tensors, weights, {"format": "pt"})
    return target


def test_one_client_cannot_spoil_answers_of_others_nor_leave_processes_behind(
    tiny_folder: Any, tmp_path: Path
) -> None:
    model = overflowing(tiny_folder("qwen2_vl"), tmp_path / "model")
    arguments = ["--engine", "vllm", "--model", model, "--served-model-name", "tiny"]
    arguments += ["--", "--enforce-eager", "--dtype", "float32", "--max-model-len", 512]
    # A few blocks of the KV cache, which are soon used again.
    arguments += ["--block-size", 32, "--num-gpu-blocks-override", 20, "--no-enable-prefix-caching"]
    with http.process(tmp_path / "log", *arguments, **ENV) as (url, process):
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120)

        def ask(text: str, *media: str, **options: float) -> str:
            answer = client.chat.completions.create(
                model="tiny", messages=http.messages(text, *media), max_tokens=16, temperature=0,
                extra_body={"ignore_eos": True, "mm_processor_kwargs": {"tokencomp": options}},
            )  # fmt: skip
            return answer.choices[0].message.content

        questions = [f"Question {i}: " + "word " * 20 * (i % 4) for i in range(12)]
        before = [ask(question) for question in questions]
        assert len(set(before)) > 1
        for i in range(8):
            ask("What color?", http.image_url(i), ratio=0)
        assert http.metric(url, "tokencomp_nonfinite_items_total") == 8
        assert [ask(question) for question in questions] == before

        started = session(process.pid)
        assert len(started) > 2  # server, engine and worker
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 20
        while session(process.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert session(process.pid) == []
