"""Reducers by name: built-in ones, those of plugins, and those of user code.

A package offers reducers by the entry-point group `tokencomp.reducers`. An entry point names a
`Reducer` subclass, or a module that registers its classes on import.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import threading
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any, TypeVar, cast

from tokencomp.errors import (
    OptionError,
    PluginWarning,
    UnknownOptionError,
    check_free,
    hint,
    unknown_name,
)
from tokencomp.plan.options import OPTIONS
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.compose import Compose, composed_options

PACKAGE = "tokencomp.reducers"
GROUP = "tokencomp.reducers"

ARGUMENTS = (  # of `patch`
    "ratio", "budget", "speedup", "reducer", "plan", "tower_ratio", "tower_reducer", "strict",
    "positions", "extend_context", "verify", *OPTIONS,
)  # fmt: skip
R = TypeVar("R", bound=type[Reducer])
_REGISTRY: dict[str, type[Reducer]] = {}
_built_in_loaded = _plugins_loaded = False
_loading = threading.local()  # in this thread: plugins may use the registry while they load


def register_reducer(name: str, *, override: bool = False) -> Callable[[R], R]:
    """Class decorator that makes a reducer available by name.

    Parameters
    ----------
    override
        Replace the reducer that has this name.

    Raises
    ------
    NameTakenError
        Another class has the name, and `override` is False. The same class may register again:
        modules are reloaded, and notebook cells run twice.
    OptionError
        No name, or one with other characters than letters, digits, "_", "-" and "."; a class that
        is no `Reducer`, or whose options are no fields because it is no dataclass.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise OptionError(
            f'register_reducer({name!r}): write @register_reducer("name") above the class, with a '
            'name of letters, digits, "_", "-" and "."; "+" composes two reducers.'
        )

    def decorate(cls: R) -> R:
        _check_class(cls)
        if not cls.__module__.startswith(f"{PACKAGE}."):
            _load_built_in()  # a clash with a built-in name is an error now, not later
        old = _REGISTRY.get(name)
        if old is not None and not override:
            check_free("reducer", name, old, cls)
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


def _check_class(cls: type) -> None:
    """Raise `OptionError` for a class that is no reducer, or has annotations that are no fields."""
    if not (isinstance(cls, type) and issubclass(cls, Reducer)):
        raise OptionError(f"register_reducer: {cls!r} does not derive from tokencomp.Reducer.")
    named = inspect.get_annotations(cls)
    options = [name for name, hint in named.items() if "ClassVar" not in str(hint)]
    if options and "__dataclass_fields__" not in vars(cls):
        raise OptionError(
            f"register_reducer: {cls.__name__} has the options {', '.join(options)} and is no "
            "dataclass. Write @dataclass(frozen=True) between @register_reducer(...) and the class."
        )


def _load_built_in() -> None:
    global _built_in_loaded
    if not _built_in_loaded:
        package = importlib.import_module(PACKAGE)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{PACKAGE}.{module.name}")
        _built_in_loaded = True  # set last: other threads must not use a half-filled registry


def _load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded or getattr(_loading, "active", False):
        return
    _loading.active = True
    try:
        for entry_point in metadata.entry_points(group=GROUP):
            _load_plugin(entry_point)
    finally:
        _loading.active = False
    _plugins_loaded = True  # set last, for the same reason


def _load_plugin(entry_point: metadata.EntryPoint) -> None:
    try:
        plugin = entry_point.load()
        is_reducer = isinstance(plugin, type) and issubclass(plugin, Reducer)
        if is_reducer and plugin not in _REGISTRY.values():
            register_reducer(entry_point.name)(plugin)
    except Exception as error:  # a broken plugin must not disable the other reducers
        package = entry_point.dist.name if entry_point.dist else "an unknown package"
        warnings.warn(
            f"plugin {entry_point.name!r} ({entry_point.value}, from {package}) of the entry-point "
            f"group {GROUP!r} was not loaded: {type(error).__name__}: {error}. Update or uninstall "
            f"{package}; all other reducers are available.",
            PluginWarning,
            stacklevel=2,
        )


def available_reducers() -> dict[str, type[Reducer]]:
    """All registered reducers by name."""
    _load_built_in()
    _load_plugins()
    return dict(sorted(_REGISTRY.items()))


def make_reducer(name: str | Reducer, /, **options: Any) -> Reducer:
    """Build a reducer from its registry name and options; "bipartite+prune" composes two.

    Raises
    ------
    UnknownNameError
        No reducer has that name; similar names are listed.
    OptionError
        An option that the reducer does not have, or a value that it refuses.
    """
    if isinstance(name, Reducer):
        if options:
            raise OptionError(
                f"options {sorted(options)} with a reducer object ({name.name!r}). Set them when "
                "you build the object."
            )
        return name
    if isinstance(name, str) and "+" in name.rstrip("+"):  # PruMerge+ is the name of one method
        return _compose(name, options)
    cls = _class_of(name)
    allowed = _option_names(cls)
    if wrong := sorted(set(options) - set(allowed)):
        raise UnknownOptionError(
            f"reducer {name!r} has no option {', '.join(map(repr, wrong))}."
            f"{hint(wrong[0], [*allowed, *ARGUMENTS])} Its options: {', '.join(allowed) or 'none'}."
        )
    try:
        return cls(**options)
    except (TypeError, OverflowError) as error:  # a required option, or one that is no number
        raise OptionError(f"reducer {name!r}, options {options}: {error}.") from None


def options_of(reducer: Reducer) -> dict[str, Any]:
    """The options with which `make_reducer` builds this reducer again, as JSON values.

    Fields that are excluded from comparison hold what `Reducer.bind` found, and are no options.
    """
    if isinstance(reducer, Compose):
        parts = {
            f"{part.name}.{key}": value
            for part in (reducer.entry, reducer.layer)
            for key, value in options_of(part).items()
        }
        return {"share": reducer.share, **parts}
    fields = dataclasses.fields(cast(Any, reducer))
    return {field.name: getattr(reducer, field.name) for field in fields if field.compare}


def _class_of(name: str) -> type[Reducer]:
    registry = available_reducers()
    if not isinstance(name, str) or name not in registry:
        raise unknown_name("reducer", str(name), registry)
    return registry[name]


def _option_names(cls: type[Reducer]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _compose(name: str, options: dict[str, Any]) -> Compose:
    """Build "first+second"; see `composed_options` for how options are named."""
    parts = [part.strip() for part in name.split("+")]
    if len(parts) != 2 or parts[0] == parts[1]:
        raise OptionError(
            f"reducer {name!r}: a composition has two different parts, an entry reducer and a "
            'layer reducer, e.g. "bipartite+prune".'
        )
    share = options.pop("share", 0.5)
    fields = {part: _option_names(_class_of(part)) for part in parts}
    by_part = composed_options(name, options, fields)
    entry, layer = (make_reducer(part, **by_part[part]) for part in parts)
    return Compose(entry, layer, share)
