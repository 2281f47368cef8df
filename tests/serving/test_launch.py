"""How `tokencomp serve --engine vllm` starts vLLM, and what it refuses before a start."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
from support.console import run

from tokencomp.errors import OptionError, UnsupportedModelError
from tokencomp.inputs import loading
from tokencomp.serving import launch
from tokencomp.serving.bind import Bind
from tokencomp.serving.limits import Limits
from tokencomp.serving.vllm import process
from tokencomp.serving.vllm.rules import Rules

QWEN = ("qwen2_vl", "Qwen2VLForConditionalGeneration")
VIDEO = {"video": {"video_backend": "tokencomp", "num_frames": 32}}
TRUST, REMOTE = "--trust-request-mm-kwargs", "--allowed-media-domains"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that returns command line and environment of vLLM, which need not be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def command(
        *extra: str, bind: Any = None, limits: Any = None, model: Any = QWEN, **options: Any
    ) -> tuple[list[str], dict[str, str]]:
        config = {"model_type": model[0], "architectures": [model[1]]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        given = {"ratio": 0.5, **options}
        rules = bind or Bind(), limits or Limits()
        more = given.pop("paths", ()), given.pop("router_key", None)
        return launch.vllm_command(str(tmp_path), given, *rules, extra, *more)

    return command


def values(command: list[str], flag: str) -> list[str]:
    return [value for name, value in pairwise([*command, ""]) if name == flag]


def test_vllm_starts_closed(start: Any, tmp_path: Path) -> None:
    limits, bind = Limits(allowed_path=tmp_path), Bind(api_key="secret")
    command, env = start("--port", "1", limits=limits, bind=bind)
    for flag, value in (
        (REMOTE, "invalid."), ("--host", "127.0.0.1"), ("--shutdown-timeout", "60"),
        ("--max-num-queued-reqs", "1280"), ("--allowed-local-media-path", str(tmp_path)),
        ("--middleware", "tokencomp.serving.vllm.middleware.VllmGuard"),
        ("--media-io-kwargs", json.dumps(VIDEO)),
    ):  # fmt: skip
        assert values(command, flag) == [value]
    assert command[-2:] == ["--port", "1"] and "secret" not in command
    assert env["VLLM_API_KEY"] == "secret" and "secret" not in env["TOKENCOMP_RULES"]
    assert json.loads(env["TOKENCOMP_SERVING"])["only_own"] is True and "VLLM_PLUGINS" not in env
    assert "--allowed-local-media-path" not in start()[0]


def test_what_the_operator_opens(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    named = Bind("0.0.0.0", allowed_hosts=("ai.example",))
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    command, env = start(bind=named, per_request=False)
    assert TRUST not in command and "--middleware" in command
    assert env["VLLM_PLUGINS"].split(",") == ["other", "tokencomp"]
    bind = json.loads(env["TOKENCOMP_RULES"])["bind"]
    assert (bind["host"], bind["allowed_hosts"]) == ("0.0.0.0", ["ai.example"])
    command, env = start(TRUST)
    assert "--middleware" in command and command.count(TRUST) == 1  # the key stays checked
    assert json.loads(env["TOKENCOMP_RULES"])["media_options"] is True
    _, env = start(paths=["/v1/responses"], ratio_by_load="0.75:4096")
    monkeypatch.setenv("TOKENCOMP_RULES", env["TOKENCOMP_RULES"])
    assert Rules.from_environment().paths == ("/v1/responses",) and Rules().paths == ()
    assert json.loads(env["TOKENCOMP_SERVING"])["ratio_by_load"] == "0.75:4096"
    for flag in ("--shutdown-timeout", REMOTE, "--max-num-queued-reqs"):
        assert flag not in start(f"{flag}=5")[0]


def test_options_travel_in_the_config_of_the_model(start: Any, tmp_path: Path) -> None:
    """vLLM sends no variables of the environment to workers on other nodes."""
    flag, theirs = "--hf-overrides", {"max_position_embeddings": 64}

    def read(*extra: str) -> dict[str, Any]:
        command, env = start(*extra)
        (text,) = values(command, flag)
        found: dict[str, Any] = json.loads(text)
        assert found["tokencomp"] == json.loads(env["TOKENCOMP_SERVING"])
        return found

    assert read()["tokencomp"] == {"ratio": 0.5, "only_own": True}
    for extra in ([flag, json.dumps(theirs)], [f"--hf_overrides={json.dumps(theirs)}"]):
        assert {**theirs, "tokencomp": ANY} == read(*extra, "--seed", "1")
    command, _ = start("--hf-overrides.max_position_embeddings", "64")
    assert json.loads(*values(command, f"{flag}.tokencomp"))["ratio"] == 0.5
    file = tmp_path / "config.yaml"
    file.write_text("hf-overrides: {a: 1}\n")
    for wrong in ([flag, '{"tokencomp": {}}'], [flag, "text"], [flag], ["--config", str(file)]):
        with pytest.raises(OptionError, match=flag):
            start(*wrong)


def test_roles_and_their_router(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One ratio in all roles; parameters of transfers with the router's key only."""
    for flag in ("--kv-transfer-config", "--ec_transfer_config={}"):
        with pytest.raises(OptionError, match="--ratio-by-load"):
            start(flag, ratio_by_load="0.75:4096")
    _, env = start(router_key="a secret")
    assert "a secret" not in env["TOKENCOMP_RULES"]
    for name in ("TOKENCOMP_RULES", "TOKENCOMP_ROUTER_KEY"):
        monkeypatch.setenv(name, env[name])
    assert Rules.from_environment().router_key == "a secret" and Rules().router_key is None
    monkeypatch.setenv("TOKENCOMP_ROUTER_KEY", start()[1]["TOKENCOMP_ROUTER_KEY"])
    assert Rules.from_environment().router_key is None
    with pytest.raises(OptionError, match="TOKENCOMP_ROUTER_KEY"):
        start("--router", "127.0.0.1")
    with pytest.raises(OptionError, match="every client has"):
        start(router_key="a secret", bind=Bind(api_key="a secret"))


