"""What the options that name methods mean: --reducer, --ratio, --set, --plan and their like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from tokencomp.cli import _options as opt

Settings = Callable[[Any], list[Any]]


def reducers(text: str) -> list[str]:
    """ "auto,merge+prune" → ["condiv", "merge+prune"]: "auto" as the reducer it stands for.

    Raises
    ------
    UnknownNameError, OptionError
        A name that is not known; two reducers that do not go together.
    """
    from tokencomp.errors import unknown_name
    from tokencomp.evaluation.settings import INPUT_BASELINES
    from tokencomp.patching import DEFAULT_REDUCER
    from tokencomp.reducers.registry import available_reducers, make_reducer

    chosen, known = opt.names(text), {"auto", *INPUT_BASELINES, *available_reducers()}
    for name in chosen:
        if "+" in name:
            make_reducer(name)
        elif name not in known:
            raise unknown_name("reducer", name, known)
    return list(dict.fromkeys(DEFAULT_REDUCER if name == "auto" else name for name in chosen))


def method(
    context: typer.Context,
    reducer: str,
    ratio: str,
    options: Sequence[str] | None,
    plan: Path | None,
    proportional: bool,
) -> Settings:
    """Settings for a model that is loaded later: a plan's ratio depends on its decoder.

    All that can be refused without a model is refused here.

    Parameters
    ----------
    context
        Of a command whose parameters have these names.
    reducer, ratio, options, plan, proportional
        The values of --reducer, --ratio, --set, --plan and --proportional-attention.

    Returns
    -------
    callable
        Model → the full model, then each reducer at each ratio, or the plan.
    """
    from tokencomp.evaluation.settings import PROPORTIONAL, grid, planned
    from tokencomp.plan_json import as_plan

    more = {PROPORTIONAL: True} if proportional else {}
    if plan is None:
        every = {**opt.reducer_options(options), **more}
        found = grid(reducers(reducer), opt.ratios(ratio), **every)
        return lambda model: tried(found, model)
    fix = "the stages in the file have reducers, fractions and options of their own"
    opt.refuse_given(context, ("reducer", "ratio", "options"), "--plan", fix)
    made = as_plan(plan)
    return lambda model: tried(planned(made, model, **more), model)


def tried(settings: list[Any], model: Any) -> list[Any]:
    """The settings, once `model` has taken each: missing weights are told before any work."""
    import tokencomp

    for setting in settings:
        if setting.compresses:
            tokencomp.patch(model, **setting.request).remove()
    return settings
