"""Compress a model with one line and undo it with another, on the embedded model.

python examples/quickstart.py
"""

import json

import tokencomp
from tokencomp import zoo
from tokencomp.inputs.media import load_media

model, processor = zoo.load("tiny-qwen2-vl")  # any supported Hugging Face model works the same
question = next(
    q for q in json.loads((zoo.SAMPLES / "questions.json").read_text()) if q["kind"] == "video"
)
frames = load_media(zoo.SAMPLES / question["media"], frames=8)

messages = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question["question"]}]}
]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=[prompt], videos=[frames], return_tensors="pt")


def answer() -> str:
    """Generate the answer of the model as it is patched at the moment."""
    out = model.generate(**inputs, max_new_tokens=8)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], True)[0].strip()


print(f"{question['question']}  (truth: {question['answer']})")
print(f"uncompressed: {answer()}")

handle = tokencomp.patch(model, ratio=0.75)
print(f"ratio 0.75:   {answer()}")
stats = handle.stats
print(f"visual tokens {stats.tokens_before[0]} → {stats.tokens_after[0]} per layer")
print(f"LLM FLOPs {stats.flops_before:.3g} → {stats.flops_after:.3g}")
print(f"KV cache {stats.kv_bytes_before} → {stats.kv_bytes_after} bytes")

tokencomp.unpatch(model)
print(f"undone:       {answer()}")
