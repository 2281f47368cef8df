"""The default scorer of frames against a whole forward pass, and the records of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.clips import pictures, write_clip
from support.trained import tiny

import tokencomp
from tokencomp.adapters.registry import adapter_for
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.frames import Even, Scored
from tokencomp.inputs.media import load_media
from tokencomp.inputs.prompts import build_inputs
from tokencomp.inputs.questions import Example
from tokencomp.inputs.scorer import EmbeddingScorer, with_scorer

pytest.importorskip("av")
QUESTION = "What moves?"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), "h264", pictures(72))


def by_hand(model, processor, frame):
    inputs = build_inputs(processor, [[frame]], [QUESTION])
    with torch.no_grad():
        rows = model(**inputs, output_hidden_states=True).hidden_states[0][0]
    places = adapter_for(model).placeholders
    visual = [token in places for token in inputs["input_ids"][0].tolist()]
    text = [row / row.norm() for row, seen in zip(rows, visual, strict=True) if not seen]
    mean = sum(text) / len(text)
    return max(float(row @ mean / row.norm() / mean.norm())
               for row, seen in zip(rows, visual, strict=True) if seen)  # fmt: skip


def test_scores_are_cosines_of_the_decoder_input(loaded):
    model, processor = loaded
    colours = [(200, 30, 30), (30, 200, 30), (240, 240, 240)]
    frames = [Image.new("RGB", (56, 56), colour) for colour in colours]
    expected = [by_hand(model, processor, frame) for frame in frames]
    scorer = EmbeddingScorer(model, processor)
    assert np.allclose(scorer(frames, QUESTION), expected, atol=1e-5)
    with tokencomp.patch(model, 0.5):
        assert np.allclose(scorer(frames, QUESTION), expected, atol=1e-5)


def test_texts_get_the_model_as_their_scorer(loaded, clip):
    policy = with_scorer("scorer:aks:2", *loaded)
    assert isinstance(policy, Scored) and str(policy) == "scorer:aks:2"
    assert len(load_media(clip, policy, question=QUESTION)) == 2
    own = Scored(2, lambda frames, question: [0.0] * len(frames))
    assert with_scorer(own, *loaded) is own and with_scorer(8, *loaded) == 8


def test_records_of_an_evaluation_say_which_frames(loaded, clip):
    questions = [Example("one", QUESTION, "block", (str(clip),))]
    for frames, kept in (("1fps", 3), ("scorer:aks:2", 2), ("stream:2", 2)):
        (run,) = sweep(*loaded, questions, [Setting()], frames=frames, progress=False,
                       max_new_tokens=1).values()  # fmt: skip
        (record,) = run.records
        ((rule, *places),) = record["frames"]
        assert len(places) == kept and run.manifest["identity"]["frames"] == frames
        sampling = load_media(clip, with_scorer(frames, *loaded), question=QUESTION).sampling
        assert (rule, *places) == (sampling.rule, *sampling.indices)
    for frames in (2, "2", Even(2)):
        (run,) = sweep(*loaded, questions, [Setting()], frames=frames, progress=False,
                       max_new_tokens=1).values()  # fmt: skip
        assert "frames" not in run.records[0] and run.manifest["identity"]["frames"] == 2
