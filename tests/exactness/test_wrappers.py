"""Models that others have changed: adapters, accelerate, derived attention, and tracers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import CORE, FAMILIES, Family, text
from support.prompts import prompt
from torch import Tensor, nn

import tokencomp
from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib.compat import attention_function

FAMILY_NAMES = CORE


# -- adapters --------------------------------------------------------------------------------------


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["both", "attention"])
def test_peft(family: Family, name: str) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = family.build(), prompt(family)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    plan = plans.make(name, family.layers)
    _, out, masks = oracle.generated(wrapped, family, inputs, 4, plan=plan)
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5


@pytest.mark.parametrize("reducer", ["prune", "bipartite+prune"])
def test_a_lora_added_behind_the_first_prompt(reducer: str) -> None:
    """Scores are those of a model that had its LoRA before it was patched."""
    peft = pytest.importorskip("peft")
    family = FAMILIES["qwen2_vl"]
    rows = [[text(3), family.image(0), text(6, 3)], [text(2), family.image(1), text(9, 4)]]
    inputs = family.batch(rows)

    def run(first: bool) -> tuple[list, torch.Tensor]:
        model = family.build()
        if first:
            handle = tokencomp.patch(model, 0.5, reducer=reducer)
            model(**inputs)
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config).eval()
        if not first:
            handle = tokencomp.patch(wrapped, 0.5, reducer=reducer)
        with torch.no_grad():
            logits = wrapped(**inputs).logits
        return [handle.stats.kept(b) for b in range(2)], logits

    (kept, logits), (expected, own) = run(True), run(False)
    assert kept == expected
    assert torch.equal(logits, own)


@pytest.mark.parametrize("reducer", ["fastv", "condiv", "dart"])
@torch.no_grad()
def test_a_sample_has_the_scores_of_its_own_adapter(reducer: str) -> None:
    """Those of a batch in which it is alone."""
    peft = pytest.importorskip("peft")
    family = FAMILIES["qwen2_vl"]
    config = peft.LoraConfig(
        target_modules=r".*language_model.*(q_proj|k_proj|v_proj)", init_lora_weights=False
    )
    model: Any = peft.get_peft_model(family.build(), config)
    model.add_adapter("other", config)
    model.eval()
    prompt = [text(3), family.image(0), text(6, 3)]
    batch = family.batch([[text(9, 4)], prompt, prompt, [text(5)]])
    names = ["other", "default", "other", "default"]
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
        logits = model(**batch, adapter_names=names).logits
        kept = [handle.stats.kept(b) for b in range(4)]
        for b in (1, 2):
            alone = model(**family.batch([prompt]), adapter_names=[names[b]]).logits
            assert handle.stats.kept(0) == kept[b]
            found = logits[b, -alone.shape[1] :]
            torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=1e-5)
    assert kept[1] != kept[2]


# -- accelerate ------------------------------------------------------------------------------------


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["both", "attention"])
def test_accelerate_cpu_offload(family: Family, name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    inputs = prompt(family)
    with tokencomp.patch(resident := family.build(), plan=plans.make(name, family.layers)):
        expected = oracle.generate(resident, inputs)
    model = family.build()
    accelerate.cpu_offload(family.decoder(model), torch.device("cpu"))
    assert next(family.decoder(model).layers[1].parameters()).device.type == "meta"
    with tokencomp.patch(model, plan=plans.make(name, family.layers)):
        out = oracle.generate(model, inputs)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("first", ["patch", "prepare"])
def test_accelerate_mixed_precision(first: str, accelerator: Any) -> None:
    """`Accelerator.prepare` replaces `forward`; the patch goes on below or on top of it."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), prompt(family)
    if first == "patch":
        tokencomp.patch(model, 0.5)
    prepared = accelerator.prepare_model(model)
    handle = tokencomp.patch(prepared, 0.5)  # once more, if it was patched
    prepared(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert handle.stats.ratio == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("first", ["patch", "between", "unpatch"])
@torch.no_grad()
def test_accelerate_unwraps_mixed_precision(first: str, accelerator: Any) -> None:
    """`unwrap_model(keep_fp32_wrapper=False)` binds what it finds inside of its wrappers."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), prompt(family)
    plain = model(**inputs).logits
    with tokencomp.patch(model, 0.5):
        expected = model(**inputs).logits
    if first != "between":
        tokencomp.patch(model, 0.5)
    accelerator.prepare_model(model)
    if first == "between":
        tokencomp.patch(model, 0.5)
    if first == "unpatch":
        tokencomp.unpatch(model)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if first == "unpatch":
        assert torch.equal(model(**inputs).logits, plain)
        tokencomp.patch(model, 0.5)
    for _ in range(2):
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model.forward(**inputs).logits, expected)
        tokencomp.patch(model, 0.5)  # once more
    tokencomp.unpatch(model)
    assert torch.equal(model.forward(**inputs).logits, plain)


# -- attention -------------------------------------------------------------------------------------


def derived(layer: Any) -> None:
    base = type(layer.self_attn)

    class Derived(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    layer.self_attn.__class__ = Derived


@pytest.mark.parametrize(
    ("backend", "reducer"), [("sdpa", "auto"), ("eager", "auto"), ("eager", "fastv")]
)
@torch.no_grad()
def test_logits_of_a_derived_attention_are_those_of_its_base(backend: str, reducer: str) -> None:
    """`auto` hands attention the weights of merged tokens; the others read queries and keys."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(backend), family.batch([[text(3), family.image(), text(6, 3)]])
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
        expected, kept = model(**inputs).logits, handle.stats.kept(0)
    for layer in family.decoder(model).layers:
        derived(layer)
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
        found = model(**inputs).logits
        assert handle.stats.kept(0) == kept
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_attention_that_names_no_backend_is_refused() -> None:
    """Neither the module of its class nor those of its bases have a list of backends."""
    with pytest.raises(UnsupportedModelError, match="the module of MultiheadAttention"):
        attention_function(nn.MultiheadAttention(8, 2), None)


# -- tracers ---------------------------------------------------------------------------------------


NAMES = ("input_ids", "attention_mask", "pixel_values")


class Logits(nn.Module):
    """A model with arguments by position, as `torch.jit.trace` wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *values: Tensor) -> Tensor:
        inputs = dict(zip(NAMES, values, strict=True))
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits


def exported(model: nn.Module, inputs: dict[str, Any]) -> None:
    torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)


def traced(model: nn.Module, inputs: dict[str, Any]) -> None:
    torch.jit.trace(Logits(model), tuple(inputs[name] for name in NAMES), check_trace=False)


def differentiated(model: nn.Module, inputs: dict[str, Any]) -> None:
    def loss(weights: dict[str, Tensor]) -> Tensor:
        call = {**inputs, "use_cache": False}
        logits: Tensor = torch.func.functional_call(model, weights, (), call).logits
        return logits.sum()

    torch.func.grad(loss)(dict(model.named_parameters()))


@pytest.mark.parametrize("trace", [exported, traced, differentiated])
def test_prompts_with_media_are_refused(trace: Callable[..., None]) -> None:
    family = FAMILIES["llava"]
    model, inputs = family.build(), family.batch([[text(3), family.image(0), text(6, 3)]])
    with torch.set_grad_enabled(trace is differentiated):
        with tokencomp.patch(model, 0.5), pytest.raises(UnsupportedModelError, match="was traced"):
            trace(model, inputs)
        trace(model, inputs)
