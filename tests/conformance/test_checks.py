"""The conformance checks see what is exact, and what is not."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokencomp
from benchmarks.conformance.run import bare_model, compress, model_classes
from benchmarks.conformance.variants import variants
from tokencomp.conformance.build import TinyModel, tiny_model
from tokencomp.conformance.checks import SCORED, Checks, check_model
from tokencomp.conformance.features import Encoder
from tokencomp.conformance.oracle import hidden, is_linear_mixer
from tokencomp.conformance.prompts import Prompts
from tokencomp.conformance.variants import Variant
from tokencomp.engine import cache, decoder, later, weights
from tokencomp.errors import (
    NoDecoderError,
    NoPlaceholderError,
    PlanError,
    RowIndexedAttentionError,
    UnsupportedModelError,
)
from tokencomp.plan.plan import Plan, Stage
from tokencomp.reducers.registry import make_reducer
from tokencomp.torchlib.cache_classes import STATES


def tiny(model_type: str) -> TinyModel:
    model_class = getattr(transformers, model_classes()[model_type])
    return tiny_model(model_class, CONFIG_MAPPING[model_type](), variants(model_type)[-1])


# Those of dots3_note and mistral_large4 have indexers, and sizes that differ by layer.


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dart", {}),
        ("sparsevlm", {}),
        ("mmtok", {}),
        ("random", {"at": 0.5}),
        ("kcenter+sparsevlm", {}),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2_vl", "glm4v_moe", "dots3_note", "mistral_large4"])
def test_other_signals_and_late_stages_are_exact(
    model_type: str, name: str, options: dict[str, Any]
) -> None:
    """Lengths of keys, raters of the question, its embeddings, and a cut that reads nothing."""
    model = tiny(model_type)
    checks = Checks(model, Prompts(model), compress, {})
    checks.scored(name, **options)
    assert checks.errors[name] < 5e-5


@pytest.mark.parametrize(
    ("model_type", "refused", "reason"),
    [
        ("gemma3n", [*SCORED], "takes hidden states of several streams"),
        ("inkling_mm_model", [*SCORED], "adds a bias by distance"),
        pytest.param(
            "hy_v4_vl",
            [*SCORED],
            "takes hidden states of several streams",
            marks=pytest.mark.long,
        ),
        ("nemotron_h_omni", ["condiv"], "has no attention module that scores"),
    ],
)
def test_reducers_that_nothing_could_score_are_refused(
    model_type: str, refused: list[str], reason: str
) -> None:
    """With a typed error, before any layer runs."""
    result = check_model(tiny(model_type), compress)
    assert result.status in ("exact", "entry only")
    assert [name for name in result.refusals if name in SCORED] == refused
    assert reason in result.refusals["condiv"]
    assert {*SCORED} - {*refused} <= set(result.errors)


@torch.no_grad()
def test_the_default_on_a_video_of_layers_with_indexers() -> None:
    """It reads the attention of the first layer of dots3_note, whose indexer reads a mask."""
    model = tiny("dots3_note")
    encoder = Encoder(model, "video")
    encoder.images = [torch.randn(12, model.text_config.hidden_size)]
    ids = torch.tensor([[130, 140, *[model.config.video_token_id] * 12, 150, 160, 170]])
    grid = {"video_grid_thw": torch.tensor([[2, 4, 6]])}
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **grid}
    with tokencomp.patch(model.whole, 0.5) as handle:
        short = model.model(**call, pixel_values_videos=torch.zeros(1, 3, 8, 8)).logits
        left = ids != model.config.video_token_id
        left[0, [2 + i for i in handle.stats.kept(0)[0][0]]] = True
    assert int((~left).sum()) == 6
    with hidden(model.decoder.layers, [left] * len(model.decoder.layers)):  # type: ignore
        full = model.model(**call, pixel_values_videos=torch.zeros(1, 3, 8, 8)).logits
    assert (short - full)[left].abs().max() < 5e-5


def test_rows_that_an_indexer_has_chosen_stay() -> None:
    """Layers that follow the choice of a layer before keep its rows, whose numbers it holds."""
    followers = {"indexer_types": ["full", "shared", "full", "shared"], "index_topk": 6}
    model_class = getattr(transformers, model_classes()["mistral_large4"])
    model = tiny_model(model_class, CONFIG_MAPPING["mistral_large4"](), Variant(text=followers))
    with pytest.raises(PlanError, match=r"stages at layers \[1.*indexer_types of the config"):
        tokencomp.patch(model.model, 0.5, reducer="fastv")
    last = make_reducer("prune", score="last_query")
    checks = Checks(model, Prompts(model), compress, {})
    checks._against_oracle("layers", Plan((Stage(2, 0.5, last),)))


def test_other_positions_are_not_exact() -> None:
    """Renumbered positions compress as well, but are another model."""
    compact = functools.partial(tokencomp.patch, positions="compact")
    result = check_model(tiny("llava"), lambda model, plan: compact(model, plan=plan))
    assert result.status == "unverified"
    assert "entry" in result.reason
    assert result.errors["entry"] > 1e-2


def test_a_patch_that_changes_nothing_is_not_exact() -> None:
    """An uncompressed run equals a reference without dropped tokens, and must not pass."""

    class Idle:
        stats = SimpleNamespace(tokens_before=[0, 0], spans=[[], []], kept=lambda row: [[]])

        def __enter__(self) -> Idle:
            return self

        def __exit__(self, *exc: object) -> None:
            return None

        def remove(self) -> None:
            return None

    result = check_model(tiny("llava"), lambda model, plan: Idle())
    assert result.status == "unverified"
    assert "0 of 48 visual tokens" in result.reason


def test_the_reference_hides_columns_of_sliding_windows() -> None:
    """Hidden columns change nothing for rows whose window they lie outside of."""
    model = tiny("gemma3")
    prompts = Prompts(model)
    inputs = prompts.inputs()
    plain = prompts.forward(inputs, use_cache=False).logits
    depth = len(model.decoder.layers)  # type: ignore[arg-type]
    real = inputs["attention_mask"].bool()
    with hidden(model.decoder.layers, [real] * depth):
        same = prompts.forward(prompts.inputs(), use_cache=False).logits
    assert torch.equal(same[real], plain[real])
    first = real.clone()
    first[0, 5:8] = False
    with hidden(model.decoder.layers, [first] * depth):
        changed = prompts.forward(prompts.inputs(), use_cache=False).logits
    assert torch.equal(changed[1], same[1])
    assert (changed[0, 10] - same[0, 10]).abs().max() > 1e-2


def test_linear_mixers_of_the_reference_see_the_rows_that_are_left() -> None:
    """A mixer on some rows is the mixer on a shorter sequence."""
    model = tiny("qwen3_5")
    mixers = [m for m in model.decoder.modules() if is_linear_mixer(m)]
    assert len(mixers) == 2
    rows = torch.tensor([0, 2, 3, 5])
    left = torch.zeros(1, 6, dtype=torch.bool)
    left[:, rows] = True
    layer = next(x for x in model.decoder.layers if mixers[0] in list(x.modules()))  # type: ignore
    x = torch.randn(1, 6, model.text_config.hidden_size)
    with torch.no_grad():
        short = mixers[0](x[:, rows])
        with hidden([layer], [left]):
            full = mixers[0](x)
    assert torch.allclose(full[:, rows], short, atol=1e-6)
    assert not full[:, [1, 4]].any()


@pytest.mark.parametrize(
    ("model_type", "error", "mechanism"),
    [
        ("glm5_next", RowIndexedAttentionError, "pools of 16 consecutive rows"),
        ("qwen4_exp", RowIndexedAttentionError, "groups of 4 consecutive rows"),
        ("minimax_m3_vl", RowIndexedAttentionError, "blocks of 4 consecutive rows"),
        ("blip-2", NoDecoderError, "32 learned queries of a Q-Former"),
        ("florence2", NoDecoderError, "is an encoder-decoder"),
        ("mllama", NoDecoderError, "cross_attention_states: it reads features of media by cross-"),
        ("idefics", NoDecoderError, "image_encoder_embeddings.*by cross-attention"),
        ("diffusion_gemma", NoDecoderError, "a separate sequence"),
        ("kosmos-2", NoPlaceholderError, "learned queries, whose places"),
        ("kosmos-2.5", NoPlaceholderError, "learned queries, whose places"),
        ("phi4_multimodal", NoPlaceholderError, "puts features into its embeddings itself"),
    ],
)
def test_types_that_cannot_be_exact_are_refused(
    model_type: str, error: type[Exception], mechanism: str
) -> None:
    """Attention by the number of a row, no causal decoder, or no placeholder."""
    if error is NoPlaceholderError:
        model_class = getattr(transformers, model_classes()[model_type])
        model = bare_model(model_class, CONFIG_MAPPING[model_type]())
    else:
        model = tiny(model_type).model
    with pytest.raises(error, match=mechanism):
        compress(model, Plan())


def test_a_bias_by_rows_that_nothing_corrects_is_refused() -> None:
    """As that of Inkling, in a decoder whose layers take no distances."""
    model = tiny("llava").model
    model.model.language_model.config.rel_extent = 64
    with pytest.raises(RowIndexedAttentionError, match="a bias by the number of rows"):
        compress(model, Plan())


def test_windows_of_several_sizes_are_refused() -> None:
    """transformers lets layers of one kind differ, but tokencomp knows one window."""
    model = tiny("dots3_note").model
    windows = {"0": {"sliding_window": 6}, "1": {"sliding_window": 8}}
    config = model.model.language_model.config
    config.per_layer_config = {**windows, "2": windows["0"], "3": windows["0"]}
    with pytest.raises(UnsupportedModelError, match="sliding_window of the layers is 6, 8"):
        compress(model, Plan())


@pytest.mark.parametrize(
    "model_type", ["inkling2", pytest.param("inkling2_loop", marks=pytest.mark.long)]
)
def test_biases_by_distance_count_columns(model_type: str) -> None:
    """Behind dropped tokens distances stay what they were, also where layers run twice."""
    result = check_model(tiny(model_type), compress)
    assert result.status == "entry only" and "states of blocks" in result.reason
    assert result.errors["entry decode"] < 5e-5


def _without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = weights.bias_dims
    monkeypatch.setattr(weights, "bias_dims", lambda q, k, w, s: plain(q, k, torch.ones_like(w), s))


def _without_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.CompressedLayer, "reorder_cache", lambda self, beams: None)


def _counting_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "count_columns", lambda held, columns: None)
    monkeypatch.setattr(decoder, "check_prompt", lambda held, columns: None)
    monkeypatch.setattr(later, "check_turn", lambda held, first, arguments: None)


@pytest.mark.parametrize(
    ("model_type", "fault", "check"),
    [
        ("llava", _without_weights, "merge"),
        ("llava", _without_order, "beams"),
        pytest.param(
            "lfm2_vl",
            _counting_rows,
            "turn",
            marks=pytest.mark.skipif(
                not hasattr(STATES(), "cumulative_length_linear"),
                reason="layers with a state count no tokens in this release",
            ),
        ),
    ],
)
def test_faults_after_the_prompt_are_not_exact(
    model_type: str, fault: Any, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_model(tiny(model_type), compress).status == "exact"
    fault(monkeypatch)
    result = check_model(tiny(model_type), compress)
    assert result.status == "unverified"
    assert result.reason.startswith(f"{check}: difference")


def test_what_fails_without_a_patch_is_not_our_fault() -> None:
    """PaliGemma's later images see what follows them, without a cache alone."""
    result = check_model(tiny("paligemma"), compress)
    assert result.status == "exact"
    assert "turn media" in result.unpatched and "turn media" not in result.errors
