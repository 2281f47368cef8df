"""From options such as --reducer, --ratio, --tower-ratio, --set and --plan to settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli import _parse as parse

Settings = Callable[[Any], list[Any]]
ALL = "all"


def reducers(text: str) -> list[str]:
    """ "auto,merge+prune" → ["auto", "merge+prune"]."""
    from tokencomp.errors import unknown_name
    from tokencomp.evaluation.settings import INPUT_BASELINES
    from tokencomp.reducers.registry import available_reducers, make_reducer

    names, known = parse.names(text), {"auto", *INPUT_BASELINES, *available_reducers()}
    for name in names:
        if "+" in name:
            make_reducer(name)
        elif name not in known:
            raise unknown_name("reducer", name, known)
    return list(dict.fromkeys(names))


def settings(context: typer.Context, chosen: opt.MethodOptions) -> Settings:
    """Settings for a model that is loaded later: the ratio of a plan depends on the decoder.

    Mistakes that can be found without a model are reported at once. The result takes a model and
    returns the full model, then each reducer at each ratio, or the plan.
    """
    from tokencomp.evaluation.settings import grid, planned
    from tokencomp.reducers.plan_json import as_plan

    if chosen.plan is None:
        if not chosen.stages.get("tower_ratio"):
            fix = "give the share to remove there, e.g. --tower-ratio auto"
            opt.refuse_options(context, ("tower_reducer",), "--tower-ratio 0", fix)
        every = {**parse.reducer_options(chosen.options), **chosen.stages}
        if chosen.budget is not None:
            opt.refuse_options(context, ("ratio",), "--budget", "leave one out")
            every["budgets"] = parse.budgets(chosen.budget)
        ratios = parse.ratios(chosen.ratio) if chosen.budget is None else []
        if ALL in parse.names(chosen.reducer):
            fix = "name the reducer that has the option"
            opt.refuse_options(context, ("options",), f"--reducer {ALL}", fix)
            return lambda model: fitting(chosen.reducer, ratios, every, model)
        found = grid(reducers(chosen.reducer), ratios, **every)
        return lambda model: checked(found, model)
    fix = "the stages in the file have reducers, fractions and options of their own"
    names = ("reducer", "ratio", "budget", "options", "rest", "tower_ratio", "tower_reducer")
    opt.refuse_options(context, names, "--plan", fix)
    stages = as_plan(chosen.plan)
    return lambda model: checked(planned(stages, model), model)


def fitting(text: str, ratios: list[Any], every: dict[str, Any], model: Any) -> list[Any]:
    """The full model, and of all reducers those that `model` accepts; says what is left out."""
    from tokencomp.errors import OptionError, TokenCompError
    from tokencomp.evaluation.environment import process_rank
    from tokencomp.evaluation.settings import grid
    from tokencomp.reducers.registry import available_reducers

    named, found = [name for name in parse.names(text) if name != ALL], list[Any]()
    for name in reducers(",".join([*named, "auto", *available_reducers()])):
        try:
            found += checked(grid([name], ratios, **every), model)
        except TokenCompError as error:
            if name in named:
                raise
            if process_rank()[0] == 0:
                typer.echo(f"left out: {name}, because {error}", err=True)
    if not found:
        raise OptionError(f"--reducer {text}: no reducer fits this model and these options.")
    return list(dict.fromkeys(found))


def checked(settings: list[Any], model: Any) -> list[Any]:
    """Check that `model` accepts every setting, so that missing weights are reported early."""
    from tokencomp.patching import check

    for setting in settings:
        if setting.active:
            check(model, setting)
    return settings
