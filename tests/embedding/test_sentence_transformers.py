"""sentence-transformers on an embedded model: embeddings and ranks through its own calls."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokencomp
from tokencomp import zoo
from tokencomp.errors import NoVisualInputError

st = pytest.importorskip("sentence_transformers", minversion="6")
modules = pytest.importorskip("sentence_transformers.base.modules")
PATH = str(zoo.model_path("tiny-qwen3-vl"))
EXAMPLE = Path(__file__).parents[2] / "examples" / "embed.py"
QUESTION = "Is there a pink square?"


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    images = [Image.open(path).convert("RGB") for path in sorted(zoo.SAMPLES.glob("*.jpg"))]
    return [images[0], images[1].resize((112, 224)), images[2]]  # grids of two sizes


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("embed", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def embedder() -> Any:
    return st.SentenceTransformer(PATH, model_kwargs={"dtype": "float32"})


def own_states(embedder: Any, pictures: list[Image.Image], ratio: float) -> list[torch.Tensor]:
    """Hidden states of kept columns, one picture at a time, by plain calls of the body."""
    states, body = [], embedder.transformers_model
    with tokencomp.patch(body, ratio) as handle, torch.no_grad():
        for picture in pictures:
            inputs = embedder[0].preprocess([picture])
            names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
            inputs = {k: v for k, v in inputs.items() if k in (*names, "mm_token_type_ids")}
            out = body(**inputs).last_hidden_state
            left = torch.ones(out.shape[1], dtype=torch.bool)
            if ratio:
                (span,), ((kept,),) = handle.stats.spans[0], handle.stats.kept(0)
                left[span.start : span.stop] = False
                left[[span.start + offset for offset in kept]] = True
            states.append(out[0, left])
    return states


def test_a_mean_over_kept_tokens(embedder: Any, pictures: list[Any], example: Any) -> None:
    """A batch gives the means of single pictures; the patch leaves no trace."""
    plain = embedder.encode(pictures, convert_to_tensor=True)
    with tokencomp.patch(embedder.transformers_model, 0.5, strict=True) as handle:
        parts = [embedder[0], example.KeptTokens(handle), embedder[1]]
        found = st.SentenceTransformer(modules=parts).encode(pictures, convert_to_tensor=True)
        assert handle.stats.ratio == pytest.approx(0.5, abs=0.02)
        with pytest.raises(NoVisualInputError):
            embedder.encode(["red"])
    for states, vector in zip(own_states(embedder, pictures, 0.5), found, strict=True):
        torch.testing.assert_close(states.mean(0), vector, atol=1e-5, rtol=1e-4)
    for states, vector in zip(own_states(embedder, pictures, 0), plain, strict=True):
        torch.testing.assert_close(states.mean(0), vector, atol=1e-5, rtol=1e-4)
    assert torch.cosine_similarity(found, plain).max() < 0.9999
    assert torch.equal(embedder.encode(pictures, convert_to_tensor=True), plain)


def test_the_last_token_and_texts(embedder: Any, pictures: list[Any]) -> None:
    pooling = st.sentence_transformer.modules.Pooling(128, pooling_mode="lasttoken")
    model = st.SentenceTransformer(modules=[embedder[0], pooling])
    text = model.encode(["red", "a longer text"], convert_to_tensor=True)
    with tokencomp.patch(model.transformers_model, 0.75):
        found = model.encode(pictures, convert_to_tensor=True)
        assert torch.equal(model.encode(["red", "a longer text"], convert_to_tensor=True), text)
    for states, vector in zip(own_states(model, pictures, 0.75), found, strict=True):
        torch.testing.assert_close(states[-1], vector, atol=1e-5, rtol=1e-4)


def test_ranks(pictures: list[Any]) -> None:
    """Scores of a CrossEncoder are differences of the patched model's own logits."""
    scores = pytest.importorskip("sentence_transformers.cross_encoder.modules")
    reader = modules.Transformer(
        PATH, transformer_task="any-to-any", model_kwargs={"dtype": "float32"}
    )
    ranker = st.CrossEncoder(modules=[reader, scores.LogitScore(731, 524)])
    pairs = [[QUESTION, picture] for picture in pictures]
    options = {"convert_to_tensor": True, "activation_fn": torch.nn.Identity()}
    plain = ranker.predict(pairs, **options)
    with tokencomp.patch(ranker.transformers_model, 0.5) as handle, torch.no_grad():
        found = ranker.predict(pairs, **options)
        assert handle.stats.ratio == pytest.approx(0.5, abs=0.02)
        for pair, score in zip(pairs, found, strict=True):
            inputs = {k: v for k, v in reader.preprocess([pair]).items() if hasattr(v, "shape")}
            logits = ranker.transformers_model(**inputs).logits[0, -1]
            torch.testing.assert_close(logits[731] - logits[524], score, atol=1e-4, rtol=1e-4)
    assert torch.equal(ranker.predict(pairs, **options), plain)
    assert not torch.equal(found, plain)


def test_the_example_runs(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    printed = capsys.readouterr().out
    assert printed.count("48 visual tokens") == 2 and printed.count("picture") == 3
