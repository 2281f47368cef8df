"""`tokencomp.mlx` drops what `tokencomp.patch` drops, and dropping equals masking in MLX too."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import tokencomp
from tokencomp.errors import (
    OptionError,
    RatioError,
    SpanError,
    UnknownNameError,
    UnsupportedCacheError,
    UnsupportedModelError,
)

if importlib.util.find_spec("mlx_vlm") is None:
    pytest.skip("mlx-vlm is not installed", allow_module_level=True)

from support.mlx_pair import CASES, IMAGE, NAMES, VIDEO, answered, pair, prompt
from support.serving.hf_reference import merged_at_compact

import tokencomp.mlx  # after the processors of transformers are loaded
from tokencomp.reducers.base import reduced

REDUCERS = ("auto", "kcenter", "divprune", "vidcom2", "uniform", "random", "bipartite")


def features(both: Any, asked: Any) -> Any:
    return both.model.get_input_embeddings(asked.ids, asked.pixels, **asked.rest)


def generated(both: Any, asked: Any, tokens: int, step: int | None) -> tuple[list[int], Any]:
    """Greedy tokens of mlx-vlm's own generation, and log-probabilities of every step."""
    from mlx_vlm.generate import generate_step

    steps = generate_step(
        asked.ids, both.model, asked.pixels, None, max_tokens=tokens, temperature=0.0,
        prefill_step_size=step, **asked.rest,
    )  # fmt: skip
    pairs = [(int(token), np.array(row).ravel()) for token, row in steps]
    return [token for token, _ in pairs], [row for _, row in pairs]


@pytest.mark.parametrize(("name", "media"), CASES)
def test_rows_and_tokens_of_transformers(name: str, media: str) -> None:
    """The same rows by every reducer, and the same answer, whole prefill or in chunks."""
    both = pair(name)
    asked = prompt(both, media)
    positions: Any = "compact" if "llava" in name else "original"
    allowed = 5e-3 if "qwen3-5" in name else 1e-4  # its linear layers differ that much anyway
    chosen = set()
    for reducer in REDUCERS:
        tokens, chunks = (4, (16, None)) if reducer == "kcenter" else (1, (None,))
        options = {"reducer": reducer, "positions": positions}
        with tokencomp.patch(both.reference, 0.6, **options) as theirs, torch.no_grad():
            expected = both.reference(**asked.inputs).logits[0, -1].log_softmax(0).numpy()
            rows = theirs.stats.pooling_mask(asked.inputs["attention_mask"])[0].nonzero()[:, 0]
            answer = answered(both, asked.inputs, tokens)
        with tokencomp.mlx.patch(both.model, 0.6, reducer) as handle:
            for step in chunks:
                found, scores = generated(both, asked, tokens, step)
                assert handle.columns.tolist() == rows.tolist(), reducer
                assert found[: len(answer)] == answer, (reducer, step)
                assert np.abs(scores[0] - expected).max() < allowed
        chosen.add(str(rows.tolist()))
    assert len(chosen) >= 4  # reducers differ, so a wrong choice would show


def merged_in_transformers(both: Any, asked: Any, ratio: float) -> tuple[list[int], list[float]]:
    """Five greedy tokens and their log-probabilities, whatever token ends an answer."""
    job = {"tokencomp": {"ratio": ratio, "reducer": "kcenter"}, "tokens": 5}
    if "llava" in both.reference.config.model_type:
        answer = merged_at_compact(both.reference, asked.inputs, job)
        return answer["tokens"], answer["logprobs"]
    with tokencomp.patch(both.reference, ratio, reducer="kcenter", merge=True):
        out = both.reference.generate(
            **asked.inputs, max_new_tokens=5, do_sample=False, output_logits=True,
            return_dict_in_generate=True, eos_token_id=-1,
        )  # fmt: skip
    tokens = out.sequences[0, asked.ids.shape[1] :].tolist()
    scores = [row[0].log_softmax(0) for row in out.logits]
    return tokens, [float(row[t]) for row, t in zip(scores, tokens, strict=True)]


