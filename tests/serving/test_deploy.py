"""The files in examples/deploy, checked as far as that goes without Docker and Kubernetes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
PLACES = Path("/usr/sbin"), Path("/usr/local/sbin")  # not in the PATH of every user


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def commands() -> dict[str, list[str]]:
    """Return the arguments of `tokencomp serve` in every file, values of variables left out."""
    return {
        "tokencomp.service": found(r"^ExecStart=\S+ serve (.*)$", "tokencomp.service").split(),
        "Dockerfile": json.loads(found(r"^CMD (.*)$", "Dockerfile")),
        "compose.yaml": documents("compose.yaml")[0]["services"]["server"]["command"],
        "kubernetes.yaml": container_of_pod()["args"],
    }


def text(name: str) -> str:
    return (FOLDER / name).read_text()


def found(pattern: str, name: str) -> str:
    (match,) = re.findall(pattern, text(name), re.M)
    return match


def container_of_pod() -> dict[str, Any]:
    return documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]["containers"][0]


def tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, PLACES)]))
    return path or pytest.skip(f"{name} is not installed")


def test_options_exist() -> None:
    """Every file starts the server with options of `tokencomp serve`."""
    app: Any = typer.main.get_command(build_app())
    known = {option for parameter in app.commands["serve"].params for option in parameter.opts}
    for name, arguments in commands().items():
        used = {argument.partition("=")[0] for argument in arguments if argument[:2] == "--"}
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
    needed = {"pyproject.toml", project["readme"], *project["license-files"], *folders.values()}
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


# -- monitoring -------------------------------------------------------------------------------

USUAL: dict[str, Any] = {"slow": 0, "kept": 50, "step": "1x50 0 1x20"}
UNUSUAL = {
    "TokencompSlowFirstToken": {"slow": 1},
    "TokencompRatioRaisedByLoad": {"step": "0x30 1x40"},
    "TokencompNotCompressing": {"kept": 95},
}
"""First tokens, of 10 per minute, after 5 s; kept ones of 100 visual tokens; step of the load."""


def series(server: str, ttft: str, slow: int, kept: int, step: str) -> list[dict[str, str]]:
    """Return the metrics of a server, minute by minute, in the notation of promtool."""
    metrics = {
        ttft + '_bucket{le="5.0",': f"0+{10 - slow}x70", ttft + '_bucket{le="7.5",': "0+10x70",
        ttft + '_bucket{le="+Inf",': "0+10x70", "tokencomp_load_step{": step,
        "tokencomp_visual_tokens_before_total{": "0+100x70",
        "tokencomp_visual_tokens_after_total{": f"0+{kept}x70",
    }  # fmt: skip
    return [{"series": f'{k}instance="{server}"}}', "values": v} for k, v in metrics.items()]


@pytest.mark.parametrize("alert", UNUSUAL)
@pytest.mark.parametrize("engine", ["tokencomp_", "vllm:"])
def test_an_alert_names_the_server_that_is_unusual(alert: str, engine: str, tmp_path: Path) -> None:
    """One of two servers, after an hour; no other alert fires."""
    promtool, ttft = tool("promtool"), engine + "time_to_first_token_seconds"
    (group,) = documents("alerts.yaml")[0]["groups"]
    rules, expected = {rule["alert"]: rule for rule in group["rules"]}, []
    for name, rule in rules.items():
        words = {
            k: v.replace("{{ $labels.instance }}", "b") for k, v in rule["annotations"].items()
        }
        fires = {"exp_labels": {**rule["labels"], "instance": "b"}, "exp_annotations": words}
        expected.append(
            {"eval_time": "62m", "alertname": name, "exp_alerts": [fires] * (name == alert)}
        )
    given = series("a", ttft, **USUAL) + series("b", ttft, **{**USUAL, **UNUSUAL[alert]})
    case = {"interval": "1m", "input_series": given, "alert_rule_test": expected}
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(FOLDER / "alerts.yaml")], "tests": [case]}))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True)
    assert set(rules) == set(UNUSUAL) and done.returncode == 0, done.stderr


# -- systemd ----------------------------------------------------------------------------------


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    systemd = tool("systemd-analyze")
    unit = tmp_path / "tokencomp.service"
    unit.write_text(text(unit.name).replace("/opt/tokencomp/bin/tokencomp", sys.executable))
    done = subprocess.run([systemd, "verify", "--man=no", unit], capture_output=True, text=True)
    assert done.returncode == 0 and "tokencomp.service" not in done.stderr, done.stderr
    command = [systemd, "security", "--offline=true", "--threshold=35", unit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:]


# -- the proxy --------------------------------------------------------------------------------


class Upstream(BaseHTTPRequestHandler):
    """Stands in for the server, and notes what reaches it."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, dict[str, str], bytes]]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, list[Any]]]:
    """Run nginx with the file; yield its port, and the requests that reach the server behind it."""
    nginx, openssl = tool("nginx"), tool("openssl")
    root = tmp_path_factory.mktemp("nginx")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    key = ["-keyout", root / "privkey.pem", "-out", root / "fullchain.pem", "-nodes"]
    new = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run([*new, *names, *key], check=True, capture_output=True)
    seen: list[Any] = []
    handler = type("Handler", (Upstream,), {"seen": seen})
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    port = servers.free_port()
    site = text("nginx.conf").replace("/etc/nginx/tls", str(root))
    site = site.replace("127.0.0.1:8000", f"127.0.0.1:{upstream.server_port}")
    site = site.replace("listen 443", f"listen 127.0.0.1:{port}")
    site = site.replace("listen 80 ", f"listen 127.0.0.1:{servers.free_port()} ")
    (root / "site.conf").write_text(site)
    folders = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    temporary = "".join(f"{name}_temp_path {root}/{name};\n" for name in folders)
    main = f"daemon off;\npid {root}/pid;\nerror_log {root}/error.log;\nevents {{}}\n"
    inner = f"access_log off;\n{temporary}include {root}/site.conf;\n"
    (root / "nginx.conf").write_text(f"{main}http {{\n{inner}}}\n")
    command = [nginx, "-p", root, "-e", root / "error.log", "-c", root / "nginx.conf"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0 and "[warn]" not in checked.stderr, checked.stderr
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield port, seen
    finally:
        process.terminate()
        process.wait()
        upstream.shutdown()


def send(port: int, content: bytes) -> int:
    """Send bytes, and return the status of the first answer."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection(("127.0.0.1", port), timeout=20)
    with context.wrap_socket(plain, server_hostname="localhost") as connection:
        connection.sendall(content)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


def test_the_proxy_never_passes_two_lengths_on(proxied: tuple[int, list[Any]]) -> None:
    port, seen = proxied
    for body in (CHUNKED, b"Content-Length: 5\r\n\r\nhello"):
        assert send(port, HEAD + body) == 200
        _, headers, content = seen.pop()
        assert content == b"hello" and headers["content-length"] == "5"
        assert "transfer-encoding" not in headers and headers["host"] == "localhost"
    lengths = b"Content-Length: 5\r\n", b"Content-Length: 100\r\n"
    for rest in (lengths[0] + CHUNKED, lengths[1] + CHUNKED, b"".join(lengths) + b"\r\nhello"):
        assert send(port, HEAD + rest) == 400
    assert send(port, HEAD + b"Content-Length: 200000000\r\n\r\n") == 413
    assert seen == []


def test_the_proxy_passes_documented_paths_only(proxied: tuple[int, list[Any]]) -> None:
    port, seen = proxied
    request = "{} {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    passed = ["/v1/chat/completions", "/v1/models", "/v1/models/tiny/a", "/health"]
    for path in passed:
        assert send(port, request.format("GET", path).encode()) == 200
    assert [path for path, _, _ in seen] == passed
    seen.clear()
    closed = ["/invocations", "/tokenize", "/generative_scoring", "/scale_elastic_ep", "/metrics"]
    closed += ["/v1/completions", "/v1/load_lora_adapter", "/docs", "/openapi.json", "/", "/ping"]
    closed += ["/v1/models/../../invocations", "/v1/chat/completions/", "//invocations"]
    closed += ["/v1/chat/completions/%2e%2e/x", "/health;/../invocations", "/%69nvocations"]
    for path in closed:
        for method in ("GET", "POST"):
            assert send(port, request.format(method, path).encode()) in (400, 404), path
    assert seen == []
