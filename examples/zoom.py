"""A screenshot at 512 tokens, a closer look at a region of it, and the exact pixel to click.

python examples/zoom.py
"""

from PIL import Image

from tokencomp import zoo
from tokencomp.inputs.images import load_image
from tokencomp.inputs.zoom import Region

model, processor = zoo.load("tiny-qwen3-vl")  # a model of yours: loaded as always
side = processor.image_processor.patch_size * processor.image_processor.merge_size  # of a token

# A screenshot with three windows; the question is about the lowest one.
screenshot = Image.new("RGB", (1792, 1120), "white")
WINDOWS = {
    "attribute-00001": (120, 90),
    "position-00003": (1500, 200),
    "small_object-00002": (900, 760),
}
for name, corner in WINDOWS.items():
    screenshot.paste(load_image(zoo.SAMPLES / f"test-{name}.jpg"), corner)


def look(image: Image.Image, question: str, tokens: int) -> tuple[int, int]:
    """Print the answer about a picture of at most so many tokens; the size that the model saw."""
    text = {"type": "text", "text": question}
    messages = [{"role": "user", "content": [{"type": "image"}, text]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    size = {"shortest_edge": side**2, "longest_edge": tokens * side**2}
    inputs = processor(text=[prompt], images=[image], size=size, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8)
    answer = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], True)[0].strip()
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    patch = processor.image_processor.patch_size
    shown = columns * patch, rows * patch
    print(f"{image.size} px seen as {shown}, {shown[0] * shown[1] // side**2} tokens: {answer}")
    return shown


question = "What color is the small cross?"
shown = look(screenshot, question, tokens=512)

# The model, or the caller, names a place in the small picture: here the middle of the window.
x, y = Region(0, 0, *screenshot.size).locate(443, 371, shown)
region = Region.around(x, y, (224, 224), screenshot.size)
crop = region.cut(screenshot)  # pixels of the screenshot, not of the small picture
seen = look(crop, question, tokens=512)

click = 195, 64  # the cross; the embedded model names no places, a model for agents answers this
x, y = region.locate(*click, seen)
color = screenshot.getpixel((x, y))
print(f"click {click} in the region: pixel ({x}, {y}) of the screenshot, {color}")
