"""Questions about clips, derived from the names and times of their sounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from recipes.sounds.scenes import COUNTS, NAMES, SECONDS, Clip, Sound
from tokencomp.zoo.shapesqa.questions import Question, draw_options

NUMBERS = ("one", "two", "three", "four", "five", "six")
ORDER = ("first", "second", "third", "fourth", "fifth", "sixth")
LONGER = 1.4  # times by which the longest sound is longer than the next

Asker = Callable[[Clip, np.random.Generator], Question | None]


def named(family: str, text: str, answer: str, clip: Clip, rng: np.random.Generator) -> Question:
    """A question whose answer is a name; the other sounds of the clip are options first."""
    others = [*dict.fromkeys(s.name for s in clip.sounds if s.name != answer)]
    absent = [str(n) for n in rng.permutation(NAMES) if n != answer and n not in others]
    return Question(family, text, answer, draw_options(answer, (*others, *absent)[:3], rng))


def single(clip: Clip) -> list[Sound]:
    """Sounds whose name occurs once: a question can speak of "the bell"."""
    often = Counter(s.name for s in clip.sounds)
    return [s for s in clip.sounds if often[s.name] == 1]


def existence(clip: Clip, rng: np.random.Generator) -> Question | None:
    """Is there an X? Half yes."""
    present = [*dict.fromkeys(s.name for s in clip.sounds)]
    absent = [n for n in NAMES if n not in present]
    is_present = bool(rng.random() < 0.5)
    name = str(rng.choice(present if is_present else absent))
    order = ("yes", "no") if rng.random() < 0.5 else ("no", "yes")
    return Question("existence", f"Is there a {name}?", "yes" if is_present else "no", order)


def count(clip: Clip, rng: np.random.Generator) -> Question | None:
    """How many sounds are there?"""
    numbers = NUMBERS[COUNTS[0] - 1 : COUNTS[1]]
    return Question("count", "How many sounds are there?", NUMBERS[len(clip.sounds) - 1], numbers)


def place(clip: Clip, rng: np.random.Generator) -> Question | None:
    """Which sound is first, second, last…?"""
    at = int(rng.integers(len(clip.sounds)))
    word = "last" if at == len(clip.sounds) - 1 else ORDER[at]
    return named("place", f"Which sound is {word}?", clip.sounds[at].name, clip, rng)


def after(clip: Clip, rng: np.random.Generator) -> Question | None:
    """Which sound comes after the X?"""
    known = [s for s in single(clip) if s is not clip.sounds[-1]]
    if not known:
        return None
    sound = known[int(rng.integers(len(known)))]
    following = clip.sounds[clip.sounds.index(sound) + 1]
    return named("after", f"Which sound comes after the {sound.name}?", following.name, clip, rng)


def half(clip: Clip, rng: np.random.Generator) -> Question | None:
    """In which half of the clip is the X?"""
    known = [s for s in single(clip) if s.end < SECONDS / 2 or s.start > SECONDS / 2]
    if not known:
        return None
    sound = known[int(rng.integers(len(known)))]
    answer = "first" if sound.end < SECONDS / 2 else "second"
    order = ("first", "second") if rng.random() < 0.5 else ("second", "first")
    return Question("half", f"Is the {sound.name} in the first or second half?", answer, order)


def longest(clip: Clip, rng: np.random.Generator) -> Question | None:
    """Which sound is the longest?"""
    longest, second = sorted(clip.sounds, key=lambda s: -s.length)[:2]
    if longest.length < LONGER * second.length:
        return None
    return named("longest", "Which sound is the longest?", longest.name, clip, rng)


FAMILIES: dict[str, Asker] = {
    ask.__name__: ask for ask in (existence, count, place, after, half, longest)
}


def primers(clip: Clip) -> list[tuple[str, str, str]]:
    """One-hop pairs (name, key, value): of what the decoder is to build its answers."""
    out = [("primer place", f"{ORDER[k]}:", f" {s.name}") for k, s in enumerate(clip.sounds)]
    out.append(("primer count", "sounds:", f" {NUMBERS[len(clip.sounds) - 1]}"))
    for sound in single(clip):
        at = clip.sounds.index(sound)
        out.append(("primer number", f"{sound.name}:", f" {ORDER[at]}"))
    return out
