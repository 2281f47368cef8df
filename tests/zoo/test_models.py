"""The packaged models: stock folders that load, answer well above chance, and chat."""

import pytest
import torch

from recipes.tiny.card import render_card
from recipes.tiny.evaluate import by_family, evaluate
from recipes.tiny.families import family
from tokencomp import zoo
from tokencomp.errors import UnknownNameError, UnsupportedModelError
from tokencomp.inputs.packaged import DEFAULT_MODEL
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.inputs.questions import option_letter
from tokencomp.zoo.shapesqa.items import item, items
from tokencomp.zoo.shapesqa.prompt_forms import mvbench_prompt

BARS = ("attribute", "existence", "needle")
EVERY = ("count", "position", "small_object", "order", "direction", "video_existence")
MORE = {  # what a model has to know besides
    "tiny-qwen3-vl": EVERY,
    "tiny-qwen3-vl-hard": EVERY,
    "tiny-qwen3-5": ("count", "position", "small_object", "direction", "video_existence"),
    "tiny-gemma3": ("count", "position", "small_object"),
}
MODELS = [name for name in zoo.available_models() if name != "tiny-qwen3-vl-long"]
"""Those that answer in a word or a letter."""


def takes(name, kind):
    """Whether the processor of a packaged model takes this modality."""
    return kind in family(name).kinds


def bars(name):
    usual = [f for f in BARS if f != "needle" or takes(name, "video")]
    return [*usual, *MORE.get(name, ())]


def answer(model, processor, media, prompts):
    """Greedy answers to one batch of prompts, each about one image or one video."""
    return generate(model, processor, build_inputs(processor, [[m] for m in media], prompts), 8)


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    return request.param, *zoo.load(request.param)


# The default model in plain pytest, and the others with -m long.
mostly_long = pytest.mark.parametrize(
    "loaded",
    [pytest.param(n, marks=[] if n == DEFAULT_MODEL else [pytest.mark.long]) for n in MODELS],
    indirect=True,
    scope="module",
)


@pytest.mark.parametrize(
    ("name", "each"),
    [(DEFAULT_MODEL, 3), *(pytest.param(name, 10, marks=pytest.mark.long) for name in MODELS)],
)
def test_answers_held_out_items_from_files(name, each):
    """Items never trained on, read from JPEG and mp4: at least 80 %, chance is below 30 %."""
    model, processor = zoo.load(name)
    rows = evaluate(model, processor, items("validation", each, bars(name)), batch=10)
    assert len(rows) == each * len(bars(name))
    assert sum(row["correct"] for row in rows) >= 0.8 * len(rows), by_family(rows)


@mostly_long
def test_multiple_choice_in_a_padded_batch_equals_singles(loaded):
    name, model, processor = loaded
    names = ("attribute", "needle", "existence", "order")
    some = [item("validation", each, 5) for each in names]
    some = [one for one in some if takes(name, one.kind)]
    media = [one.image() if one.kind == "image" else one.video() for one in some]
    prompts = [mvbench_prompt(one.query) for one in some]
    together = answer(model, processor, media, prompts)
    alone = [answer(model, processor, [m], [p])[0] for m, p in zip(media, prompts, strict=True)]
    assert together == alone
    if zoo.metrics(name)["test"]["mvbench"]["attribute"]["accuracy"]:  # siblings learn no letters
        assert all(option_letter(text) in tuple("ABCD") for text in together)


@mostly_long
def test_chat_template_tokenises_media(loaded):
    """apply_chat_template(tokenize=True) with media parts, several turns, left padding."""
    _, model, processor = loaded
    picture = item("test", "attribute", 0)
    parts = [{"type": "image", "image": picture.image()}, {"type": "text", "text": "What is it?"}]
    one = [{"role": "user", "content": parts}]
    two = [
        *one,
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "How many objects are there?"}]},
    ]
    how = dict(tokenize=True, return_dict=True, return_tensors="pt", padding=True)
    inputs = processor.apply_chat_template([one, two], add_generation_prompt=True, **how)
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][1].all()
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=3)
    told = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all(text.strip() for text in told)


def test_card_is_generated_and_bars_hold(loaded):
    name, model, _ = loaded
    folder = zoo.model_path(name)
    metrics = zoo.metrics(name)
    assert (folder / "README.md").read_text() == render_card(metrics).rstrip() + "\n"
    for family_name in bars(name):
        assert metrics["test"]["free"][family_name]["accuracy"] >= 0.9, family_name
        assert metrics["test"]["free"][family_name]["items"] >= 100
    assert sum(p.numel() for p in model.parameters()) == round(metrics["model"]["parameters"] * 1e6)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 8.5e6  # with the trained selector and projector


def test_names():
    assert zoo.resolve("tiny-qwen2-vl") == str(zoo.model_path("tiny-qwen2-vl"))
    assert zoo.resolve("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"
    with pytest.raises(UnsupportedModelError, match="no such folder"):
        zoo.resolve("/some/folder")
    for call in (zoo.model_path, zoo.load, zoo.resolve):
        with pytest.raises(UnknownNameError, match="tiny-qwen2-vl"):
            call("tiny-qwen2vl")
