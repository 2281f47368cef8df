"""`patch` and `unpatch`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.registry import adapter_for, unwrap
from tokencomp.adapters.verified import accepts_unverified, unverified_accepted
from tokencomp.conformance.release import verify_release
from tokencomp.conformance.verify import verify_model
from tokencomp.context_window import (
    VISUAL_WINDOW,
    extend_visual_context,
    restore_visual_context,
)
from tokencomp.engine.call import CallHooks
from tokencomp.engine.hooks import CallGate, Hooks
from tokencomp.errors import AlreadyCompressedError, OptionError, PlanError
from tokencomp.handle import Handle, handle_of, make_plan
from tokencomp.kernels import prepare
from tokencomp.method import Method, usual_ratio
from tokencomp.plan.options import Merging, one_amount
from tokencomp.plan.plan import Plan
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.plan_json import PlanLike, as_plan
from tokencomp.validation import check_choice


def patch(
    model: nn.Module,
    ratio: float | Mapping[str, float] | None = None,
    *,
    budget: int | Mapping[str, int] | None = None,
    speedup: float | None = None,
    reducer: str | Reducer = "auto",
    plan: PlanLike | None = None,
    merge: Merging | None = None,
    tower_ratio: float | Literal["auto"] = 0.0,
    tower_reducer: str | Reducer = "auto",
    strict: bool = False,
    positions: Literal["original", "compact"] = "original",
    extend_context: bool | int = False,
    verify: bool = False,
    **options: Any,
) -> Handle:
    """Compress the visual tokens of every later forward and generate call of `model`.

    Parameters
    ----------
    model
        A Hugging Face multimodal model (also inside PEFT and torch.compile wrappers), or its body,
        as `AutoModel` loads it and embedding models call it. Its weights, config, class and
        attention backend are not changed.
    ratio
        Fraction of visual-token work removed from the LLM, in [0, 1): 1 - mean over decoder layers
        of visual tokens seen / visual tokens of the prompt. 0 = off. None: 0.5, or the ratio of
        `plan`. A mapping gives ratios by modality, `{"video": 0.75, "audio": 0.5}`; other
        modalities are not compressed.
    budget
        Instead of `ratio`: the largest number of visual tokens per item, which has the ratio 1 -
        budget / its tokens; schedules are solved for that ratio. Smaller items are not compressed.
        `{"prompt": 4096}` is a budget for all items of a prompt together, which have one ratio. At
        any ratio every item keeps at least one token and its special tokens.
    speedup
        Instead of `ratio`: the factor by which the work from pixels to the first token falls, for
        vision tower, projector and decoder together, such as 2. From the size of every image or
        clip follow a tower ratio and a ratio on a path that validation questions have chosen
        (`tokencomp.plan.speed`); text is not counted. `handle.stats.speedup` has the factor of the
        last prompt with its text. Where no tower stage is possible the decoder alone is left.
    reducer
        A name from `tokencomp.available_reducers()`, or a `Reducer`. "auto": kcenter on images
        and videos, uniform on audio.
    plan
        Explicit stages, instead of `ratio`, `reducer` and options: a `Plan`, its JSON form
        `[{"layer": 0, "fraction": 0.5, "reducer": "bipartite"}, ...]` (see `plan_to_json`), or the
        path of a JSON file. A first stage with "tower" instead of "layer" acts in the vision tower.
    merge
        False: tokens that the reducer does not keep are dropped. True: they are averaged into their
        most similar kept token (as in ToMe). A merged token gets an attention bias of log(n) for
        its n tokens, and has one row in the KV cache. Special tokens and tokens dropped by a tower
        stage are not merged, and scores for later stages are computed without the bias. "auto":
        merges in videos and in images that keep at least a tenth of their tokens, if the model can,
        and drops elsewhere. None: "auto" for the default reducer, else False.
    tower_ratio
        Fraction of the vision tower's work to remove, in [0, `ratio`]: the patches of this share of
        the visual tokens are dropped before the first block of the tower, and the decoder never
        gets those tokens. 0 = off. "auto": the tower keeps 1.6 times the tokens that the decoder
        will see, and at least 60 % (so 0.4 from `ratio=0.625` on). With a budget per item, which
        the Qwen families support, only "auto" is allowed: the tower keeps at most 1.6 times the
        budget of each item.
    tower_reducer
        Chooses what the tower keeps, from pixels: a name, a `Reducer`, or "auto".
    strict
        Refuse prompts without visual input instead of passing them through.
    positions
        "original": kept tokens keep the positions of the full prompt, so that dropping equals
        masking. "compact": kept tokens are renumbered without gaps, as serving engines do for
        models with one position per token (refused for M-RoPE models, for which engines use
        original positions too).
    extend_context
        Extend the visual context window (`tokencomp.extend_visual_context`) to this many visual
        tokens of the uncompressed prompt; True: four times the 6272 of LLaVA-OneVision, which is
        assumed as the training window (up to it nothing is scaled; for other windows call
        `extend_visual_context(model, target, window=...)`).
    verify
        Check first that compression is exact on a tiny random model with the config of `model`
        (about two seconds; the checks that every verified type has passed). Needed for types that
        are not verified, such as those of remote code.
    **options
        Further options of the stages (`StageOptions`), and those of the named reducer.

    Returns
    -------
    Handle
        Undo with `handle.remove()`, `tokencomp.unpatch(model)`, or by leaving a `with` block.
        Patching a patched model replaces the earlier patch, unless the new one is refused. Leaving
        a `with` block restores the patch that it replaced.

    Notes
    -----
    A forward call with `logits_to_keep = k > 1` is read as assisted decoding: its last k - 1 tokens
    are drafts, which reducers do not treat as part of the question. If k - 1 reaches into visual
    tokens there are no drafts.

    Warns
    -----
    RatioWarning
        Once per plan, when a prompt misses its ratio by more than rounding to tokens: special
        tokens (line breaks) alone exceed it, or a combined reducer (`ccam+prune`) chooses the
        number itself.

    Raises
    ------
    RatioError, UnknownNameError, OptionError
        A bad ratio, budget or speedup, also a speedup that is out of reach; a bad reducer name,
        reducer option or `positions`; two of ratio, budget, speedup and plan; a plan together with
        a reducer, options or `merge`; a budget together with a tower ratio other than "auto", or
        one of a whole prompt with any; a speedup with a tower ratio, or with a reducer that acts
        between layers; merge=True for a reducer that merges by itself.
    PlanError
        A plan that cannot be read, or not be executed on this model; a tower ratio above the ratio;
        a reducer that cannot act in the tower.
    UnverifiedModelError
        The model's type is not verified, and `verify` is False or fails.
    UntestedReleaseError
        transformers is newer than the tested releases, and a check of the model failed there. The
        check runs once per model and machine, and takes about two seconds.
    UnsupportedModelError
        No adapter supports the model; the cells of its vision tower are unknown (`tower_ratio`), or
        it takes pictures of one size (`tower_ratio` with a budget); or its attention cannot apply
        weights (`merge=True`).
    AlreadyCompressedError
        The model is the body of a patched model, or the model around a patched body.
    ModelInUseError
        A call of the patched model is running, in any thread.
    """
    asked = one_amount(ratio, budget, plan, speedup) or {"ratio": usual_ratio(reducer)}
    spec = Method(
        reducer,
        options={**options, "merge": merge},
        plan=None if plan is None else as_plan(plan),
        tower_ratio=tower_ratio,
        tower_reducer=tower_reducer,
        **asked,
    )
    with _checked(model, spec) if verify else contextlib.nullcontext():
        return apply(model, spec, strict=strict, positions=positions, extend_context=extend_context)


@contextlib.contextmanager
def _checked(model: nn.Module, spec: Method) -> Iterator[None]:
    """Verify a tiny copy of a model, and take the model's type as verified in the block."""
    with unverified_accepted():
        result = verify_model(unwrap(model), _compress)
        _check_stages(make_plan(spec, adapter_for(model)), result.status)
        yield


