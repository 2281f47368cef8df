"""Train a projector that turns any image or video into 16 tokens, on a frozen model.

The few steps of this example show the procedure. A useful projector takes thousands of steps:
`tokencomp train ccam --model MODEL --data DATA --output FOLDER`.

python examples/train_ccam.py
"""

import json
import tempfile
from pathlib import Path

import tokencomp
from tokencomp import zoo
from tokencomp.inputs.prompts import generate
from tokencomp.training.ccam import CcamConfig, train_ccam
from tokencomp.training.data import ShapesQuestions, load_batch

model, processor = zoo.load("tiny-qwen2-vl")
config = CcamConfig(queries=16, align=8, steps=12, batch=8, samples=64, kind="video", evaluate=0)
with tempfile.TemporaryDirectory() as folder:
    weights = train_ccam(model, processor, "shapesqa:needle", Path(folder), config)
    loss = json.loads(weights.with_suffix(".json").read_text())["loss"]
    print(f"loss {loss[0]:.2f} → {loss[config.align - 1]:.2f} (imitating pooled frames)")
    for frames in (8, 16):
        source = ShapesQuestions(["needle"], 12, "test", frames=frames)
        inputs, truth = load_batch([source[i] for i in range(12)], processor, frames)
        with tokencomp.patch(model, reducer="ccam", weights=str(weights)) as handle:
            answers = generate(model, processor, inputs, 4)
        before, after = handle.stats.tokens_before[0], handle.stats.tokens_after[0][0]
        right = sum(a == b for a, b in zip(answers, truth, strict=True))
        print(f"{frames:2} frames: {before} → {after} visual tokens, {right} of 12 right")
