"""Installed means harmless: without an option of tokencomp, vLLM builds its own objects."""

from __future__ import annotations

from dataclasses import make_dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import vllm
from torch import nn
from vllm.model_executor.models.registry import _ModelInfo

from tokencomp.errors import OptionError, UnsupportedModelError
from tokencomp.serving.vllm import MODELS, STOCK, entry, register

ARCHITECTURE = "Qwen2VLForConditionalGeneration"


class StockProcessor:
    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        self.info = info

    def apply(self, inputs: Any, timing_ctx: Any = None) -> str:
        return "stock"


Factories = make_dataclass("Factories", ["info", "processor", "dummy_inputs"], frozen=True)


class StockModel(nn.Module):
    _processor_factory = Factories(None, StockProcessor, None)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix


def config(overrides: Any = None, kwargs: Any = None, **more: Any) -> Any:
    """Return the part of a VllmConfig from which options are read."""
    hf = SimpleNamespace() if overrides is None else SimpleNamespace(tokencomp=overrides)
    multimodal = SimpleNamespace(mm_processor_kwargs=kwargs)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf, multimodal_config=multimodal), **more
    )


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> type:
    """The plugin's class for a small stand-in of vLLM's model."""
    monkeypatch.delenv("TOKENCOMP_SERVING", raising=False)
    monkeypatch.setitem(STOCK, ARCHITECTURE, SimpleNamespace(load_model_cls=lambda: StockModel))
    entry.compressing.cache_clear()
    yield entry.dispatching(ARCHITECTURE)
    entry.compressing.cache_clear()


@pytest.mark.parametrize("version", ["0.32.0", "0.11.2", "9.9.9"])
def test_without_options_everything_is_stock(
    dispatched: Any, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    # Settings that cannot be compressed under are no reason to refuse either.
    settings = config(parallel_config=SimpleNamespace(pipeline_parallel_size=8))
    model = dispatched(vllm_config=settings, prefix="x")
    assert type(model) is StockModel and model.prefix == "x"
    info = SimpleNamespace(ctx=settings)
    processor = dispatched._processor_factory.processor(info, None)
    assert isinstance(processor, StockProcessor) and processor.info is info
    inputs = SimpleNamespace(hf_processor_mm_kwargs={"max_pixels": 4})
    assert processor.apply(inputs, None) == processor.apply(inputs=inputs) == "stock"


def test_a_request_with_options_is_not_served_uncompressed(dispatched: Any) -> None:
    processor = dispatched._processor_factory.processor(SimpleNamespace(ctx=config()), None)
    inputs = SimpleNamespace(hf_processor_mm_kwargs={"tokencomp": {"ratio": 0.5}})
    for call in (lambda: processor.apply(inputs, None), lambda: processor.apply(inputs=inputs)):
        with pytest.raises(OptionError, match="hf-overrides"):
            call()


OPTIONS = [
    {"overrides": {}}, {"overrides": {"ratio": 0.5}}, {"kwargs": {"tokencomp": {"ratio": 0.5}}},
]  # fmt: skip


@pytest.mark.parametrize("options", [*OPTIONS, None])
def test_with_options_an_untested_version_is_refused(
    dispatched: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", "9.9.9")
    monkeypatch.delenv("TOKENCOMP_ALLOW_UNTESTED", raising=False)
    if options is None:
        monkeypatch.setenv("TOKENCOMP_SERVING", '{"ratio": 0.5}')
    settings = config(**(options or {}))
    with pytest.raises(UnsupportedModelError, match=r"9\.9\.9.*TOKENCOMP_ALLOW_UNTESTED"):
        dispatched(vllm_config=settings)
    with pytest.raises(UnsupportedModelError, match=r"9\.9\.9"):
        dispatched._processor_factory.processor(SimpleNamespace(ctx=settings), None)


def test_a_conversion_of_the_model_stays_stock_or_is_refused(dispatched: Any) -> None:
    class Embedding(dispatched):
        """What vLLM makes of a model for `--convert embed`."""

    assert type(Embedding(vllm_config=config(), prefix="")) is Embedding
    with pytest.raises(UnsupportedModelError, match="Embedding"):
        Embedding(vllm_config=config(overrides={}))


def test_another_layout_of_processors_stays_stock(
    dispatched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(StockModel, "_processor_factory")
    assert type(entry.dispatching(ARCHITECTURE)(vllm_config=config())) is StockModel


def test_vllm_sees_the_same_abilities_as_of_its_own_class() -> None:
    register()
    before = dict(STOCK)
    register()  # vLLM loads plugins several times in one process
    assert before == STOCK and set(STOCK) == set(MODELS)
    for architecture, stock in STOCK.items():
        registered = vllm.ModelRegistry.models[architecture]
        assert vllm.__version__ in registered.class_name
        ours, own = registered.load_model_cls(), stock.load_model_cls()
        assert ours is not own
        assert _ModelInfo.from_model_cls(ours) == _ModelInfo.from_model_cls(own)


def renamed(stock: type) -> type:
    """A class of vLLM in whose release a method has another name."""
    return type(stock.__name__, (stock,), {"_get_mm_hashes": None, "embed_multimodal": None})


def reordered(stock: type) -> type:
    """A class of vLLM in whose release methods have other parameters."""

    def other(self: Any, everything: Any) -> Any: ...

    return type(stock.__name__, (stock,), {"_get_mm_hashes": other, "embed_input_ids": other})


@pytest.mark.parametrize("change", [renamed, reordered])
@pytest.mark.parametrize("kind", ["Model", "Processor"])
def test_a_release_with_other_methods_is_refused(
    change: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a release would never call ours, and would answer with all image tokens."""
    register()
    stock = STOCK[ARCHITECTURE].load_model_cls()
    factory = stock._processor_factory
    members = {"_processor_factory": replace(factory, processor=change(factory.processor))}
    model = type(stock.__name__, (change(stock),), members)
    monkeypatch.setitem(STOCK, ARCHITECTURE, SimpleNamespace(load_model_cls=lambda: model))
    entry.compressing.cache_clear()
    with pytest.raises(UnsupportedModelError, match=r"_get_mm_hashes|embed_multimodal|embed_input"):
        entry.compressing(ARCHITECTURE, kind)
    entry.compressing.cache_clear()