@pytest.mark.parametrize(("name", "media"), CASES)
def test_merging_equals_transformers(name: str, media: str) -> None:
    """Merged tokens weigh as much in MLX, in the prompt, in chunks of it, and after it.

    The reference of LLaVA types is the decoder of transformers on the merged rows, at positions
    without gaps.
    """
    both = pair(name)
    asked = prompt(both, media)
    allowed = 5e-3 if "qwen3-5" in name else 1e-4  # its linear layers differ that much anyway
    classes = [type(layer) for layer in both.model.language_model.model.layers]
    tokens, expected = merged_in_transformers(both, asked, 0.6)
    with tokencomp.mlx.patch(both.model, 0.6, "kcenter", merge=True) as handle:
        for step in (16, None):
            found, rows = generated(both, asked, 5, step)
            scores = [row[token] for row, token in zip(rows, tokens, strict=True)]
            assert found == tokens, step
            assert np.abs(np.subtract(scores, expected)).max() < allowed
        assert handle.sizes.sum() == asked.ids.shape[1] > len(handle.columns)
    assert [type(layer) for layer in both.model.language_model.model.layers] == classes
    with tokencomp.mlx.patch(both.model, 0.6, "kcenter", merge=False) as dropped:
        other = generated(both, asked, 1, None)[1][0]
    assert dropped.columns.tolist() == handle.columns.tolist()
    assert np.abs(other - rows[0]).max() > 1e-2


def test_the_default_merges() -> None:
    """As that of `tokencomp.patch`: in images up to ratio 0.9."""
    both = pair("tiny-qwen3-vl")
    for media, ratio, options, merges in (
        (IMAGE, 0.5, {}, True),
        (IMAGE, 0.95, {}, False),
        (VIDEO, 0.5, {}, True),
        (IMAGE, 0.5, {"merge": False}, False),
        (IMAGE, 0.5, {"reducer": "kcenter"}, False),
        (IMAGE, 0.5, {"reducer": "runlength", "merge": True}, True),
    ):
        with tokencomp.mlx.patch(both.model, ratio, **options) as handle:  # type: ignore[arg-type]
            features(both, prompt(both, media))
        assert (handle.sizes.max() > 1) == merges, (media, ratio, options)
    with pytest.raises(OptionError, match="merges tokens by itself"):
        tokencomp.mlx.patch(both.model, 0.5, "bipartite", merge=True)


def test_a_quantized_cache_is_refused_where_tokens_merge() -> None:
    from mlx_vlm.models.cache import QuantizedKVCache

    both = pair("tiny-qwen3-vl")
    asked = prompt(both, IMAGE)
    caches = [QuantizedKVCache() for _ in both.model.language_model.model.layers]
    with (
        tokencomp.mlx.patch(both.model, 0.5),
        pytest.raises(UnsupportedCacheError, match="merge=False"),
    ):
        both.model.language_model(
            asked.ids, inputs_embeds=features(both, asked).inputs_embeds, cache=caches
        )


@pytest.mark.parametrize("media", [IMAGE, VIDEO])
@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-qwen3-vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_dropping_equals_masking(name: str, media: str) -> None:
    """Hidden states of kept rows are those of the whole prompt whose other columns are hidden."""
    import mlx.core as mx

    both = pair(name)
    asked = prompt(both, media)
    whole = features(both, asked)
    with tokencomp.mlx.patch(both.model, 0.7, merge=False) as handle:
        short = features(both, asked)
    width = asked.ids.shape[1]
    seen = np.zeros(width, dtype=bool)
    seen[handle.columns] = True

    def states(given: Any, mask: Any = None) -> Any:
        extra = {
            key: value
            for key in ("visual_pos_masks", "deepstack_visual_embeds")
            if (value := getattr(given, key)) is not None
        }
        rows = given.inputs_embeds.shape[1]
        out = both.model.language_model.model(
            asked.ids[:, :rows], inputs_embeds=given.inputs_embeds, mask=mask,
            position_ids=given.position_ids, **extra,
        )  # fmt: skip
        return np.array(out[0])

    def hidden(visible: np.ndarray) -> Any:
        mask = np.tril(np.ones((width, width), dtype=bool)) & visible | np.eye(width, dtype=bool)
        return states(whole, mx.array(mask)[None, None])[seen]

    found = states(short)
    assert np.abs(found - hidden(seen)).max() < 1e-5 * max(1, np.abs(found).max())
    assert np.abs(found - hidden(np.roll(seen, 1))).max() > 1e-2  # other rows would show
    last = int(np.array(whole.position_ids).max())
    assert last + 1 == short.inputs_embeds.shape[1] + int(short.rope_deltas.item())


