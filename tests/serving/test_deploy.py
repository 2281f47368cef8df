"""The files in examples/deploy, checked as far as that goes without Docker and Kubernetes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from support.serving import http as servers

from tokencomp.cli._app import build_app
from tokencomp.serving.bind import Bind

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "deploy"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def commands() -> dict[str, list[str]]:
    """Return the arguments of `tokencomp serve` in every file, values of variables left out."""
    return {
        "tokencomp.service": found(r"^ExecStart=\S+ serve (.*)$", "tokencomp.service").split(),
        "Dockerfile": json.loads(found(r"^CMD (.*)$", "Dockerfile")),
        "compose.yaml": documents("compose.yaml")[0]["services"]["server"]["command"],
        "kubernetes.yaml": container_of_pod()["args"],
        **{
            f"compose.nodes.yaml {name}": documents("compose.nodes.yaml")[0]["services"][name][
                "command"
            ]
            for name in ("prefill", "decode")
        },
        **{
            f"kubernetes.nodes.yaml {pod['metadata']['name']}": container_of_pod(pod)["args"]
            for pod in roles_of_pods()
        },
    }


def roles_of_pods() -> list[dict[str, Any]]:
    """Return the deployments of prefill and decode."""
    found = [d for d in documents("kubernetes.nodes.yaml") if d["kind"] == "Deployment"]
    return [d for d in found if "role" in d["spec"]["template"]["metadata"]["labels"]]


def text(name: str) -> str:
    return (FOLDER / name).read_text()


def found(pattern: str, name: str) -> str:
    (match,) = re.findall(pattern, text(name), re.M)
    return match


def container_of_pod(deployment: Any = None) -> dict[str, Any]:
    deployment = deployment or documents("kubernetes.yaml")[0]
    container: dict[str, Any] = deployment["spec"]["template"]["spec"]["containers"][0]
    return container


def test_options_exist() -> None:
    """Every file starts the server with options of `tokencomp serve`."""
    app: Any = typer.main.get_command(build_app())
    known = {option for parameter in app.commands["serve"].params for option in parameter.opts}
    for name, arguments in commands().items():
        ours = arguments[: [*arguments, "--"].index("--")]
        used = {argument.partition("=")[0] for argument in ours if argument[:2] == "--"}
        assert "--model" in used and used <= known, name


# -- the image --------------------------------------------------------------------------------


def copied() -> list[str]:
    """Return the files and folders that the ignore file lets into the image."""
    lines = text("Dockerfile.dockerignore").splitlines()
    assert "*" in lines
    return [line[1:] for line in lines if line.startswith("!")]


def script() -> str:
    """Return the script that the image runs, a path in the repository."""
    return found(r'^RUN .*/src/(\S+) "\$ENGINE" "\$DEVICE"$', "Dockerfile")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_the_image_has_what_an_installation_reads_and_no_more() -> None:
    import tomllib

    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, folders = package["project"], package["tool"]["setuptools"]["package-dir"]
    roots = {folder.split("/")[0] for folder in folders.values()}
    needed = {"pyproject.toml", project["readme"], *project["license-files"], "tokencomp", *roots}
    assert {*copied()} == {*needed, script(), "zoo"}
    assert os.access(ROOT / script(), os.X_OK)


@pytest.mark.parametrize("engine", ["hf", "vllm"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_build_argument_installs_something(engine: str, device: str, tmp_path: Path) -> None:
    """A pip that only prints its arguments stands in for the real one."""
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_INDEX": ""}
    run = [FOLDER / "install.sh", engine, device]
    done = subprocess.run(run, capture_output=True, text=True, env=env, check=True)
    extra = {"hf": "[serve", "vllm": "[vllm"}[engine]
    by_hand = (engine, device) == ("vllm", "cpu")
    assert ("--no-deps" in done.stdout) == by_hand != (f"{ROOT}{extra}" in done.stdout)
    assert subprocess.run([FOLDER / "install.sh", engine, "tpu"], env=env).returncode == 2


@pytest.mark.long
def test_the_steps_of_the_image_give_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Docker: a fresh environment, the files and the script of the image, its command."""
    for name in copied():
        source, target = ROOT / name, tmp_path / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    path = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "TORCH_INDEX": "", "HOME": str(tmp_path)}
    env.pop("PYTHONPATH", None)
    subprocess.run([tmp_path / "src" / script(), "hf", "cpu"], env=env, check=True)
    arguments = commands()["Dockerfile"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    with servers.server(tmp_path / "log", *arguments, **env) as url:
        body = {"model": arguments[-1], "messages": servers.messages("?", servers.image_url(1))}
        assert servers.get(url + "/v1/chat/completions", {**body, "max_tokens": 2})[0] == 200


# -- containers -------------------------------------------------------------------------------


def test_clients_of_compose_reach_the_proxy_alone() -> None:
    """The server listens at 127.0.0.1 of a network that both share."""
    services = documents("compose.yaml")[0]["services"]
    server, proxy = services["server"], services["proxy"]
    assert not any(argument.startswith("--host") for argument in server["command"])
    assert server["network_mode"] == "service:proxy" and "ports" not in server
    inside = {port.split(":")[1] for port in proxy["ports"]}
    assert inside == set(re.findall(r"listen (\d+)", text("nginx.conf")))
    declared = set(re.findall(r"^ARG (\w+)", text("Dockerfile"), re.M))
    assert set(server["build"]["args"]) <= declared


def test_the_pod_finds_its_server_and_lets_requests_end() -> None:
    deployment, claim, service = documents("kubernetes.yaml")
    pod, container = deployment["spec"]["template"], container_of_pod()
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    (port,) = container["ports"]
    for kind in ("readiness", "liveness", "startup"):
        assert container[kind + "Probe"]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert "--host=0.0.0.0" in container["args"]  # probes come from another address
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert set(volumes) == {mount["name"] for mount in container["volumeMounts"]}
    claimed = volumes["data"]["persistentVolumeClaim"]["claimName"]
    assert claimed == claim["metadata"]["name"]
    user = pod["spec"]["securityContext"]["runAsUser"]
    assert found(r"^USER (.*)$", "Dockerfile") == str(user)
    (pause,) = (int(word) for word in container["lifecycle"]["preStop"]["exec"]["command"][1:])
    assert pod["spec"]["terminationGracePeriodSeconds"] > pause + Bind.shutdown_timeout


def test_both_roles_find_each_other() -> None:
    """Media hashes contain the setting, and transfer parameters come from the router alone."""
    services = documents("compose.nodes.yaml")[0]["services"]
    for roles in (
        [services[name]["command"] for name in ("prefill", "decode")],
        [container_of_pod(pod)["args"] for pod in roles_of_pods()],
    ):
        one, other = ({a for a in words if not a.startswith("--port=")} for words in roles)
        assert one == other
        assert "--kv-transfer-config.kv_connector=NixlConnector" in one
    one, other = ({*services[name]["environment"].values()} for name in ("prefill", "decode"))
    assert one != other  # ports of NIXL, on one address
    for name in ("prefill", "decode"):
        (port,) = [a.partition("=")[2] for a in services[name]["command"] if "--port" in a]
        assert f"--{name}=http://127.0.0.1:{port}" in services["router"]["command"]
    for name in ("router", "prefill", "decode"):
        env = services[name]["environment"]
        assert {"TOKENCOMP_API_KEY", "TOKENCOMP_ROUTER_KEY"} <= env.keys()
    for pod in documents("kubernetes.nodes.yaml")[:3]:
        names = {entry["name"] for entry in container_of_pod(pod)["env"]}
        assert {"TOKENCOMP_API_KEY", "TOKENCOMP_ROUTER_KEY"} <= names


def test_both_files_start_the_same_roles() -> None:
    """Of compose as processes (test_vllm_nixl), so that the commands of the pods are run too."""
    cpu = {"--kv-transfer-config.kv_buffer_device", "--enforce-eager", "--dtype", "--block-size"}
    cases = {"--model", "--ratio", "--port", "--host"}  # of one machine or a cluster
    services = documents("compose.nodes.yaml")[0]["services"]
    for pod in roles_of_pods():
        role = pod["spec"]["template"]["metadata"]["labels"]["role"]
        commands = [services[role]["command"], container_of_pod(pod)["args"]]
        one, other = (
            [word for word in words if word.partition("=")[0] not in cpu | cases]
            for words in commands
        )
        assert one == other, role
        for name in cases - {"--port", "--host"}:
            assert all(any(w.startswith(f"{name}=") for w in words) for words in commands)


def test_pods_reach_each_other_through_the_router() -> None:
    """The router is that of compose; its services lead to the roles, and clients to it alone."""
    given = documents("kubernetes.nodes.yaml")
    found = {(d["kind"], d["metadata"]["name"]): d["spec"] for d in given}
    pods = {d["metadata"]["name"]: d["spec"]["template"] for d in given if "template" in d["spec"]}
    for name, pod in pods.items():
        labels = pod["metadata"]["labels"]
        assert found["Deployment", name]["selector"]["matchLabels"] == labels
        service = found["Service", name]
        assert [n for n, p in pods.items() if service["selector"].items()
                <= p["metadata"]["labels"].items()] == [name]  # fmt: skip
        (container,), (port,) = pod["spec"]["containers"], service["ports"]
        assert port["targetPort"] == container["ports"][0]["name"] and port["port"] == 80
    router = container_of_pod(documents("kubernetes.nodes.yaml")[2])
    compose = documents("compose.nodes.yaml")[0]["services"]["router"]
    assert router["command"] == compose["entrypoint"] == ["tokencomp", "route"]
    assert {f"--{role}=http://tokencomp-{role}" for role in ("prefill", "decode")} <= {
        *router["args"]
    }
    policy = found["NetworkPolicy", "tokencomp-nodes"]
    (rule,) = policy["podSelector"]["matchExpressions"]
    closed = [n for n, p in pods.items() if p["metadata"]["labels"].get("role") in rule["values"]]
    assert closed == ["tokencomp-prefill", "tokencomp-decode"]
    entering = [rule["from"][0]["podSelector"]["matchLabels"] for rule in policy["ingress"]]
    assert entering == [{"app": "tokencomp-router"}, {"app": "tokencomp-nodes"}]
    (alone,) = (d["spec"] for d in documents("kubernetes.yaml") if d["kind"] == "Service")
    labels = [pod["metadata"]["labels"] for pod in pods.values()]
    assert not [one for one in labels if alone["selector"].items() <= one.items()]


# -- monitoring -------------------------------------------------------------------------------


# -- systemd ----------------------------------------------------------------------------------


# -- the proxy --------------------------------------------------------------------------------
