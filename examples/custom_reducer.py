"""Write a reducer of your own as a dataclass with a decorator.

python examples/custom_reducer.py
"""

import json
from dataclasses import dataclass

import torch

import tokencomp
from tokencomp import Tokens, zoo
from tokencomp.inputs.media import load_media
from tokencomp.reducers import ScoreReducer


@tokencomp.register_reducer("loudest")
@dataclass(frozen=True)
class Loudest(ScoreReducer):
    """Keep the tokens with the largest norm."""

    p: float = 2.0

    summary = "tokens with the largest norm (example)"

    def scores(self, tokens: Tokens) -> torch.Tensor:
        """The best-scored patches of every image or video are kept."""
        return torch.linalg.vector_norm(tokens.features.float(), ord=self.p, dim=1)


model, processor = zoo.load("tiny-qwen2-vl")
item = next(
    q for q in json.loads((zoo.SAMPLES / "questions.json").read_text()) if q["kind"] == "image"
)
content = [{"type": "image"}, {"type": "text", "text": item["question"]}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
inputs = processor(
    text=[prompt], images=[load_media(zoo.SAMPLES / item["media"])], return_tensors="pt"
)
for reducer in ("loudest", "bipartite", "prune"):
    with tokencomp.patch(model, ratio=0.75, reducer=reducer) as handle:
        out = model.generate(**inputs, max_new_tokens=4)
    text = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], True)[0].strip()
    print(f"{reducer:8} {text:8} (truth: {item['answer']}) kept {handle.stats.kept()[0][0][:8]} …")
