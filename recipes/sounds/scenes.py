"""Clips of eight seconds in which up to six sounds follow one another before faint noise.

A clip is a pure function of a random generator; sounds never overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RATE = 16_000  # samples per second
SECONDS = 8.0
GAP = 0.2  # s, at least, before, between and after sounds
COUNTS = (2, 6)
LENGTHS = (0.15, 1.3)  # s
FADE = 0.01  # s, so that sounds neither begin nor end with a click

Tone = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def beep(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    return np.sin(2 * np.pi * pitch * t)


def buzz(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A saw tooth: all harmonics."""
    return 2 * ((pitch / 3 * t) % 1) - 1


def siren(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A pitch that goes up and down."""
    speed = rng.uniform(5, 9)  # swings per second
    return np.sin(2 * np.pi * pitch * t + 0.25 * pitch / speed * np.sin(2 * np.pi * speed * t))


def chirp(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A pitch that rises by two octaves."""
    length = t[-1] + 1 / RATE
    return np.sin(2 * np.pi * 0.5 * pitch * (t + 1.5 * t**2 / length))


def hiss(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.35, len(t))


def rattle(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Clicks, twelve to eighteen in a second."""
    beat = (t * rng.uniform(12, 18)) % 1
    return np.exp(-beat * 25) * rng.normal(0, 0.7, len(t))


def bell(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Partials that are no harmonics, and fade away."""
    partials = (1.0, 2.76, 5.4)
    return sum(np.sin(2 * np.pi * pitch * p * t) * np.exp(-2 * p * t) / p for p in partials)


def hum(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A low chord."""
    return sum(np.sin(2 * np.pi * pitch / 6 * ratio * t) for ratio in (1.0, 1.25, 1.5)) / 3


TONES: dict[str, Tone] = {
    tone.__name__: tone for tone in (beep, buzz, siren, chirp, hiss, rattle, bell, hum)
}
NAMES = tuple(TONES)


@dataclass(frozen=True)
class Sound:
    """One sound of a clip: its name, and when it begins and ends, in seconds."""

    name: str
    start: float
    end: float
    pitch: float
    level: float

    @property
    def length(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Clip:
    """Sounds in order of time; `noise` seeds all that is random in the samples."""

    sounds: tuple[Sound, ...]
    noise: int


def sample(rng: np.random.Generator) -> Clip:
    """A random clip."""
    count = int(rng.integers(COUNTS[0], COUNTS[1] + 1))
    silence = GAP * (count + 1)
    while True:
        lengths = np.exp(rng.uniform(*np.log(LENGTHS), count))
        if lengths.sum() + silence < SECONDS:
            break
    gaps = GAP + rng.dirichlet(np.ones(count + 1)) * (SECONDS - silence - lengths.sum())
    ends = np.cumsum(gaps[:-1] + lengths)
    sounds = tuple(
        Sound(
            str(rng.choice(NAMES)),
            float(end - length),
            float(end),
            float(np.exp(rng.uniform(*np.log((400, 1100))))),
            float(rng.uniform(0.3, 0.9)),
        )
        for end, length in zip(ends, lengths, strict=True)
    )
    return Clip(sounds, int(rng.integers(2**31)))


def render(clip: Clip) -> np.ndarray:
    """float32 samples (RATE × SECONDS,) in about [-1, 1]."""
    rng = np.random.default_rng(clip.noise)
    out = rng.normal(0, np.exp(rng.uniform(*np.log((0.001, 0.01)))), int(RATE * SECONDS))
    for sound in clip.sounds:
        start, count = int(sound.start * RATE), int(sound.length * RATE)
        t = np.arange(count) / RATE
        fade = np.minimum(1, np.minimum(t, t[::-1]) / FADE)
        out[start : start + count] += sound.level * fade * TONES[sound.name](t, sound.pitch, rng)
    return out.astype(np.float32)


def cell_names(clip: Clip, tokens: int) -> list[str]:
    """What each of as many equal stretches of the clip holds at its middle; "" for silence."""
    names = [""] * tokens
    for k in range(tokens):
        middle = (k + 0.5) * SECONDS / tokens
        for sound in clip.sounds:
            if sound.start <= middle < sound.end:
                names[k] = sound.name
    return names
