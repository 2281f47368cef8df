"""Watch a camera for as long as you like in constant memory, and ask at any time.

python examples/stream.py               # one minute of video
python examples/stream.py --minutes 60  # an hour

The clip is drawn as it is watched: one frame per second, and every half minute another shape
flashes for two seconds.
"""

import argparse
from collections.abc import Iterator

import numpy as np

import tokencomp
from tokencomp import zoo
from tokencomp.zoo.shapesqa.render import canvas_of, paint
from tokencomp.zoo.shapesqa.scenes import COLORS, SHAPES, Scene, Thing

EVERY, SHOWN, ASKED = 30, 2, 12  # seconds from flash to flash, of a flash, and until the question


def flash(number: int) -> Thing:
    """The shape that flashes for the `number`-th time."""
    rng = np.random.default_rng(number)
    shape, color = SHAPES[number % len(SHAPES)], str(rng.choice(COLORS))
    x, y = rng.integers(10, 150, 2)
    start = number * EVERY + 4
    return Thing(shape, color, 50, float(x), float(y), visible=((start, start + SHOWN),))


def camera(seconds: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Two frames at a time, with the time of the first."""
    canvas = canvas_of(Scene(224, 224, 1, (), background=3))
    for time in range(0, seconds, 2):
        scene = Scene(224, 224, 1, (flash(time // EVERY),), background=3)
        yield time, [paint(scene, moment, canvas) for moment in (time, time + 1)]


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--minutes", type=float, default=1.0, help="length of the video (default: 1)")
parser.add_argument("--ratio", type=float, default=0.75, help="of the patch (default: 0.75)")
parser.add_argument("--budget", type=int, default=300, help="rows of the cache (default: 300)")
args = parser.parse_args()

model, processor = zoo.load("tiny-qwen3-vl")
asked = right = 0
with (
    tokencomp.patch(model, args.ratio, reducer="kcenter"),
    tokencomp.Session(model, processor, budget=args.budget) as session,
):
    print("  time    tokens seen   rows held   question and answer")
    for time, frames in camera(round(args.minutes * 60)):
        session.append(frames, seconds=[time, time + 1])
        if time % EVERY == 4 + ASKED:
            thing = flash(time // EVERY)
            answer = session.ask(f"What color is the {thing.shape}?", max_new_tokens=4)
            asked, right = asked + 1, right + (answer == thing.color)
            print(
                f"{time // 60:3d}:{time % 60:02d} {session.tokens:13,} {session.rows:11,}   "
                f"the {thing.shape} {ASKED} s ago: {answer} (truth: {thing.color})"
            )
    print(f"{right} of {asked} right; {session!r}")