def test_grammars_compile_in_little_time(start: Any) -> None:
    """By the backend that no short pattern stops, unless the operator names another one."""
    flag = "--structured-outputs-config.backend"
    assert values(start()[0], flag) == ["guidance"]
    assert values(start(flag, "xgrammar")[0], flag) == ["xgrammar"]
    assert not values(start("--structured_outputs_config", "{}")[0], flag)


def test_other_flags_reach_vllm(start: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    # vLLM makes no flags of false and of empty lists, so that media of any host would be open.
    file.write_text("max-model-len: 2048\nallowed-media-domains: []\ngrpc: false\n")
    extra = ["--api-server-count=2", "--media_io_kwargs.video.num_frames", "4"]
    extra += ["--config", str(file)]
    command, _ = start(*extra)
    assert command[-len(extra) :] == extra and "--media-io-kwargs" not in command
    assert values(command, REMOTE) == ["invalid."]


@pytest.mark.parametrize(
    ("extra", "flag"),
    [
        (["--host", "x"], "--host"), (["--api-key", "x"], "--api-key"),
        (["--api_key", "x"], "--api-key"), (["--api-k=x"], "--api-key"),
        (["--allowed_local_media_path=/"], "--allowed-local-media-path"),
        (["--allowed-l", "/"], "--allowed-local-media-path"), (["--config", "FILE"], "--api-key"),
        (["--grpc"], "--grpc"), (["--grpc_port=1"], "--grpc-port"),
    ],
)  # fmt: skip
def test_flags_past_the_rules_are_refused(
    start: Any, extra: list[str], flag: str, tmp_path: Path
) -> None:
    """With `_` for `-`, by their beginnings, and from a file; vLLM 0.32 and 0.33 take all these."""
    file = tmp_path / "config.yaml"
    file.write_text("max-model-len: 2048\napi_key: x\n")
    with pytest.raises(OptionError, match=f"^{flag}( after|:)"):
        start(*(str(file) if argument == "FILE" else argument for argument in extra))


def test_merge_auto_drops_where_the_family_cannot_merge(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for model, value, warned in (
        (QWEN, "auto", False),
        (("qwen3_5", "Qwen3_5ForConditionalGeneration"), False, True),
    ):
        env = start(model=model, reducer="auto", merge="auto")[1]
        assert json.loads(env["TOKENCOMP_SERVING"])["merge"] == value
        assert ("--merge auto drops with Qwen3_5" in caplog.text) == warned


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"low_detail_ratio": 0.9, "max_ratio": 0.8}, OptionError),
        ({"low_detail_ratio": 0.9, "per_request": False}, OptionError),
        ({"ratio_by_load": "0.75:4096", "per_request": False}, OptionError),
        ({"reducer": "fastv"}, OptionError),
        ({"model": ("llava", "LlavaForConditionalGeneration")}, UnsupportedModelError),
        ({"model": ("gemma3", "Gemma3ForConditionalGeneration")}, UnsupportedModelError),
    ],
)  # fmt: skip
def test_what_the_plugin_cannot_serve_does_not_start(start: Any, options: Any, error: Any) -> None:
    with pytest.raises(error):
        start(**options)


def test_an_open_address_without_a_key_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    for bind in (Bind(), Bind("::1"), Bind("localhost"), Bind("0.0.0.0", api_key="secret")):
        bind.warn_if_open()
    assert not caplog.records
    for count, host in enumerate(("0.0.0.0", "::", "", "192.0.2.1", "server.example"), 1):
        Bind(host).warn_if_open()
        assert len(caplog.records) == count


