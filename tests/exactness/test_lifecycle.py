"""Patching and unpatching leave no trace; wrappers, dtypes, threads."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
import torch
from support import oracle, plans
from support.families import FAMILIES, Family, text
from support.hooks import hooks_of, prompt
from transformers.cache_utils import DynamicLayer

import tokencomp
from tokencomp.engine import scores as engine_scores
from tokencomp.errors import AlreadyCompressedError, CopyError


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", plans.NAMES)
def test_unpatch_restores_everything(family: Family, name: str) -> None:
    model, inputs = family.build(), prompt(family)
    model(**inputs)  # some modules note things at their first call
    before, state = hooks_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    with torch.no_grad():
        expected = model(**inputs).logits
        handle = tokencomp.patch(model, plan=plans.make(name, family.layers))
        assert not torch.equal(model(**inputs).logits, expected)
        assert model.state_dict().keys() == state.keys()
        assert model.config.to_dict() == config
        handle.remove()
        handle.remove()
        assert hooks_of(model) == before
        out = model(**inputs, use_cache=True)
    assert torch.equal(out.logits, expected)
    assert all(type(layer) is DynamicLayer for layer in oracle.cache_of(out).layers)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_patch_twice_is_patch_once(family: Family) -> None:
    model, inputs = family.build(), prompt(family)
    model(**inputs)
    clean = hooks_of(model)
    first = tokencomp.patch(model, 0.9, reducer="random")
    tokencomp.unpatch(model)
    tokencomp.patch(model, 0.5, reducer="uniform")
    once, logits = hooks_of(model), model(**inputs).logits
    tokencomp.patch(model, 0.9, reducer="random")
    tokencomp.patch(model, 0.5, reducer="uniform")
    assert hooks_of(model) == once
    assert torch.equal(model(**inputs).logits, logits)
    first.remove()  # a handle that was replaced must not undo its successor
    assert torch.equal(model(**inputs).logits, logits)
    tokencomp.unpatch(model)
    tokencomp.unpatch(model)
    assert hooks_of(model) == clean


def test_context_manager_disabled_and_set(family: Family) -> None:
    model, inputs = family.build(), prompt(family)
    plain = model(**inputs).logits
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        half = model(**inputs).logits
        assert handle.stats.ratio == pytest.approx(0.5, abs=0.05)
        with handle.disabled():
            assert torch.equal(model(**inputs).logits, plain)
        with pytest.raises(ZeroDivisionError), handle.disabled():
            1 / 0  # noqa: B018
        assert torch.equal(model(**inputs).logits, half)
        handle.set(ratio=0.8)
        model(**inputs)
        assert handle.stats.ratio > 0.7
        handle.set(ratio=0.5, reducer="prune", score="last_query")
        model(**inputs)
        assert handle.plan.layer_stages
        handle.set(reducer="uniform")
        assert torch.equal(model(**inputs).logits, half)
    assert torch.equal(model(**inputs).logits, plain)
    with pytest.raises(tokencomp.TokenCompError, match="removed"):
        handle.set(ratio=0.1)


def test_stats_are_of_the_last_prompt(family: Family) -> None:
    """None at ratio 0, where nothing is done, and after a prompt that brings no media."""
    model, inputs = family.build(), prompt(family)
    plain = model(**inputs, use_cache=True)
    with tokencomp.patch(model, 0.0) as handle, torch.no_grad():
        out = model(**inputs, use_cache=True)
        assert torch.equal(out.logits, plain.logits) and not handle.stats
        handle.set(ratio=0.5)
        assert not handle.stats
        model.generate(**inputs, max_new_tokens=3)
        stats = handle.stats
        visual = [sum(span.visual for span in row) for row in stats.spans]
        assert stats.tokens_before == visual and min(visual) > 0
        assert stats.ratio == pytest.approx(0.5, abs=0.05)
        rows = int(inputs["attention_mask"].sum())
        layers = oracle.cache_of(out).layers
        one = sum(t[0, :, 0].numel() * t.element_size() for x in layers for t in (x.keys, x.values))
        assert stats.kv_bytes_before == rows * one
        handle.set(ratio=0.0)
        assert not handle.stats
        handle.set(ratio=0.5)
        model.generate(**family.batch([[text(5)]]), max_new_tokens=3)
        assert not handle.stats


def test_new_plan_between_turns(family: Family) -> None:
    """A cache made by a staged plan stays right under a plan without layer stages."""
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(5, 3)], [family.image(1), text(4, 9)]])
    extra = torch.tensor([text(3, 20), text(3, 21)])
    positions = family.positions(model, inputs)
    last = positions.max(0).values.max(-1).values if positions.ndim == 3 else positions[:, -1]
    more = last[:, None] + torch.arange(1, 4)
    with tokencomp.patch(model, plan=plans.make("vanish", family.layers)) as handle:
        out = model(**inputs, position_ids=positions, use_cache=True)
        masks = oracle.kept_columns(handle, inputs, family.layers)
        handle.set(ratio=0.5, reducer="uniform")
        logits = model(
            input_ids=extra,
            attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(extra)], 1),
            position_ids=more.expand(3, -1, -1) if family.mrope else more,
            past_key_values=oracle.cache_of(out),
            use_cache=True,
        ).logits
    tokencomp.unpatch(model)
    expected = oracle.masked_logits(model, family, inputs, masks, extra)[:, -3:]
    assert (logits - expected).abs().max() < 1e-5


def test_save_pretrained(family: Family, tmp_path) -> None:
    model, inputs = family.build(), prompt(family)
    model.generation_config.do_sample = None
    expected = model(**inputs).logits
    with tokencomp.patch(model, 0.7, reducer="aim"):
        model.save_pretrained(tmp_path / "patched")
    model.save_pretrained(tmp_path / "plain")
    plain = tmp_path / "plain"
    for file in (f for f in plain.rglob("*") if f.is_file()):
        assert file.read_bytes() == (tmp_path / "patched" / file.relative_to(plain)).read_bytes()
    again = family.model_class().from_pretrained(tmp_path / "patched").eval()
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-6, rtol=0)


def test_two_models(family: Family) -> None:
    a, b, inputs = family.build(seed=1), family.build(seed=2), prompt(family)
    expected = []
    for model, ratio in ((a, 0.4), (b, 0.8)):
        with tokencomp.patch(model, ratio, reducer="uniform"):
            expected.append(oracle.generate(model, inputs).sequences)
    with tokencomp.patch(a, 0.4, reducer="uniform"), tokencomp.patch(b, 0.8, reducer="uniform"):
        assert torch.equal(oracle.generate(a, inputs).sequences, expected[0])
        assert torch.equal(oracle.generate(b, inputs).sequences, expected[1])
        assert torch.equal(oracle.generate(a, inputs).sequences, expected[0])


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["both", "attention"])
def test_two_threads(family: Family, name: str) -> None:
    """Forward passes of different prompts on one model, at the same time."""
    model = family.build()
    jobs = [
        family.batch([[text(3), family.image(0), text(6, 3)]]),
        family.batch([[text(2), family.video(6), text(9, 4)], [family.image(1), text(3)]]),
    ]
    places = [family.positions(model, job) for job in jobs]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(6):
                results[i].append(model(**jobs[i], position_ids=places[i]).logits)

    with tokencomp.patch(model, plan=plans.make(name, family.layers)), torch.no_grad():
        expected = [model(**j, position_ids=p).logits for j, p in zip(jobs, places, strict=True)]
        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for i in (0, 1):
        assert len(results[i]) == 6
        assert all((r - expected[i]).abs().max() < 1e-5 for r in results[i])


def test_error_in_a_call_leaves_no_state(family: Family) -> None:
    model, inputs = family.build(), prompt(family)
    with tokencomp.patch(model, 0.5, reducer="prune"):
        expected = oracle.generate(model, inputs).sequences

        def fail(*_):
            raise RuntimeError("out of memory, say")

        hook = family.decoder(model).layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="say"):
            model(**inputs)
        hook.remove()
        assert torch.equal(oracle.generate(model, inputs).sequences, expected)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["both", "attention", "pagerank"])
def test_bfloat16(family: Family, name: str) -> None:
    model = family.build().to(torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in prompt(family).items()}
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
        masks = oracle.kept_columns(handle, inputs, family.layers)
    expected = oracle.masked_logits(model, family, inputs, masks)[:, -1].float()
    # bf16 rounds at 2^-8 of the logit; both runs differ only in summation order
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["both", "attention"])
def test_peft(family: Family, name: str) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = family.build(), prompt(family)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    with tokencomp.patch(wrapped, plan=plans.make(name, family.layers)) as handle:
        out = wrapped.generate(
            **inputs, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
        )
        masks = oracle.kept_columns(handle, inputs, family.layers)
        assert wrapped(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    new = out.sequences[:, -4:-1]
    expected = oracle.masked_logits(model, family, inputs, masks, new)[:, -4:]
    assert (torch.stack(out.logits, 1) - expected).abs().max() < 1e-5


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


def test_a_patched_model_can_be_freed(family: Family) -> None:
    model = family.build()
    handle = tokencomp.patch(model, 0.5, reducer="aim", extend_context=True)
    model(**prompt(family))
    alive = weakref.ref(model)
    del model, handle
    gc.collect()
    assert alive() is None


def test_copies_of_a_patched_model_are_refused() -> None:
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), prompt(family)
    with tokencomp.patch(model, 0.5, reducer="aim") as handle, torch.no_grad():
        model(**inputs)  # from here on, layers have hooks as well
        for part in (model, family.decoder(model), family.decoder(model).layers[1]):
            with handle.disabled(), pytest.raises(CopyError, match=r"unpatch\(model\) first"):
                copy.deepcopy(part)
        with pytest.raises(CopyError, match="unpatch"):
            pickle.dumps(model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


@pytest.mark.long
@pytest.mark.parametrize("way", ["module", "forward"])
def test_torch_compile(way: str) -> None:
    """Hooks run between compiled graphs, whether the module or its forward was compiled."""
    family = FAMILIES["llava"]
    model, inputs = family.build(), family.batch([[text(3), family.image(0), text(5, 3)]])
    plan = plans.make("attention", family.layers)
    with torch.no_grad(), tokencomp.patch(model, plan=plan):
        expected = model(**inputs).logits
    compiled = model
    if way == "module":
        compiled = torch.compile(model, backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    with torch.no_grad(), tokencomp.patch(compiled, plan=plan) as handle:
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=0)
        assert handle.stats.ratio > 0.1


def test_a_compiled_foreign_forward_is_refused() -> None:
    model = FAMILIES["llava"].build()
    model.forward = torch.compile(lambda *a, **k: None, backend="eager")
    with pytest.raises(AlreadyCompressedError, match="forward replaced"):
        tokencomp.patch(model, 0.5)


@pytest.mark.parametrize("name", ["entry", "layer"])
def test_reduce_seconds_has_the_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only scoring moves."""
    family, clock = FAMILIES["qwen2_vl"], [0.0]
    scores = {"entry": "input_scores", "layer": "layer_scores"}[name]
    real = getattr(engine_scores, scores)

    def slow(*args: object) -> object:
        clock[0] += 5.0
        return real(*args)

    monkeypatch.setattr(engine_scores, scores, slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    model, reducer = family.build(), {"entry": "condiv", "layer": "fastv"}[name]
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
        model(**prompt(family))
        assert handle.stats.reduce_seconds == 5.0
