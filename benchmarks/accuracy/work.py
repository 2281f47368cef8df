"""Where the work of one answer goes: FLOPs of tower, projector, reducer and decoder, KV bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import TokenCompError
from tokencomp.evaluation.batches import Answerer, Loaded, kind_of
from tokencomp.evaluation.cost import prefill_costs
from tokencomp.evaluation.settings import Setting
from tokencomp.evaluation.timing import prefill_split
from tokencomp.inputs.prompts import to_model
from tokencomp.inputs.questions import Example
from tokencomp.kernels import dispatch
from tokencomp.torchlib.hooks import Hooked

PARTS = ("tower", "projector", "reduce", "prefill", "decode", "kv_bytes")
"""FLOPs, but for the bytes of keys and values; `decode` is one further token."""
# PyTorch's own formulas for these fail on fewer key than query heads in older releases, and it has
# none for CPUs.
SDPA = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
COUNTED = ("eager", "sdpa", "flex_attention")
"""Attention that the counter sees. Kernels of other packages, such as flash_attn, it does not."""


@dataclass(frozen=True)
class VisionWork:
    """FLOPs before the decoder and beside it, counted on one prefill that really ran.

    Only products of matrices and convolutions count; a multiplication and an addition are two
    FLOPs.

    Attributes
    ----------
    tower
        Vision tower, its patch embedding and the choice of a tower stage included, and whatever
        else runs before the decoder; None where its attention cannot be counted (`COUNTED`).
    projector
        The modules that turn patches into tokens; None where the family does not name them, so
        that they are part of `tower`.
    reduce
        The reducer at every stage, its scores included, in plain PyTorch.
    """

    tower: int | None
    projector: int | None
    reduce: int


class FlopClock(FlopCounterMode):
    """PyTorch's counter, extended by attention on CPUs and by the kernels of this package.

    As a clock of `prefill_split` it shows FLOPs; the prefill must run inside its context.
    """

    def __init__(self) -> None:
        formulas: dict[Any, Any] = {
            getattr(torch.ops.tokencomp, name): _plain_flops(body)
            for name, body in dispatch.BODIES.items()
        }
        attention = [getattr(torch.ops.aten, name, None) for name in SDPA]
        formulas |= {op: _raw(_attention_flops) for op in attention if op is not None}
        super().__init__(display=False, custom_mapping=formulas)

    def mark(self) -> int:
        return int(self.get_total_flops())

    def between(self, start: int, stop: int) -> int:
        return stop - start

    def finish(self) -> None:
        """Nothing to wait for."""


def work_parts(
    model: Any,
    processor: Any,
    settings: Iterable[Setting],
    examples: Sequence[Example],
    frames: int,
) -> dict[Setting, dict[str, dict[str, int | None]]]:
    """By setting and modality: `PARTS` of the first answer about an image, and about a video.

    A projector that the family does not name is None.
    """
    answerer, rows = Answerer({"": model}, processor, {}), dict[str, Loaded]()
    for example in examples:
        row = (example, example.load(frames))
        rows.setdefault(kind_of(row), row)
    with answerer.patches:
        return {
            setting: {kind: _parts(answerer, setting, row) for kind, row in rows.items()}
            for setting in settings
        }


def _parts(answerer: Answerer, setting: Setting, row: Loaded) -> dict[str, int | None]:
    model = answerer.plain
    inputs = to_model(answerer.inputs([row], setting), model)
    with answerer.patches.applied(setting, [row[0].id]) as handle:
        counted = vision_work(model, inputs)
        (cost,) = prefill_costs(model, inputs, handle.stats if handle else None)
    decoder = {"prefill": cost.flops, "decode": cost.decode_flops, "kv_bytes": cost.kv_bytes}
    return {**vars(counted), **decoder}


def vision_work(model: Any, inputs: dict[str, Any]) -> VisionWork:
    """Count the work of one prefill; call it inside the patch."""
    projectors = _projectors(model)
    with FlopClock() as clock, _Inside(projectors, clock) as inside:
        split = prefill_split(model, inputs, clock)
    tower = int(split.vision) - inside.total if _sees_attention(model) else None
    return VisionWork(tower, inside.total if projectors else None, int(split.reduce))


class _Inside(Hooked):
    """What a clock grows by inside of some modules."""

    def __init__(self, modules: list[torch.nn.Module], clock: FlopClock) -> None:
        self.clock, self.total, self._start = clock, 0, 0
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, prepend=True))

    def _enter(self, *_: Any) -> None:
        self._start = self.clock.mark()

    def _leave(self, *_: Any) -> None:
        self.total += self.clock.mark() - self._start


def _projectors(model: Any) -> list[torch.nn.Module]:
    """The modules that turn patches into tokens; none where the family does not name them."""
    try:
        return adapter_for(model).tower_layout().projectors
    except TokenCompError:
        return []


def _sees_attention(model: Any) -> bool:
    """Whether the counter sees the attention of all parts of the model."""
    configs = (getattr(module, "config", None) for module in model.modules())
    names = {getattr(config, "_attn_implementation", None) for config in configs}
    return names <= {None, *COUNTED}


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Mark a formula that takes the tensors themselves, and not their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]  # how PyTorch's counter marks them
    return formula


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products per pair of a query and a key, both halves of a causal mask counted."""
    *batch, rows, width = query.shape
    pairs = int(torch.Size(batch).numel()) * rows * key.shape[-2]
    return 2 * pairs * (width + value.shape[-1])


def _plain_flops(body: Callable[..., Any]) -> Callable[..., int]:
    """FLOPs of a kernel: its body runs once more, in plain PyTorch, under a counter of its own."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        with dispatch.plain(), FlopClock() as counter:
            body(*args, **kwargs)
        return counter.mark()

    return _raw(count)
