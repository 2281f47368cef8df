"""Settings from options such as --reducer, --ratio, --tower-ratio and --plan."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli import _parse as parse
from tokencomp.plan.options import OPTIONS, one_amount

Settings = Callable[[Any], list[Any]]
ALL = "all"


def settings(context: typer.Context, chosen: opt.MethodOptions) -> Settings:
    """Settings for a model that is loaded later: the ratio of a plan depends on the decoder.

    Errors that need no model are raised at once. Returns a function of the model.
    """
    from tokencomp.evaluation.settings import grid, planned
    from tokencomp.reducers.plan_json import as_plan

    if chosen.plan is None:
        if not chosen.stages.get("tower_ratio") and chosen.speedup is None:
            fix = "give the share to remove there, e.g. --tower-ratio auto"
            opt.refuse_options(context, ("tower_reducer",), "--tower-ratio 0", fix)
        every = chosen.stages
        if chosen.budget is not None:
            every["budgets"] = parse.budgets(chosen.budget)
            if opt.given(context, ("ratio",)):
                one_amount(parse.ratios(chosen.ratio)[0], every["budgets"][0])
        if chosen.speedup is not None:
            fix = "a speedup sets how much the vision tower and the decoder drop"
            opt.refuse_options(context, ("ratio", "budget", "tower_ratio"), "--speedup", fix)
            every["speedups"] = parse.speedups(chosen.speedup)
        ratios = [] if "budgets" in every or "speedups" in every else parse.ratios(chosen.ratio)
        methods = parse.methods(chosen.reducer)
        if (ALL, {}) in methods:
            return lambda model: fitting(methods, ratios, every, model)
        found = [grid([name], ratios, **{**every, **own}) for name, own in methods]
        settings = list(dict.fromkeys(itertools.chain(*found)))
        return lambda model: checked(settings, model)
    fix = "the stages in the file have reducers, fractions and options of their own"
    names = ("reducer", "ratio", "budget", "speedup", *OPTIONS, "tower_ratio", "tower_reducer")
    opt.refuse_options(context, names, "--plan", fix)
    stages = as_plan(chosen.plan)
    return lambda model: checked(planned(stages, model), model)


def fitting(
    methods: list[tuple[str, dict[str, Any]]], ratios: list[Any], every: dict[str, Any], model: Any
) -> list[Any]:
    """The full model, and all reducers that `model` accepts; prints which are skipped."""
    from tokencomp.errors import OptionError, TokenCompError
    from tokencomp.evaluation.environment import process_rank
    from tokencomp.evaluation.settings import grid
    from tokencomp.reducers.registry import available_reducers

    named, found = [method for method in methods if method[0] != ALL], list[Any]()
    for name, own in [*named, *((name, {}) for name in ("auto", *available_reducers()))]:
        try:
            found += checked(grid([name], ratios, **{**every, **own}), model)
        except TokenCompError as error:
            if (name, own) in named:
                raise
            if process_rank()[0] == 0:
                typer.echo(f"left out: {name}, because {error}", err=True)
    if not found:
        raise OptionError(f"--reducer {ALL}: no reducer fits this model and these options.")
    return list(dict.fromkeys(found))


def checked(settings: list[Any], model: Any) -> list[Any]:
    """Check that `model` accepts every setting, so that missing weights are found early."""
    from tokencomp.patching import check

    for setting in settings:
        if setting.active:
            check(model, setting)
    return settings
