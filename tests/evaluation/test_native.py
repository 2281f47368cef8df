"""The model's own token budget, against the image processor called by hand."""

from types import SimpleNamespace

import pytest
import transformers
from PIL import Image

from tokencomp.errors import OptionError
from tokencomp.evaluation.baselines import has_budget, native_budget


@pytest.mark.skipif(not hasattr(transformers, "Gemma4ImageProcessor"), reason="needs Gemma 4")
@pytest.mark.parametrize(("ratio", "budget"), [(0.5, 140), (0.75, 70), (0.9, 70)])
def test_the_nearest_budget_is_taken_and_given_back(ratio, budget):
    kind = transformers.Gemma4ImageProcessor
    processor, image = SimpleNamespace(image_processor=kind()), Image.new("RGB", (400, 300))
    by_hand = kind(max_soft_tokens=budget)([image], return_tensors="pt")
    assert has_budget(processor)
    with native_budget(processor, ratio) as taken:
        inside = processor.image_processor([image], return_tensors="pt")
    name = "num_soft_tokens_per_image"
    assert taken == budget and inside[name].tolist() == by_hand[name].tolist()
    assert inside["pixel_values"].equal(by_hand["pixel_values"])
    assert processor.image_processor.max_soft_tokens == 280


def test_other_models_have_none():
    processor = SimpleNamespace(image_processor=SimpleNamespace(size=224))
    assert not has_budget(processor)
    with pytest.raises(OptionError, match="downscale"), native_budget(processor, 0.5):
        pass