@pytest.mark.parametrize(
    ("name", "media"), [("tiny-qwen3-vl", VIDEO), ("tiny-llava-onevision", IMAGE)]
)
@pytest.mark.filterwarnings("ignore::tokencomp.errors.RatioWarning")
def test_budgets_are_those_of_transformers(name: str, media: str) -> None:
    """At most so many tokens of an image of one span or of two, or of a video."""
    both = pair(name)
    asked = prompt(both, media)
    positions: Any = "compact" if "llava" in name else "original"
    for budget in (1, 21, 1000):
        with (
            tokencomp.patch(both.reference, budget=budget, positions=positions) as theirs,
            torch.no_grad(),
        ):
            both.reference(**asked.inputs)
            rows = theirs.stats.pooling_mask(asked.inputs["attention_mask"])[0].nonzero()[:, 0]
        with tokencomp.mlx.patch(both.model, budget=budget) as handle:
            features(both, asked)
        assert handle.columns.tolist() == rows.tolist()
        assert f"budget={budget}, auto" in repr(handle)


@pytest.mark.parametrize("name", NAMES)
def test_ratio_zero_and_removal(name: str) -> None:
    from mlx_vlm.generate.ar import BatchGenerator

    both = pair(name)
    asked, insert = prompt(both, IMAGE), BatchGenerator.insert
    plain, attributes = features(both, asked), set(vars(both.model))
    with tokencomp.mlx.patch(both.model, 0):
        assert np.array_equal(features(both, asked).inputs_embeds, plain.inputs_embeds)
    first = tokencomp.mlx.patch(both.model, 0.5)
    with tokencomp.mlx.patch(both.model, 0.75):
        first.remove()  # was replaced: nothing happens
        shorter = features(both, asked).inputs_embeds.shape[1]
    assert shorter < plain.inputs_embeds.shape[1] == asked.ids.shape[1]
    assert set(vars(both.model)) == attributes and BatchGenerator.insert is insert
    again = features(both, asked)
    assert np.array_equal(again.inputs_embeds, plain.inputs_embeds)


def test_what_cannot_be_compressed_is_refused() -> None:
    import mlx.core as mx

    both = pair("tiny-qwen3-vl")
    asked, model = prompt(both, IMAGE), both.model
    with pytest.raises(RatioError, match="0, 1"):
        tokencomp.mlx.patch(model, 1.0)
    for budget in (0, 1.5, True):
        with pytest.raises(RatioError, match="budget"):
            tokencomp.mlx.patch(model, budget=budget)
    wrong_amounts: list[Any] = [{"budget": {"prompt": 8}}, {"budget": 8, "ratio": 0.5}]
    for options in wrong_amounts:
        with pytest.raises(OptionError):
            tokencomp.mlx.patch(model, **options)
    with pytest.raises(UnknownNameError, match="kcenter"):
        tokencomp.mlx.patch(model, 0.5, "kcentr")
    with pytest.raises(OptionError, match="no option 'seed'"):
        tokencomp.mlx.patch(model, 0.5, "kcenter", seed=1)
    with pytest.raises(OptionError, match="cannot run inside an engine"):
        tokencomp.mlx.patch(model, 0.5, "fastv")
    with pytest.raises(UnsupportedModelError, match=r"tokencomp\.patch"):
        tokencomp.mlx.patch(both.reference, 0.5)
    with pytest.raises(UnsupportedModelError, match="gemma3"):
        tokencomp.mlx.patching.check_model("gemma3")
    with tokencomp.mlx.patch(model, 0.5):
        two = mx.concatenate([asked.ids, asked.ids])
        pixels = mx.concatenate([asked.pixels, asked.pixels])
        grids = mx.concatenate([asked.rest["image_grid_thw"]] * 2)
        with pytest.raises(OptionError, match="one at a time"):
            model.get_input_embeddings(two, pixels, image_grid_thw=grids)
        positions = mx.zeros((3, 1, 99), dtype=mx.int32)
        with pytest.raises(UnsupportedCacheError, match="prompt_cache_state"):
            model.get_input_embeddings(asked.ids[:, -5:], None, position_ids=positions)
        wrong = mx.array([[1, 2, 2]])
        with pytest.raises((SpanError, ValueError)):
            model.get_input_embeddings(asked.ids, asked.pixels, image_grid_thw=wrong)


