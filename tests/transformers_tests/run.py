"""Hugging Face's own model tests on patched models.

Runs the model test files of our families three times: unpatched, patched at ratio 0 and at ratio
0.5, and compares the outcome of every test. Differences must be those that `expected.json` lists,
each with its reason; at ratio 0 there is none.

Needs a checkout of transformers (with `src` and `tests`), whose own code is then tested, and what
its tests import: pip install parameterized datasets requests psutil. Nothing is downloaded; tests
that need the network fail or skip in all three runs alike. On two cores one family takes minutes:

    python tests/transformers_tests/run.py ~/transformers --families qwen2_vl qwen3_vl
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

FOLDER = Path(__file__).parent
FAMILIES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava", "llava_next",
    "llava_next_video", "llava_onevision", "internvl", "smolvlm", "idefics3",
)  # fmt: skip
RATIOS = ("0", "0.5")


def outcomes(checkout: Path, family: str, ratio: str | None, more: list[str]) -> dict[str, str]:
    """Outcome of every test of a family: "passed", "skipped", or "failed: first line of why".

    Parameters
    ----------
    ratio
        None: unpatched.
    more
        Further arguments of pytest.
    """
    paths = [str(checkout / "src"), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    environment.pop("TOKENCOMP_TEST_RATIO", None)
    if ratio is not None:
        environment["TOKENCOMP_TEST_RATIO"] = ratio
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        file = f"tests/models/{family}/test_modeling_{family}.py"
        command = [
            sys.executable, "-m", "pytest", file, "-p", "patched_models", "-q", "-k", "not slow",
            "--junitxml", str(report), "-o", "junit_family=xunit1", "-o", "log_cli=false", *more,
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1) or not report.exists():
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
        return dict(_read(report))


def _read(report: Path) -> list[tuple[str, str]]:
    read = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome = "passed"
        for node in case:
            if node.tag == "skipped":
                outcome = "skipped"
            elif node.tag in ("failure", "error"):
                outcome = "failed: " + (node.get("message") or "").split("\n")[0][:160]
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        read.append((name, outcome))
    return read


def differences(before: dict[str, str], after: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Tests whose outcome is another one, with both; how a failing test fails is no matter."""
    names = sorted(before.keys() | after.keys())
    pairs = {n: (before.get(n, "missing"), after.get(n, "missing")) for n in names}
    return {n: p for n, p in pairs.items() if p[0].split(":")[0] != p[1].split(":")[0]}


def expected_reason(
    expected: list[dict[str, str]], family: str, ratio: str, test: str, outcome: str
) -> str:
    """Why this test is known to end in another way, or ""."""
    for entry in expected:
        applies = (
            entry["ratio"] == ratio
            and fnmatch.fnmatch(test, entry["test"])
            and fnmatch.fnmatch(outcome, entry.get("outcome", "*"))
            and any(fnmatch.fnmatch(family, name) for name in entry["families"].split())
        )
        if applies:
            return entry["reason"]
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="checkout of huggingface/transformers")
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--ratios", nargs="+", default=RATIOS, choices=RATIOS)
    parser.add_argument("--workers", default="0", help="processes of pytest-xdist")
    parser.add_argument("--output", type=Path, help="JSON file for all outcomes")
    args = parser.parse_args()
    expected = json.loads((FOLDER / "expected.json").read_text())["differences"]
    unexpected, table, reasons = 0, {}, set()
    for family in args.families:
        more = ["-n", args.workers]
        before = outcomes(args.checkout, family, None, more)
        table[family] = {"unpatched": before}
        for ratio in args.ratios:
            after = table[family][ratio] = outcomes(args.checkout, family, ratio, more)
            changed = differences(before, after)
            print(f"{family} at ratio {ratio}: {len(after)} tests, {len(changed)} differ")
            for test, (was, now) in changed.items():
                reason = expected_reason(expected, family, ratio, test, now)
                unexpected += not reason
                reasons.add((ratio, reason))
                print(f"  {'expected' if reason else 'UNEXPECTED'} {test}: {was} → {now}")
            sys.stdout.flush()
        if args.output is not None:
            args.output.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    for entry in expected:
        if entry["ratio"] in args.ratios and (entry["ratio"], entry["reason"]) not in reasons:
            print(f"listed, but did not occur here: {entry['test']}: {entry['reason']}")
    print(f"{unexpected} unexpected differences")
    return 1 if unexpected else 0


if __name__ == "__main__":
    raise SystemExit(main())
