"""Names of reducers and adapters: taken names, reloads, and plugins."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILIES
from support.matrix import row

import tokencomp
from tokencomp.adapters.base import Adapter
from tokencomp.adapters.registry import available_models, register_adapter
from tokencomp.errors import NameTakenError, OptionError, PluginWarning
from tokencomp.plan.options import Traits
from tokencomp.reducers import ScoreReducer, registry
from tokencomp.reducers.bipartite import Bipartite
from tokencomp.reducers.uniform import Uniform
from tokencomp.serving.servable import serving_safe
from tokencomp.tokens.tokens import Tokens


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registries as they were, after every test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry.available_reducers()))
    base = importlib.import_module("tokencomp.adapters.registry")
    monkeypatch.setattr(base, "_REGISTRY", dict(available_models()))


@dataclasses.dataclass(frozen=True)
class UserReducer(Uniform):
    pass


class SpanBySpan(ScoreReducer):
    """It could remember items, or read a clock: nobody but its author knows."""

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.features[:, 0]


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(
        NameTakenError, match=r"reducer 'bipartite'.*bipartite\.Bipartite.*override=True"
    ):
        tokencomp.register_reducer("bipartite")(UserReducer)
    assert tokencomp.available_reducers()["bipartite"] is Bipartite
    assert UserReducer.name == "uniform"


def test_an_unknown_option_lists_what_patch_takes() -> None:
    with pytest.raises(OptionError) as error:
        tokencomp.patch(FAMILIES["qwen2_vl"].build(), strength=1)
    arguments = {*inspect.signature(tokencomp.patch).parameters} - {"model", "options"}
    assert arguments <= {
        *str(error.value).rstrip(".").replace(":", ",").replace(";", ",").split(", ")
    }


@dataclasses.dataclass(frozen=True)
class Decorated(Uniform):
    power: float = 1.0


class Undecorated(Uniform):
    power: float = 1.0


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        (Decorated, None, r'write @register_reducer\("name"\)'),  # @register_reducer alone
        ("my method+", Decorated, '"\\+" composes'),
        ("a+b", Decorated, '"\\+" composes'),
        ("mine", Undecorated, "Undecorated has the options power and is no dataclass"),
        ("mine", dict, "does not derive from tokencomp.Reducer"),
    ],
)
def test_what_cannot_be_registered_is_refused(name: Any, cls: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tokencomp.register_reducer(name)(cls)
    tokencomp.register_reducer("mine-2.0")(Decorated)
    assert tokencomp.make_reducer("mine-2.0", power=2.0) == Decorated(power=2.0)


def test_override_replaces_a_reducer() -> None:
    tokencomp.register_reducer("bipartite", override=True)(UserReducer)
    assert tokencomp.available_reducers()["bipartite"] is UserReducer
    assert isinstance(tokencomp.make_reducer("bipartite"), UserReducer)


def test_adapters_share_the_rule() -> None:
    class Other(Adapter):
        model_types = ("new_type", "qwen2_vl")

    with pytest.raises(NameTakenError, match=r"model type 'qwen2_vl'.*Qwen2VLAdapter"):
        register_adapter(Other)
    assert "new_type" not in available_models()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, entries: str, source: str) -> None:
    """A distribution "plugins" with these entry points and one module."""
    info = folder / "plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tokencomp.reducers]\n{entries}\n")
    (folder / "plugin_reducers.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    monkeypatch.delitem(sys.modules, "plugin_reducers", raising=False)


def test_plugins_register_by_class_or_by_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
import dataclasses, tokencomp
from tokencomp.reducers.uniform import Uniform
class First(Uniform): pass
@tokencomp.register_reducer("second")
class Second(Uniform): pass
assert "bipartite" in tokencomp.available_reducers()  # plugins may use the registry
"""
    install(tmp_path, monkeypatch, "first = plugin_reducers:First\nall = plugin_reducers", source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = tokencomp.available_reducers()
    assert names["first"].__name__ == "First" and names["second"].__name__ == "Second"
    assert "all" not in names and tokencomp.make_reducer("first").name == "first"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("bad = plugin_reducers:Missing", "AttributeError"),
        ("bad = no_such_module", "ModuleNotFoundError"),
        ("bipartite = plugin_reducers:Good", "NameTakenError"),
    ],
)
def test_a_broken_plugin_is_named_and_the_rest_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, reason: str
) -> None:
    source = "from tokencomp.reducers.uniform import Uniform\nclass Good(Uniform): pass\n"
    install(tmp_path, monkeypatch, f"{entry}\ngood = plugin_reducers:Good", source)
    name = entry.split()[0]
    with pytest.warns(PluginWarning, match=rf"plugin '{name}'.*plugins.*{reason}"):
        names = tokencomp.available_reducers()
    assert names["good"].__name__ == "Good" and names["bipartite"] is Bipartite
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokencomp.available_reducers()


def test_what_servers_can_run_is_computed() -> None:
    """Signals, later stages and counts of its own exclude it; others' need their author's word."""
    safe = {n for n, cls in tokencomp.available_reducers().items() if serving_safe(cls())}
    assert safe == {name for name in tokencomp.available_reducers() if row(name).served}
    others, members = (SpanBySpan, UserReducer), {"traits": Traits(per_item=True)}
    said = [type("Said", (kind,), members) for kind in others]
    assert [serving_safe(kind()) for kind in (*others, *said)] == [0, 0, 1, 1]
    assert serving_safe(tokencomp.make_reducer("condiv", power=0.0))
    assert not serving_safe(tokencomp.make_reducer("bipartite+adsc"))
    assert serving_safe(tokencomp.make_reducer("selector", input="features"))
    assert not serving_safe(tokencomp.make_reducer("selector", input="attention"))
