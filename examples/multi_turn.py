"""Run a ragged batch of image and video prompts, then a second turn on the compressed cache.

python examples/multi_turn.py
"""

import json

import torch

import tokencomp
from tokencomp import zoo
from tokencomp.inputs.media import load_media

model, processor = zoo.load("tiny-qwen2-vl")
processor.tokenizer.padding_side = "left"
questions = json.loads((zoo.SAMPLES / "questions.json").read_text())
image = next(q for q in questions if q["kind"] == "image")
video = next(q for q in questions if q["kind"] == "video")

prompts, images, videos = [], [], []
for item in (image, video):
    content = [{"type": item["kind"]}, {"type": "text", "text": item["question"]}]
    messages = [{"role": "user", "content": content}]
    prompts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
    media = load_media(zoo.SAMPLES / item["media"], frames=8)
    (images if item["kind"] == "image" else videos).append(media)
inputs = processor(text=prompts, images=images, videos=videos, padding=True, return_tensors="pt")

with tokencomp.patch(model, ratio=0.5, reducer="aim") as handle:
    first = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    answers = processor.batch_decode(first.sequences[:, inputs["input_ids"].shape[1] :], True)
    for item, text in zip((image, video), answers, strict=True):
        print(f"{item['question']}  {text.strip()}  (truth: {item['answer']})")
    print("tokens per layer and sample:", handle.stats.tokens_after)

    turn = (
        "<|im_end|>\n<|im_start|>user\nHow many objects are there?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    new = processor.tokenizer([turn, turn], return_tensors="pt")["input_ids"]
    ids = torch.cat([first.sequences, new], 1)
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)
    second = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=4
    )
    answers = processor.batch_decode(second[:, ids.shape[1] :], True)
    print("second turn:", [text.strip() for text in answers])
