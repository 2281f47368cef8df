"""Patches dropped before the vision tower: time to the first token, real shapes, random weights.

    python -m benchmarks.models.tower                      # all cases → tower.jsonl, tower.md
    python -m benchmarks.models.tower --cases qwen-image --rounds 1 --part 4
    python -m benchmarks.models.tower --device cuda --dtype bfloat16 --attention flash_attention_2
    python -m benchmarks.models.tower --report             # only rebuilds the page

Two kinds of cases. Towers alone, at several tower ratios: which share of the speed-up that FLOPs
allow is reached, and what choosing costs. Whole models: everything between a decoded picture and
the first token, full against (ratio 0.75, tower ratio 0.6). On a CPU the times are processor time
of one thread, which other programs on the machine hardly change; on a GPU they are elapsed time.
Records of other cases stay in the file, so the benchmark can be run in pieces.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import tokencomp
from benchmarks import publishing
from benchmarks.models.tower_page import CASES, RATIO, TOWER_RATIO, page
from benchmarks.publishing import environment
from tokencomp.adapters.registry import adapter_for
from tokencomp.plan import Plan
from tokencomp.profiling import shapes
from tokencomp.profiling.shapes import SHAPES
from tokencomp.reducers.kcentre import KCentre
from tokencomp.reduction import Reduction
from tokencomp.stages import TowerStage
from tokencomp.tokens import SpanBatch

FOLDER = Path(__file__).parent
TOWER_RATIOS = (0.25, 0.5, 0.6, 0.75)
TEXT = 48
UNIT = 28  # pixels of a side that become one visual token in Qwen2-VL
VISION = {"qwen2_vl": 32, "llava_onevision": 26}
"""Blocks of the vision towers."""


@dataclass(frozen=True, eq=False)
class Timed(KCentre):
    """k-centre that adds up what choosing costs."""

    clock: Any = None
    spent: Any = None

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        start = self.clock()
        reduction = super().reduce_batch(batch, keeps)
        self.spent.append(self.clock() - start)
        return reduction


def clock_of(device: str) -> Callable[[], float]:
    """Processor time of this process on a CPU, elapsed time on a GPU."""
    if device == "cpu":
        return time.process_time

    def elapsed() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return elapsed


def build(name: str, args: argparse.Namespace, layers: int | None = None) -> Any:
    """A model of that shape; `layers` of its decoder, None for all that there are."""
    shape = SHAPES[name]
    model, _ = shapes.build(
        name,
        tokens=1,
        layers=layers or shape.layers // args.part,
        vision_layers=VISION[shape.family] // args.part,
        dtype=getattr(torch, args.dtype),
        device=args.device,
    )
    model.set_attn_implementation(args.attention)
    return model


def qwen_inputs(model: Any, frames: int, side: int, args: argparse.Namespace) -> dict[str, Any]:
    """The processor's output for a picture (frames = 0) or video of noise, and its seconds."""
    from transformers import Qwen2VLImageProcessor

    clock, generator = clock_of("cpu"), torch.Generator().manual_seed(0)
    pictures = [
        Image.fromarray(torch.randint(256, (side, side, 3), generator=generator).byte().numpy())
        for _ in range(max(frames, 1))
    ]
    processor = Qwen2VLImageProcessor(min_pixels=UNIT**2, max_pixels=side**2)
    start, kind = clock(), "video" if frames else "image"
    # A video is read as pairs of frames: every patch holds two of them. The image processor repeats
    # a single picture instead, so a video's pixels are put together from its frames in pairs.
    parts = [processor(images=[p], return_tensors="pt")["pixel_values"] for p in pictures]
    seconds = clock() - start
    if frames:
        halves = [part.unflatten(1, (3, 2, -1)) for part in parts]
        pairs = zip(halves[::2], halves[1::2], strict=True)
        parts = [torch.stack([a[:, :, 0], b[:, :, 1]], 2).flatten(1) for a, b in pairs]
    t, h = len(parts), side // 14
    token = getattr(model.config, f"{kind}_token_id")
    count = t * (side // UNIT) ** 2
    before, after = [5] * 16 + [model.config.vision_start_token_id], [7] * (TEXT - 16)
    ids = torch.tensor([[*before, *[token] * count, model.config.vision_end_token_id, *after]])
    suffix = "_videos" if frames else ""
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == token).int() * (2 if frames else 1),
        f"pixel_values{suffix}": torch.cat(parts).to(getattr(torch, args.dtype)),
        f"{kind}_grid_thw": torch.tensor([[t, h, h]]),
    }
    moved = {name: value.to(args.device) for name, value in inputs.items()}
    return {"inputs": moved, "preprocess": seconds, "tokens": count}