def _compress(tiny: nn.Module, plan: Plan) -> Handle:
    return patch(tiny, plan=plan)


def _check_stages(plan: Plan, status: str) -> None:
    """Refuse stages between layers of a model that has passed the checks at entry only."""
    if plan.layer_stages and status == "entry only":
        raise PlanError(
            f"stages at layers {[s.layer for s in plan.layer_stages]}: a tiny model with the "
            "config of this one is exact at entry only. Use a reducer that acts there, such as "
            "'condiv', 'divprune' or 'bipartite'."
        )


def apply(
    model: nn.Module,
    spec: Method,
    *,
    strict: bool = False,
    positions: Literal["original", "compact"] = "original",
    extend_context: bool | int = False,
) -> Handle:
    """`patch` with a ready method, under which everything else is as described there."""
    adapter = adapter_for(model)
    if not accepts_unverified():  # a tiny model that is checked
        status = verify_release(unwrap(model), _compress)
        if status == "entry only":
            _check_stages(make_plan(spec, adapter), status)
    with CallGate.of(adapter.model).change():
        _check_free(adapter)
        check_choice("patch", "positions", positions, ("original", "compact"))
        if positions == "compact" and adapter.mrope:
            raise OptionError(
                f"positions='compact': {adapter.family} has three rows of positions (time, height, "
                "width), which cannot be renumbered without losing the grid. Leave it at "
                "'original'."
            )
        compact = positions == "compact"
        plan = make_plan(spec, adapter)
        if plan.active:  # before a CUDA graph is captured, or a server listens
            weights = next(adapter.decoder.parameters())
            prepare(weights.device, weights.dtype, torch.float32)
        hooks = Hooks(adapter, plan, strict, compact)
        earlier, context = handle_of(adapter.model), None
        if earlier is not None:
            earlier.suspend()  # before its window is replaced, so that it can restore that window
        try:
            if extend_context is not False:
                target = 4 * VISUAL_WINDOW if extend_context is True else extend_context
                context = extend_visual_context(adapter.model, target)
            return Handle(hooks, spec, context, earlier)
        except BaseException:
            if earlier is not None:
                earlier.resume()
            raise


