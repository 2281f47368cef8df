"""Train a LoRA adapter while tokens are dropped between layers, and load it with PEFT.

Training starts with high ratios and continues with lower ones.
`tokencomp train adsc --model MODEL --data DATA --output FOLDER` does the same for any model.

python examples/train_adsc.py
"""

import tempfile
from pathlib import Path

from peft import PeftModel

import tokencomp
from tokencomp import zoo
from tokencomp.inputs.prompts import generate
from tokencomp.training.adsc import AdscConfig, train_adsc
from tokencomp.training.data import load_batch, questions

model, processor = zoo.load("tiny-qwen2-vl")
config = AdscConfig(
    schedule=("0.8", "0.67", "0|0.5|0.67|0.8"),
    steps=12,
    batch=8,
    samples=96,
    kind="image",
    evaluate=0,
)
with tempfile.TemporaryDirectory() as folder:
    train_adsc(model, processor, "shapesqa:attribute", Path(folder), config)
    fresh, _ = zoo.load("tiny-qwen2-vl")
    tuned = PeftModel.from_pretrained(fresh, folder).eval()
source = questions("shapesqa:attribute", "image", 16, "test")
inputs, truth = load_batch([source[i] for i in range(16)], processor, frames=8)
for ratio in (0.0, 0.67, 0.8):
    with tokencomp.patch(tuned, ratio, reducer="adsc"):
        answers = generate(tuned, processor, inputs, 4)
        with tuned.disable_adapter():
            untrained_answers = generate(tuned, processor, inputs, 4)
    counts = [
        sum(a == b for a, b in zip(t, truth, strict=True)) for t in (answers, untrained_answers)
    ]
    print(f"ratio {ratio:.2f}: {counts[0]} of 16 right trained, {counts[1]} training-free")