@pytest.mark.parametrize("name", ["tiny-qwen3-vl", "tiny-llava-onevision"])
def test_a_second_turn_never_continues_compressed_rows(name: str) -> None:
    """mlx-vlm counts ids of the whole prompt, and the cache has fewer rows."""
    from mlx_vlm.generate.dispatch import _prime_cached_prefix_rope_state

    both = pair(name)
    asked = prompt(both, IMAGE)
    more = dict(asked.rest)
    clean = set(vars(both.model.language_model))
    with tokencomp.mlx.patch(both.model, 0.5):
        primed = _prime_cached_prefix_rope_state(both.model, asked.ids, None, more)
        if primed:
            with pytest.raises(UnsupportedCacheError):
                both.model.get_input_embeddings(asked.ids[:, -4:], None, **more)
    assert primed == ("qwen" in name)
    assert primed or set(vars(both.model.language_model)) == clean


def test_no_torch_is_imported() -> None:
    """A Mac needs none for the reducers of MLX, nor for the server."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mlx.core as mx, tokencomp.mlx\n"
        "from tokencomp.errors import MissingDependencyError\n"
        "from tokencomp.mlx.method import MlxMethod\n"
        "from tokencomp.mlx.selection import SELECT\n"
        "x = mx.random.normal((12, 8))\n"
        "print([len(f(x, (1, 3, 4), 5)) for f in SELECT.values()])\n"
        "try: MlxMethod('bipartite', 0.5)\n"
        "except MissingDependencyError as error: print(error)\n"
        "from tokencomp.cli import main\n"
        "sys.argv = 'tokencomp serve --engine mlx -- --draft-model=x'.split()\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("[5, 5, 5, 5, 5, 5]\n"), done.stderr
    assert "needs torch" in done.stdout
    assert "--draft-model: drafts" in done.stderr and done.returncode == 2


@pytest.mark.parametrize("reducer", REDUCERS[:6])
def test_selection_equals_the_reducer(reducer: str) -> None:
    """On random grids, with copies of rows in a third of the cases, and long spans."""
    import mlx.core as mx

    from tokencomp.mlx.selection import SELECT
    from tokencomp.tokens.tokens import Tokens

    rng, own = np.random.default_rng(0), tokencomp.make_reducer(reducer)
    grids = [tuple(int(n) for n in rng.integers(1, 9, 3)) for _ in range(30)]
    for case, grid in enumerate([*grids, (2, 24, 24)]):
        n = int(np.prod(grid))
        x = rng.standard_normal((n, 32)).astype(np.float32)
        if case % 3 == 0:
            x[n // 2 :] = x[: n - n // 2]
        keep = max(1, int(n * rng.choice([0.1, 0.25, 0.5, 0.9])))
        modality = ["video" if grid[0] > 1 else "image"]
        given = Tokens(torch.from_numpy(x), [grid], [keep], modalities=modality)
        expected = reduced(own, given).patches.numpy()
        assert np.array_equal(SELECT[reducer](mx.array(x), grid, keep), expected), (grid, keep)
