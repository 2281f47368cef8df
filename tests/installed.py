"""What a user runs after `pip install` of the two wheels: no checkout, no network, another folder.

    python installed.py FOLDER_OF_WHEELS

Run by `.ci/run wheels` with the environment in which they are installed. Every command is real;
the first that fails ends the program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

COMMAND = Path(sys.executable).with_name("tokencomp")
MOST_BYTES = {"tokencomp": 2_000_000, "tokencomp_zoo": 60_000_000}
FOREIGN = ("tests/", "recipes/", "benchmarks/", "docs/", "examples/", ".github/")


def tokencomp(*words: str) -> str:
    """Run a command and return what it prints."""
    print("tokencomp", *words, flush=True)
    done = subprocess.run([COMMAND, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_wheels(folder: Path) -> None:
    """Size and files of the wheels."""
    for wheel in sorted(folder.glob("*.whl")):
        name = wheel.name.partition("-")[0]
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        foreign = [n for n in names if n.startswith(FOREIGN) or "/tests/" in n]
        assert not foreign, f"{wheel.name} holds {foreign[:5]}"
        assert wheel.stat().st_size <= MOST_BYTES[name], f"{wheel.name}: {wheel.stat().st_size:,}"
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {len(names)} files")


def check_patch() -> None:
    """The example of the README with the embedded model."""
    import tokencomp as library
    from tokencomp import zoo
    from tokencomp.inputs.media import load_media
    from tokencomp.inputs.prompts import build_inputs, generate

    assert Path(library.__file__).is_relative_to(sys.prefix), library.__file__
    model, processor = zoo.load()
    picture = load_media(zoo.SAMPLES / "test-position-00003.jpg")
    question = "Is the cross above or below the circle?"
    inputs = build_inputs(processor, [[picture]], [question])
    with library.patch(model, ratio=0.75) as handle:
        answer = generate(model, processor, inputs, max_new_tokens=8)
        assert answer == ["above"] and handle.stats.ratio > 0.7, (answer, handle.stats)
    assert not any(module._forward_hooks for module in model.modules())


def check_eval() -> None:
    """Questions of a user, and the report on them."""
    from tokencomp import zoo

    rows = json.loads((zoo.SAMPLES / "questions.json").read_text())[:3]
    data = [
        {"media": [str(zoo.SAMPLES / r["media"])], "question": r["question"], "answer": r["answer"]}
        for r in rows
    ]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, data)))
    out = tokencomp("eval", "--data", "own.jsonl", "--ratio", "0.5", "-o", "runs")
    assert "0.5" in out, out
    tokencomp("report", "runs", "-o", "report.html")
    assert "<table" in Path("report.html").read_text()


def check_serve() -> None:
    """A server on a free port answers a chat request about a picture."""
    import base64
    import socket

    from tokencomp import zoo

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [COMMAND, "serve", "--port", str(port), "--ratio", "0.5"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        image = base64.b64encode((zoo.SAMPLES / "test-position-00003.jpg").read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}},
            {"type": "text", "text": "Is the cross above or below the circle?"},
        ]
        models = json.load(urllib.request.urlopen(f"{url}/v1/models"))
        body = {
            "model": models["data"][0]["id"], "max_tokens": 8,
            "messages": [{"role": "user", "content": content}],
        }  # fmt: skip
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=120))
        assert answer["choices"][0]["message"]["content"] == "above", answer
        assert answer["usage"]["tokencomp"], answer
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    check_wheels(Path(sys.argv[1]))
    tokencomp("--version")
    assert "kcenter" in tokencomp("list", "reducers")
    tokencomp("doctor")
    tokencomp("demo")
    check_patch()
    check_eval()
    check_serve()
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
