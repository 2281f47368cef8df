"""Does tokencomp run with releases that its pins do not know yet? Writes a report on what broke.

    python .ci/follow.py GROUP REPORT.md

follow.json has the parts of a group: name, command, and the packages whose releases are followed.
Every part runs, also after one that failed. The report names, per part, the installed versions,
the tests that failed with the last line of each error, and the first error of the first one in
full: what a maintainer needs to decide between a mend and a pin. Exit status 1 if a part failed.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path
from typing import Any

PARTS = Path(__file__).with_suffix(".json")
MOST = 20
"""Failures that the report lists by name."""
TAIL = 30
"""Lines of the first failure."""


def run(part: dict[str, Any], junit: Path) -> dict[str, Any]:
    """Run a part; returns its exit status, output and failed tests."""
    junit.unlink(missing_ok=True)
    words = {"{junit}": str(junit), "{python}": sys.executable}
    command = part["command"]
    for word, value in words.items():
        command = [one.replace(word, value) for one in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    failed = failures(junit) if junit.exists() else []
    return {"rc": done.returncode, "output": done.stdout, "failed": failed}


def failures(junit: Path) -> list[tuple[str, str]]:
    """Name and text of every failed test of a JUnit file."""
    found = []
    for case in ElementTree.parse(junit).iter("testcase"):
        for kind in ("failure", "error"):
            if (node := case.find(kind)) is not None:
                name = f"{case.get('classname', '')}::{case.get('name', '')}"
                found.append((name, node.text or node.get("message") or ""))
    return found


def last_error(text: str) -> str:
    """The line that names the error, without the marks of pytest."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = lines or [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Warning|Exit)\b", line)]
    return ([*named, *lines[-1:]] or [""])[0][:200]


def section(part: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """The report on one part."""
    versions = ", ".join(f"{name} {version(name)}" for name in part["follows"])
    word = "broke" if result["rc"] else "runs"
    repeat = [one.replace("{python}", "python") for one in part["command"] if "{junit}" not in one]
    lines = [f"## {part['name']}: {word} ({versions})", "", f"`{shlex.join(repeat)}`", ""]
    if not result["rc"]:
        return lines
    failed = result["failed"]
    lines += [f"- `{name}`: {last_error(text)}" for name, text in failed[:MOST]]
    lines += [f"- and {len(failed) - MOST} more"] if len(failed) > MOST else []
    text = failed[0][1] if failed else result["output"]
    tail = text.strip().splitlines()[-TAIL:]
    return [*lines, "", "```", *tail, "```", ""]


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parts = json.loads(PARTS.read_text())[sys.argv[1]]
    report = Path(sys.argv[2])
    lines, broken = [], []
    for part in parts:
        print(f"== {part['name']}", flush=True)
        result = run(part, report.with_suffix(".xml"))
        lines += section(part, result)
        broken += [part["name"]] if result["rc"] else []
        print("broke" if result["rc"] else "runs", flush=True)
    head = f"broke: {', '.join(broken)}" if broken else "everything runs"
    text = "\n".join([f"# Newest {sys.argv[1]}: {head}", "", *lines])
    report.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