def _call_hooks(*modules: nn.Module) -> list[CallHooks]:
    """The patches whose hooks are on any of the modules."""
    hooks = (hook for module in modules for hook in module._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, CallHooks)]


def _check_free(adapter: Adapter) -> None:
    """Refuse a model whose decoder is patched through another model."""
    for owner in _call_hooks(adapter.decoder):
        if owner.adapter.model is not adapter.model:
            raise AlreadyCompressedError(
                f"the decoder of this {type(adapter.model).__name__} is patched through a "
                f"{type(owner.adapter.model).__name__} already. Patch the one of the two that you "
                "call, and call tokencomp.unpatch on the other first."
            )


def check(model: nn.Module, spec: Method) -> None:
    """Raise what `apply(model, spec)` would raise, without touching the model."""
    adapter = adapter_for(model)
    _check_free(adapter)
    make_plan(spec, adapter)


def unpatch(model: nn.Module) -> None:
    """Undo `patch(model)` and `extend_visual_context(model, ...)`, if they were called.

    A patch of the body (`model.model`) is undone with the model, and the other way round.
    No call of the model may be running (`ModelInUseError`). Caches of compressed prompts belong to
    the patch and are refused without it (`UnsupportedCacheError`).
    """
    base = unwrap(model)
    if isinstance(base, Handle):
        base.remove()  # if a later patch replaced this one, the later patch stays in place
        return
    owners = [hooks.adapter.model for hooks in _call_hooks(*base.modules())]
    for one in dict.fromkeys((base, *owners)):
        with CallGate.of(one).change():
            handle = handle_of(one)
            if handle is not None:
                handle.remove()
            restore_visual_context(one)


@contextlib.contextmanager
def unpatched(model: nn.Module) -> Iterator[None]:
    """Suspend the patch of `model`, if it has one, inside the block."""
    base = unwrap(model)
    with CallGate.of(base).change():
        handle = handle_of(base)
        if handle is not None:
            handle.suspend()
    if handle is None:
        yield
        return
    try:
        yield
    finally:
        if handle.suspended:
            handle.resume()
