"""Checks that a tiny model must pass before its type counts as compressed exactly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp.conformance.build import BuildError, TinyModel
from tokencomp.conformance.oracle import OracleError, columns_left, hidden, merged
from tokencomp.conformance.prompts import Prompts
from tokencomp.conformance.turns import DROPPED, TURNS, Turns, default_plan
from tokencomp.errors import CacheError, PlanError, TokenCompError, UnsupportedModelError
from tokencomp.plan.plan import Plan, Stage
from tokencomp.plan.schedules import not_before
from tokencomp.reducers.registry import make_reducer
from tokencomp.reducers.uniform import Uniform

Status = Literal["exact", "entry only", "refused", "unverified"]
Compress = Callable[[Any, Plan], Any]
"""`(model, plan) → handle`, a context manager with `stats`; as `tokencomp.patch` is."""
TOLERANCE = 5e-5
"""Largest difference in float32. With some random weights Gemma 4 comes close to it, with 4e-5: its
attention does not scale its logits, which span about 40, so that softmax enlarges their rounding.
In float64 the same prompts differ by 2e-14."""
EFFECT = 1e-2
"""Compression must change the logits by this much: else a wrong mask would pass as well."""
STEPS = 4
SCORED = ("condiv", "fastv", "prune", "pyramiddrop")
"""Reducers that read attention: every way to score at entry and later."""


@dataclass
class Result:
    """Result of the checks of a type.

    `status` is "exact": at entry and between layers. "entry only": at entry. "refused": by the
    package, before anything ran. "unverified": could not be checked, or is not exact. `reason` says
    why it is not exact; `refusals`, by reducer that reads attention or by check of `TURNS`, why the
    package refuses it; `unpatched`, by check of `TURNS`, what the unpatched model does wrong there
    itself. `errors` has the largest difference of logits by check, and the effect of compression,
    both in units of the logits' standard deviation.
    """

    status: Status
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    unpatched: dict[str, str] = field(default_factory=dict)


class NotExact(Exception):
    """A difference above the tolerance."""


def check_model(tiny: TinyModel, compress: Compress) -> Result:
    """Run all checks on a tiny model."""
    errors: dict[str, float] = {}
    try:
        compress(tiny.whole, Plan()).remove()
        checks = Checks(tiny, Prompts(tiny), compress, errors)
        checks.identity()
        checks.entry()
    except UnsupportedModelError as error:
        return Result("refused", str(error), errors)
    except (NotExact, BuildError, OracleError) as error:
        return Result("unverified", str(error), errors)
    except TokenCompError as error:
        return Result("refused", f"{type(error).__name__}: {error}", errors)
    except Exception as error:
        return Result("unverified", f"{type(error).__name__}: {error}", errors)
    result = Result("exact", "", errors)
    try:
        checks.layers()
    except Exception as error:
        result = Result("entry only", _reason(error), errors)
    for name in SCORED:
        try:
            checks.scored(name)
        except (PlanError, UnsupportedModelError) as error:
            result.refusals[name] = str(error)
        except Exception as error:
            return replace(result, status="unverified", reason=f"{name}: {_reason(error)}")
    try:
        checks.merging()
        checks.turns(result)
    except Exception as error:
        return replace(result, status="unverified", reason=_reason(error))
    return result


def _reason(error: Exception) -> str:
    return f"{'' if isinstance(error, NotExact) else f'{type(error).__name__}: '}{error}"


class Checks:
    """The checks of one model; each raises `NotExact` if it fails.

    `errors` gets the largest difference of every check.
    """

    def __init__(
        self, tiny: TinyModel, prompts: Prompts, compress: Compress, errors: dict[str, float]
    ) -> None:
        self.tiny, self.prompts, self.compress, self.errors = tiny, prompts, compress, errors
        self.stack: Any = tiny.decoder.layers
        self.depth = len(self.stack)  # type: ignore[arg-type]  # a ModuleList
        self.inputs = prompts.inputs()
        self.real = self.inputs["attention_mask"].bool()
        self.plain: Tensor = prompts.forward(self.inputs).logits
        self.scale = float(self.plain[self.real].std()) or 1.0

    def _limit(self, name: str, value: float, limit: float = TOLERANCE) -> None:
        self.errors[name] = max(value, self.errors.get(name, 0.0))
        if not value <= limit:  # so that NaN fails
            raise NotExact(f"{name}: difference {value:.1e}, allowed {limit:.0e}")

    def identity(self) -> None:
        """At ratio 0 the output is bit-identical."""
        tokens, logits = self.prompts.generate(self.prompts.inputs(), STEPS)
        with self.compress(self.tiny.whole, Plan()):
            patched = self.prompts.forward(self.prompts.inputs()).logits
            same = self.prompts.generate(self.prompts.inputs(), STEPS)
        self._limit("identity", self._distance(patched[self.real], self.plain[self.real]), 0.0)
        self._limit("identity", self._distance(same[1], logits), 0.0)
        self._limit("identity", float((same[0] != tokens).sum()), 0.0)

    def entry(self) -> None:
        """Half of the visual tokens are dropped before the first layer."""
        plan = Plan((Stage(0, 0.5, Uniform()),))
        self._against_oracle("entry", plan)
        self._batch_equals_single(plan)

    def layers(self) -> None:
        """Some are dropped at entry, some between later layers."""
        late = Stage(self.depth - 1, 0.25, Uniform())
        middle = Stage(max(1, self.depth // 2), 0.5, Uniform())
        stages: tuple[Stage, ...] = (Stage(0, 0.75, Uniform()), middle, late)
        try:
            self.compress(self.tiny.whole, Plan(stages)).remove()
        except PlanError:  # the first layers get features of the tower added
            stages = (stages[0], late)
        self._against_oracle("layers", Plan(stages))

    def scored(self, name: str, **options: Any) -> None:
        """A prefill under an attention-based reducer at ratio 0.5 equals the masked full run."""
        reducer = make_reducer(name, **options)
        plan = reducer.plan(0.5, self.depth)
        try:
            self.compress(self.tiny.whole, plan).remove()
        except PlanError:  # as in `layers`: half of the tokens before the last layer
            late = reducer.plan(0.5 / self.depth, self.depth)
            plan = not_before(late, self.depth - 1, self.depth)
        with self.compress(self.tiny.whole, plan) as handle:
            words, steps = self.prompts.generate(self.prompts.inputs(), STEPS)
            left = self._left(handle.stats, plan)
        self._decode_against_oracle(name, left, words, steps)

    def merging(self) -> None:
        """The plan of `patch(model)`, which merges where the model can."""
        plan = default_plan(self.depth)
        with self.compress(self.tiny.whole, plan) as handle:
            compressed = self.prompts.forward(self.prompts.inputs()).logits
            left, stats = self._left(handle.stats, plan), handle.stats
            words, steps = self.prompts.generate(self.prompts.inputs(), STEPS)
        extended = [torch.cat([mask, torch.ones_like(words).bool()], 1) for mask in left]
        reference = self._merged(extended, words, stats)
        kept = left[-1].nonzero(as_tuple=True)
        self._limit("merge", self._distance(compressed[kept], reference[kept]))
        self._limit("merge decode", self._distance(steps, reference[:, -STEPS - 1 : -1]))

    def _merged(self, left: list[Tensor], words: Tensor, stats: Any) -> Tensor:
        """Logits (B, L + T, V) of the whole model on prompts and `words`, with merged tokens."""
        gains: list[Tensor | None] = [None]

        def enter(decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            embeds = kwargs.get("inputs_embeds")
            if embeds is not None:  # Chameleon's decoder makes them itself
                kwargs["inputs_embeds"], gains[0] = merged(embeds, stats)
            return args, kwargs

        def first(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if gains[0] is not None:
                return args, kwargs
            states, gains[0] = merged(args[0], stats)
            return (states, *args[1:]), kwargs

        hooks: list[Any] = []
        if stats.merged_from is not None:
            for module, hook in ((self.tiny.decoder, enter), (self.stack[0], first)):
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            with hidden(self.stack, left, lambda: gains[0]):
                inputs = self.prompts.inputs(new=words)
                logits: Tensor = self.prompts.forward(inputs, use_cache=False).logits
        finally:
            for undo in hooks:
                undo.remove()
        return logits

    def turns(self, result: Result) -> None:
        """What runs after a prompt: under dropping and under the plan of `patch(model)`."""
        turns = Turns(self.prompts)
        for name in TURNS:
            for plan in (DROPPED, default_plan(self.depth)):
                try:
                    value = turns.run(name, partial(self.compress, self.tiny.whole, plan))
                    self._limit(name, value / self.scale)
                except TokenCompError as error:
                    if isinstance(error, CacheError):
                        raise
                    result.refusals[name] = _reason(error)
                except Exception as error:
                    failed = self._control(turns, name)
                    if not failed and isinstance(error, NotExact):
                        raise
                    if not failed:
                        raise NotExact(f"{name}: {_reason(error)}") from error
                    result.unpatched[name] = failed
                    self.errors.pop(name, None)
                    break

    def _control(self, turns: Turns, name: str) -> str:
        """How the unpatched model fails in the check `name` by itself; "": it does not."""
        try:
            value = turns.run(name, nullcontext) / self.scale
        except Exception as error:
            return _reason(error)
        return "" if value <= TOLERANCE else f"its logits differ by {value:.1e}"

    def _against_oracle(self, name: str, plan: Plan) -> None:
        """Prefill and decode steps of a plan, compared with hiding the same tokens."""
        with self.compress(self.tiny.whole, plan) as handle:
            compressed = self.prompts.forward(self.prompts.inputs()).logits
            left = self._left(handle.stats, plan)
            words, steps = self.prompts.generate(self.prompts.inputs(), STEPS)
        with hidden(self.stack, left):
            reference = self.prompts.forward(self.prompts.inputs(), use_cache=False).logits
        self._limit(name, self._distance(compressed[left[-1]], reference[left[-1]]))
        if name == "entry":
            self.errors["effect"] = self._distance(compressed[:, -1], self.plain[:, -1])
            if self.errors["effect"] < EFFECT:
                raise NotExact(f"compression changes logits by {self.errors['effect']:.1e} only")
        self._decode_against_oracle(f"{name} decode", left, words, steps)

    def _decode_against_oracle(
        self, name: str, left: list[Tensor], words: Tensor, steps: Tensor
    ) -> None:
        """Logits of the prompt's last token, and of decode steps, on the tokens `left`.

        `words` (B, T) and `steps` (B, T, V) are what `Prompts.generate` returned.
        """
        new = torch.ones_like(words).bool()
        longer = [torch.cat([mask, new], 1) for mask in left]
        with hidden(self.stack, longer):
            extended = self.prompts.inputs(new=words)
            reference = self.prompts.forward(extended, use_cache=False).logits
        self._limit(name, self._distance(steps, reference[:, -STEPS - 1 : -1]))

    def _batch_equals_single(self, plan: Plan) -> None:
        """A row of the ragged batch equals the same row alone, if it does so uncompressed."""
        for row in range(len(self.prompts.rows)):
            inputs = self.prompts.inputs([row])
            alone = self.prompts.forward(inputs).logits[0, -1]
            own = self._distance(alone, self.plain[row, -1])
            with self.compress(self.tiny.whole, plan):
                single = self.prompts.forward(self.prompts.inputs([row])).logits[0, -1]
                batch = self.prompts.forward(self.prompts.inputs()).logits[row, -1]
            if own > TOLERANCE:
                self.errors["batch, uncompressed"] = own
            else:
                self._limit("batch", self._distance(single, batch))

    def _left(self, stats: Any, plan: Plan) -> list[Tensor]:
        """By layer: the kept columns (B, L) according to the stats."""
        visual = int((self.inputs["input_ids"] == self.prompts.image_id).sum())
        if sum(stats.tokens_before) != visual:
            raise NotExact(f"{sum(stats.tokens_before)} of {visual} visual tokens seen")
        left = columns_left(stats, plan, self.real, self.depth)
        if int(left[-1].sum()) == int(self.real.sum()):
            raise NotExact("no token left the prompt")
        return left

    def _distance(self, a: Tensor, b: Tensor) -> float:
        return float((a.float() - b.float()).abs().max()) / self.scale
