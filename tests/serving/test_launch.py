"""How servers are started: the command line of vLLM, addresses, and the checks before a start."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.console import run

from tokencomp.errors import OptionError, UnsupportedModelError
from tokencomp.serving import launch
from tokencomp.serving.bind import Bind
from tokencomp.serving.launch import vllm_command
from tokencomp.serving.limits import Limits


def test_vllm_drains_bounds_its_queue_and_removes_folders_of_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(launch, "check_architecture", lambda *arguments: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"{ended.pid}-abc", f"{os.getpid()}-abc", "other"):
        (tmp_path / f"tokencomp-metrics-{name}").mkdir()

    def start(*extra: str) -> tuple[list[str], str]:
        command, env = vllm_command("tiny", {"ratio": 0.5}, Bind(), Limits(), extra)
        return command, env["PROMETHEUS_MULTIPROC_DIR"]

    command, folder = start()
    assert command[command.index("--shutdown-timeout") + 1] == "60"
    assert {path.name for path in tmp_path.iterdir()} == {
        f"tokencomp-metrics-{os.getpid()}-abc", "tokencomp-metrics-other", Path(folder).name,
    }  # fmt: skip
    assert command[command.index("--max-num-queued-reqs") + 1] == "1280"
    given = ("--shutdown-timeout", "--allowed-media-domains", "--max-num-queued-reqs")
    command, _ = start(*(f"{flag}=5" for flag in given))
    assert not {*given} & {*command}


def test_an_open_address_without_a_key_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    for bind in (Bind(), Bind("::1"), Bind("localhost"), Bind("0.0.0.0", api_key="secret")):
        bind.warn_if_open()
    assert not caplog.records
    for host in ("0.0.0.0", "::", "", "192.0.2.1", "server.example"):
        Bind(host).warn_if_open()
        assert "without an API key" in caplog.text
        caplog.clear()


def test_other_frames_than_on_transformers_are_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(launch, "check_architecture", lambda *arguments: None)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))

    def values(*extra: str) -> list[str]:
        command, _ = vllm_command("tiny", {"ratio": 0.5}, Bind(), Limits(frames=8), extra)
        return [b for a, b in pairwise(command) if a == "--media-io-kwargs"]

    (ours,) = values()
    assert json.loads(ours)["video"]["num_frames"] == 8
    assert values("--media-io-kwargs", ours) == [ours] and not caplog.records
    file = tmp_path / "tokencomp.yaml"
    file.write_text(f"media-io-kwargs: '{ours}'\n")
    assert values("--config", str(file)) == [] and not caplog.records
    file.write_text("media-io-kwargs:\n  video:\n    fps: 1\n")
    assert values("--config", str(file)) == [] and "other frames" in caplog.text
    caplog.clear()
    assert values("--media-io-kwargs", '{"video": {"fps": 1}}') == ['{"video": {"fps": 1}}']
    assert "other frames" in caplog.text and ours in caplog.text


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["tiny-qwen2-vl"]),
        (["--served-model-name", "mine"], ["mine"]),
        (["--", "--served-model-name", "theirs"], ["theirs"]),
        (["--", "--served-model-name=theirs"], []),
    ],
)
def test_an_embedded_model_has_its_name_on_vllm(
    arguments: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(launch, "run_vllm", lambda model, *args: started.append((model, args[-1])))
    assert run("serve", "--engine", "vllm", "--model", "tiny-qwen2-vl", *arguments) in (0, None)
    ((folder, extra),) = started
    assert (Path(folder) / "config.json").exists()
    flag = "--served-model-name"
    assert [b for a, b in pairwise(extra) if a == flag] == names
    assert sum(a.startswith(flag) for a in extra) == 1


@pytest.mark.parametrize(
    ("extra", "flag"),
    [
        (["--api_key", "x"], "--api-key"),
        (["--api-k=x"], "--api-key"),
        (["--allowed_local_media_path=/"], "--allowed-local-media-path"),
        (["--allowed-l", "/"], "--allowed-local-media-path"),
        (["--config", "FILE"], "--api-key"),
        (["--grpc"], "--grpc"),
        (["--grpc_port=1"], "--grpc-port"),
    ],
)
def test_flags_are_read_as_vllm_reads_them(
    extra: list[str], flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `_` for `-`, by their beginnings, and from a file; vLLM 0.32 and 0.33 take all these."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    file = tmp_path / "config.yaml"
    file.write_text("max-model-len: 2048\napi_key: x\n")
    extra = [str(file) if argument == "FILE" else argument for argument in extra]
    with pytest.raises(OptionError, match=f"^{flag}( after|:)"):
        vllm_command("tiny", {"ratio": 0.5}, Bind(), Limits(), extra)


def test_other_flags_reach_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(launch, "check_architecture", lambda *arguments: None)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    file = tmp_path / "config.yaml"
    # vLLM makes no flags of false and of empty lists, so that media of any host would be open.
    file.write_text("max-model-len: 2048\nallowed-media-domains: []\ngrpc: false\n")
    extra = [
        "--api-server-count=2",
        "--media_io_kwargs.video.num_frames",
        "4",
        "--config",
        str(file),
    ]
    command, _ = vllm_command("tiny", {"ratio": 0.5}, Bind(), Limits(), extra)
    assert command[-len(extra) :] == extra and "--media-io-kwargs" not in command
    assert command[command.index("--allowed-media-domains") + 1] == "invalid."


def test_vllm_starts_with_closed_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of `tokencomp serve --engine vllm`."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    config = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    limits, bind = Limits(allowed_path=tmp_path), Bind(api_key="secret")
    command, env = vllm_command(str(tmp_path), {"ratio": 0.5}, bind, limits, ["--port", "1"])
    arguments = dict(zip(command, [*command[1:], ""], strict=True))
    assert arguments["--allowed-media-domains"] == "invalid." and arguments["--host"] == "127.0.0.1"
    assert arguments["--allowed-local-media-path"] == str(tmp_path)
    assert "secret" not in command and env["VLLM_API_KEY"] == "secret"
    assert "VLLM_PLUGINS" not in env
    assert "secret" not in env["TOKENCOMP_RULES"]
    assert arguments["--middleware"].endswith("middleware.Guard")
    assert command[-2:] == ["--port", "1"]
    assert json.loads(env["TOKENCOMP_SERVING"])["only_own"] is True
    video = {"video_backend": "tokencomp", "num_frames": 32}
    assert json.loads(arguments["--media-io-kwargs"]) == {"video": video}
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    fixed = {"ratio": 0.5, "per_request": False}
    named = Bind("0.0.0.0", allowed_hosts=("ai.example",))
    command, env = vllm_command(str(tmp_path), fixed, named, Limits(), [])
    assert "--trust-request-mm-kwargs" not in command and "--middleware" in command
    assert env["VLLM_PLUGINS"].split(",") == ["other", "tokencomp"]
    bind = json.loads(env["TOKENCOMP_RULES"])["bind"]
    assert (bind["host"], bind["allowed_hosts"]) == ("0.0.0.0", ["ai.example"])
    trusting = ["--trust-request-mm-kwargs"]
    command, env = vllm_command(str(tmp_path), {"ratio": 0.5}, Bind(), Limits(), trusting)
    assert "--middleware" in command and command.count(trusting[0]) == 1  # the key stays checked
    assert json.loads(env["TOKENCOMP_RULES"])["media_options"] is True
    for flag in ("--host", "--api-key", "--allowed-local-media-path"):
        with pytest.raises(OptionError, match=f"put {flag.replace('local-', '')} before"):
            vllm_command(str(tmp_path), {"ratio": 0.5}, Bind(), Limits(), [flag, "x"])
    assert "--allowed-local-media-path" not in command
    for more in ({"max_ratio": 0.8}, {"per_request": False}):
        low = {"ratio": 0.5, "low_detail_ratio": 0.9, **more}
        with pytest.raises(OptionError, match="--low-detail-ratio"):
            vllm_command(str(tmp_path), low, Bind(), Limits(), [])
    with pytest.raises(OptionError, match="divprune"):
        vllm_command(str(tmp_path), {"reducer": "fastv", "ratio": 0.5}, Bind(), Limits(), [])
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"LlavaFor.*--engine hf"):
        vllm_command(str(tmp_path), {"ratio": 0.5}, Bind(), Limits(), [])
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"attention masks.*--engine hf"):
        vllm_command(str(tmp_path), {"ratio": 0.5}, Bind(), Limits(), [])
    config = {"model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tower = {"ratio": 0.5, "tower_ratio": 0.4}
    with pytest.raises(OptionError, match=r"--tower-ratio 0\.4.*batches of pictures.*--engine hf"):
        vllm_command(str(tmp_path), tower, Bind(), Limits(), [])