class Marks:
    """When the tower, the projector and the decoder of a model begin and end."""

    def __init__(self, model: Any, clock: Callable[[], float]) -> None:
        self.clock, self.at = clock, {}
        adapter = adapter_for(model)
        parts = {"tower": adapter.tower, "decoder": adapter.decoder}
        self._hooks = []
        for name, module in parts.items():
            self._hooks += [
                module.register_forward_pre_hook(self._mark(f"{name} begins"), prepend=True),
                module.register_forward_hook(self._mark(f"{name} ends")),
            ]

    def _mark(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.at[name] = self.clock()

        return hook

    def seconds(self, part: str) -> float:
        return self.at[f"{part} ends"] - self.at[f"{part} begins"]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def tower_case(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of one tower at every tower ratio, full runs in between."""
    clock, frames = clock_of(args.device), name == "siglip-tower"
    model = build("llava-onevision-0.5b" if frames else "qwen2-vl-2b", args, layers=1)
    if frames:
        pixels = torch.randn(1, 1, 3, 384, 384, dtype=getattr(torch, args.dtype))
        call: dict[str, Any] = {
            "pixel_values_videos": pixels.to(args.device),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }
        encode = "get_video_features"  # looked up in every call: a patch replaces it
    else:
        inputs = qwen_inputs(model, 0, 32 * UNIT, args)["inputs"]
        call = {n: inputs[n] for n in ("pixel_values", "image_grid_thw")}
        encode = "get_image_features"
    spent: list[float] = []
    plans = {
        ratio: Plan((), TowerStage(0, 1 - ratio, Timed(clock=clock, spent=spent)))
        for ratio in TOWER_RATIOS
    }
    times: dict[float, list[tuple[float, float]]] = {0.0: [], **{r: [] for r in plans}}
    flops = {}

    def run(ratio: float) -> tuple[float, float]:
        spent.clear()
        if not ratio:
            start = clock()
            getattr(model.model, encode)(**call)
            return clock() - start, 0.0
        with tokencomp.patch(model, plan=plans[ratio]) as handle:
            start = clock()
            getattr(model.model, encode)(**call)
            seconds = clock() - start
            # The tower ran alone, so there is no prefill whose stats would say this.
            (cost,) = handle._hooks._plan_hooks.drop.collect(1)
            tower, projector = cost.tower_flops, cost.projector_flops
            flops[ratio] = (tower[0] + projector[0]) / (tower[1] + projector[1])
        return seconds, sum(spent)

    with torch.inference_mode():
        run(TOWER_RATIOS[-1])  # warm-up, on the smallest
        for _ in range(args.rounds):
            for ratio, values in times.items():
                values.append(run(ratio))
                print(f"{name}: tower ratio {ratio:g}, {values[-1][0]:.2f} s", flush=True)
    full = statistics.median(t for t, _ in times[0.0])
    for ratio in plans:
        seconds = statistics.median(t for t, _ in times[ratio])
        chosen = statistics.median(s for _, s in times[ratio])
        yield {
            "case": name, "tower_ratio": ratio, "full_s": full, "seconds": seconds,
            "speedup": full / seconds, "flop_limit": flops[ratio],
            "of_limit": full / seconds / flops[ratio], "choose_s": chosen,
            "choose_share": chosen / full, "rounds": args.rounds,
        }  # fmt: skip


def model_case(name: str, args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The record of a whole model: full, the decoder alone compressed, and both compressed."""
    clock = clock_of(args.device)
    side = args.side if name == "qwen-video" else 32 * UNIT
    prompt = qwen_inputs(model, 32 if name == "qwen-video" else 0, side, args)
    inputs: dict[str, Tensor] = prompt["inputs"]
    spent: list[float] = []
    timed = Timed(clock=clock, spent=spent)
    variants: dict[str, dict[str, Any]] = {
        "full": {},
        "decoder": {"ratio": RATIO},
        "both": {"ratio": RATIO, "tower_ratio": TOWER_RATIO, "tower_reducer": timed},
    }
    rows: dict[str, list[dict[str, float]]] = {key: [] for key in variants}

    def run(options: dict[str, Any]) -> dict[str, float]:
        spent.clear()
        with tokencomp.patch(model, **options) if options else torch.inference_mode() as handle:
            marks, start = Marks(model, clock), clock()
            with torch.inference_mode():
                model(**inputs, use_cache=True, logits_to_keep=1)
            total = clock() - start
            marks.remove()
            stats = handle.stats if options else None
        reduce = stats.reduce_seconds if stats else 0.0
        return {
            "tower": marks.seconds("tower") - sum(spent), "choose": sum(spent), "reduce": reduce,
            "prefill": marks.seconds("decoder") - reduce,
            "rest": total - marks.seconds("tower") - marks.seconds("decoder"),
            "total": total + prompt["preprocess"], "preprocess": prompt["preprocess"],
        }  # fmt: skip

    with torch.inference_mode():
        for number in range(args.rounds):
            for key, options in variants.items():
                rows[key].append(run(options))
                print(f"{name} {number + 1}: {key}, {rows[key][-1]['total']:.1f} s", flush=True)
    medians = {
        key: {part: statistics.median(r[part] for r in row) for part in row[0]}
        for key, row in rows.items()
    }
    return {
        "case": name, "tokens": prompt["tokens"], "side": side, "rounds": args.rounds,
        "parts": medians,
        "speedup": {k: medians["full"]["total"] / m["total"] for k, m in medians.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=448, help="pixels per side of a video frame")
    parser.add_argument(
        "--part", type=int, default=1, help="4: a quarter of the blocks of tower and decoder"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--report", action="store_true", help="only rebuild the page")
    publishing.add_argument(parser)
    args = parser.parse_args()
    path = args.output / "tower.jsonl"
    records = [json.loads(r) for r in path.read_text().splitlines()] if path.exists() else []
    facts = {} if args.report else publishing.published_from(args.output, args.allow_dirty)
    if args.device == "cpu":
        torch.set_num_threads(1)
    own = "one CPU thread" if args.device == "cpu" else torch.cuda.get_device_name()
    machine = f"{own}, {args.dtype}, {args.attention}"
    machine += f", 1/{args.part} of the blocks" if args.part > 1 else ""
    whole = None
    for name in () if args.report else args.cases:
        if name.endswith("tower"):
            fresh = list(tower_case(name, args))
        else:
            whole = whole or build("qwen2-vl-2b", args)
            fresh = [model_case(name, args, whole)]
        kept = [r for r in records if (r["case"], r["machine"]) != (name, machine)]
        extra = {"machine": machine, "provenance": {**facts, **environment()}}
        records = [*kept, *({**record, **extra} for record in fresh)]
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    order = list(CASES)
    records.sort(
        key=lambda r: (r["machine"], order.index(r["case"]), r.get("tower_ratio", math.nan))
    )
    (args.output / "tower.md").write_text(page(records), encoding="utf-8")


if __name__ == "__main__":
    main()
