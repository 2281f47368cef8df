"""What a patch costs on a GPU: whole prefills, kernels, and two attention backends.

    python -m benchmarks.gpu.prefill             # everything → CARD.jsonl and prefill.md
    python -m benchmarks.gpu.prefill --report    # only rebuilds the page
    python -m benchmarks.gpu.prefill --dry-run   # the same steps on a CPU, with a tiny decoder

It needs one GPU with 24 GB and about half an hour, by an estimate: no GPU has run it yet. Most of
that time goes to Triton, which compiles every kernel at its first call. Steps that stand in
the file of the same card and commit are left out, so that a run that was interrupted goes on where
it stopped. The steps are:

1. Prefills of decoders with 0.5B, 2B and 7B parameters (random weights, bfloat16) over 1, 4 and 16
   images and a video, timed with CUDA events: the unpatched model, a patch at ratio 0, every
   reducer, and the unpatched model on a text as long as the compressed prompt.
2. The Triton kernels at the sizes of `benchmarks.kernels.cases`, against their roofline.
3. The patched model under FlashAttention-2 against the patched model under SDPA. Without the
   package `flash-attn` the step is recorded as left out.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import publishing
from benchmarks.gpu.measurements import backends, flash_available, prefills
from benchmarks.gpu.page import page
from benchmarks.gpu.prompts import DECODERS, PROMPTS, TINY, TINY_PROMPTS, build
from benchmarks.kernels.cases import CASES
from benchmarks.kernels.run import line, measure
from tokencomp.storage import write_lines

FOLDER = Path(__file__).parent
DRY_SCALE = 1 / 256
Records = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """How the steps run: on a GPU, or as a trial on a CPU."""

    device: torch.device
    dtype: torch.dtype
    decoders: dict[str, Any]
    prompts: dict[str, Any]
    warmup: int
    repeats: int
    dry: bool

    @classmethod
    def of(cls, dry: bool) -> Setting:
        """The setting of a real run, or of a dry one."""
        if dry:
            cpu = torch.device("cpu")
            return cls(cpu, torch.float32, TINY, TINY_PROMPTS, 1, 1, True)
        gpu = torch.device("cuda", torch.cuda.current_device())
        return cls(gpu, torch.bfloat16, DECODERS, PROMPTS, 3, 20, False)

    @property
    def card(self) -> str:
        """Name of the device, as CUDA reports it."""
        return "CPU (dry run)" if self.dry else torch.cuda.get_device_name(self.device)


def steps(setting: Setting) -> Iterator[tuple[str, Callable[[], Records]]]:
    """Name and work of every step; a model is built once for all steps that use it."""
    models: dict[str, Any] = {}

    def model_of(name: str) -> Any:
        if name not in models:
            models.clear()
            gc.collect()
            models[name] = build(setting.decoders[name], setting.device, setting.dtype)
        return models[name]

    for name in setting.decoders:
        for prompt_name, prompt in setting.prompts.items():
            yield (
                f"prefill, {name}, {prompt_name}",
                lambda n=name, p=prompt: prefills(model_of(n), p, setting.warmup, setting.repeats),
            )
            yield (
                f"backends, {name}, {prompt_name}",
                lambda n=name, p=prompt: _backends(model_of(n), p, setting),
            )
    cases = CASES[:3] + CASES[-1:] if setting.dry else CASES
    for number, _ in enumerate(cases):
        yield f"kernel, {number}", lambda c=cases[number]: _kernel(c, setting)


def _backends(model: Any, prompt: Any, setting: Setting) -> Records:
    if setting.dry:  # eager attention stands for FlashAttention-2, which needs a GPU
        yield from backends(model, prompt, "eager")
    elif flash_available(setting.device):
        yield from backends(model, prompt, "flash_attention_2")
    else:
        yield {"left_out": "the package flash-attn is not installed"}


def _kernel(setup: Any, setting: Setting) -> Records:
    """One kernel against its roofline; on a CPU the plain version, at a fraction of the size."""
    backend = "naive" if setting.dry else "triton"
    case = setup(setting.device, setting.dtype, DRY_SCALE if setting.dry else 1.0)
    environment = {"TOKENCOMP_KERNELS": backend, "TOKENCOMP_KERNELS_CHECK": "0"}
    with mock.patch.dict(os.environ, environment), torch.inference_mode():
        times = measure(case.call, not setting.dry, 2)
        yield line(case, backend, times, setting.card)


def file_of(folder: Path, card: str) -> Path:
    """The file of a card's records."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.jsonl"


def run(setting: Setting, folder: Path, facts: dict[str, Any]) -> None:
    """Take the steps that this card and commit lack; write their records one step at a time."""
    path = file_of(folder, setting.card)
    records = [r for r in publishing.read_lines(path) if r["commit"] == facts["commit"]]
    done = {r["step"] for r in records}
    environment = publishing.environment()
    for name, work in steps(setting):
        if name in done:
            continue
        print(name, flush=True)
        common = {"step": name, "card": setting.card, **facts, "environment": environment}
        records += [{**common, **record} for record in work()]
        write_lines(path, records)


def main(arguments: list[str] | None = None) -> int:
    """Run, or only rebuild the page."""
    parser = publishing.parser(__doc__, FOLDER)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with a tiny decoder")
    args = parser.parse_args(arguments)
    if args.dry_run and args.out == FOLDER:
        parser.error("a dry run measures nothing: name a folder for its files with --out")
    if not args.report:
        if not args.dry_run and not torch.cuda.is_available():
            parser.error("no GPU is present. Use --dry-run to try the steps on a CPU")
        facts = publishing.published_from(args.out, args.allow_dirty)
        args.out.mkdir(parents=True, exist_ok=True)
        run(Setting.of(args.dry_run), args.out, facts)
    records = [r for path in sorted(args.out.glob("*.jsonl")) for r in publishing.read_lines(path)]
    if records:
        (args.out / "prefill.md").write_text(page(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
