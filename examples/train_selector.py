"""Explain answers, train a selector on the explanations, and use it.

`tokencomp train selector --model MODEL --data DATA --output FOLDER` does the same for any model.

python examples/train_selector.py
"""

import tempfile
from pathlib import Path

import tokencomp
from tokencomp import zoo
from tokencomp.inputs.prompts import generate
from tokencomp.training.data import load_batch, questions
from tokencomp.training.selector.train import SelectorConfig, train_selector

model, processor = zoo.load("tiny-qwen2-vl")
config = SelectorConfig(
    samples=48, kind="image", batch=16, epochs=8, batch_spans=8, held_out=16, evaluate=0
)
with tempfile.TemporaryDirectory() as folder:
    weights = train_selector(model, processor, "shapesqa:attribute", Path(folder), config)
    source = questions("shapesqa:attribute", "image", 16, "test")
    inputs, truth = load_batch([source[i] for i in range(16)], processor, frames=8)
    for reducer, options in (("selector", {"weights": str(weights)}), ("random", {})):
        with tokencomp.patch(model, ratio=0.75, reducer=reducer, **options) as handle:
            answers = generate(model, processor, inputs, 4)
        right = sum(a == b for a, b in zip(answers, truth, strict=True))
        print(f"{reducer:8} {right} of 16 right, {handle.stats.ratio:.0%} removed")