def test_other_frames_than_on_transformers_are_warned_about(
    start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flag, ours, file = "--media-io-kwargs", json.dumps(VIDEO), tmp_path / "tokencomp.yaml"
    assert values(start(flag, ours)[0], flag) == [ours]
    file.write_text(f"media-io-kwargs: '{ours}'\n")
    assert values(start("--config", str(file))[0], flag) == [] and not caplog.records
    file.write_text("media-io-kwargs:\n  video:\n    fps: 1\n")
    for count, extra in enumerate((["--config", str(file)], [flag, '{"video": {"fps": 1}}']), 1):
        assert values(start(*extra)[0], flag) == extra[1:] * (extra[0] == flag)
        assert len(caplog.records) == count


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["tiny-qwen2-vl"]), (["--served-model-name", "mine"], ["mine"]),
        (["--", "--served-model-name", "theirs"], ["theirs"]),
        (["--", "--served-model-name=theirs"], []),
    ],
)  # fmt: skip
def test_an_embedded_model_has_its_name_on_vllm(
    arguments: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, list[str]]] = []

    def noted(model: str, *args: Any) -> tuple[list[str], dict[str, str]]:
        started.append((model, args[3]))
        return [], {}

    monkeypatch.setattr(launch, "vllm_command", noted)
    monkeypatch.setattr(launch, "run_vllm", lambda *args: None)
    assert run("serve", "--engine", "vllm", "--model", "tiny-qwen2-vl", *arguments) in (0, None)
    ((folder, extra),) = started
    assert (Path(folder) / "config.json").exists()
    assert values(extra, "--served-model-name") == names
    assert sum(a.startswith("--served-model-name") for a in extra) == 1


# -- start and end of processes -------------------------------------------------------------------


def test_a_used_port_ends_the_start_before_the_model_is_loaded(monkeypatch: Any) -> None:
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(loading, "load_model", None)
    for host, family in (("127.0.0.1", socket.AF_INET), ("", socket.AF_INET)):
        with socket.socket(family) as occupied:
            occupied.bind(("127.0.0.1", 0))
            occupied.listen()
            bind = Bind(host, occupied.getsockname()[1])
            with pytest.raises(OptionError, match=f"port {bind.port}"):
                launch.run_hf("none", {"ratio": 0.5}, bind, Limits())
            with pytest.raises(OptionError, match=f"port {bind.port}"):
                launch.run_vllm(["/bin/false"], {}, bind)


def test_the_media_path_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file"):
        assert run("serve", "--model", "none", "--allowed-media-path", path) == 2


@pytest.mark.parametrize(("name", "goes"), [("tokencomp-metrics-1", True), ("metrics", False)])
@pytest.mark.parametrize("dies", [True, False])
def test_the_folder_of_metrics_goes_with_the_server(
    name: str, goes: bool, dies: bool, tmp_path: Path
) -> None:
    """Not one of the operator. After the death of the engine, the exit code says so."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.db").touch()
    end = "process.end_after_engine()" if dies else ""
    code = (
        "import os, subprocess, sys\nfrom tokencomp.serving.vllm import process\n"
        "os.environ[process.ENV_OWNER] = str(os.getpid())\nprocess.remove_metrics_at_exit()\n"
        # As vLLM does at the first start of a model: a subprocess that loads plugins, and ends.
        "child = 'from tokencomp.serving.vllm import process; process.remove_metrics_at_exit()'\n"
        "subprocess.run([sys.executable, '-c', child], check=True)\n"
        "assert os.path.isdir(os.environ[process.ENV_METRICS])\n"
    )
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / name)}
    done = subprocess.run([sys.executable, "-c", code + end], env=env)
    assert done.returncode == (process.ENGINE_DIED if dies else 0)
    assert (tmp_path / name).exists() is not goes


HOLDS = """
import os, sys
from pathlib import Path
from tokencomp.serving.vllm.process import hold_metrics
hold_metrics(Path(sys.argv[1]))
os.execvp(sys.executable, [sys.executable, "-c", "print(1, flush=True); input()"])
"""


def test_folders_of_killed_servers_are_removed(tmp_path: Path) -> None:
    """Those of running ones stay, and those without a lock."""
    one, two, bare = (tmp_path / f"tokencomp-metrics-{n}" for n in "abc")
    for folder in (one, two, bare):
        folder.mkdir()
    command = [sys.executable, "-c", HOLDS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*command, str(one)], **pipes) as first:
        assert first.stdout.readline()
        with subprocess.Popen([*command, str(two)], **pipes) as second:
            assert second.stdout.readline() and one.exists()
            first.kill()
            first.wait()
            subprocess.run([*command, str(bare)], input=b"\n", check=True)
            assert not one.exists() and two.exists() and bare.exists()
