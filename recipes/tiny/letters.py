"""Option letters without a picture: find a word among the options and say its letter.

Choosing a letter is looking a word up in the prompt, which pictures with a few answers each teach
badly. `dense_options` asks for every option of a block, so one short sequence holds many labels.
"""

from __future__ import annotations

import numpy as np

from recipes.packing import Packer
from tokencomp.engine.prompt import IGNORED
from tokencomp.zoo.shapesqa.lettering import WORDS
from tokencomp.zoo.shapesqa.prompt_forms import LETTERS, letter, mlvu_prompt, mvbench_prompt
from tokencomp.zoo.shapesqa.questions import Question
from tokencomp.zoo.shapesqa.scenes import COLORS, DIRECTIONS, SHAPES


def letters_prompt(question: Question) -> str:
    """Multiple choice in the form most image benchmarks use."""
    lines = "".join(f"\n{LETTERS[i]}. {option}" for i, option in enumerate(question.options))
    tail = "\nAnswer with the option's letter from the given choices directly."
    return question.text + lines + tail


FORMS = (mvbench_prompt, mlvu_prompt, letters_prompt)
_POOLS: tuple[tuple[str, ...], ...] = (
    COLORS,
    SHAPES,
    tuple(DIRECTIONS),
    tuple("0123456789"),
    ("yes", "no"),
    ("above", "below"),
    ("left", "right"),
    ("top", "bottom"),
    ("before", "after"),
)
_EVERY = tuple(dict.fromkeys([word for pool in _POOLS for word in pool] + [*WORDS]))
_NUMBERS = 1 / 3  # share of blocks whose options are numbers of two digits

Segment = tuple[list[int], list[int]]


def _near_numbers(rng: np.random.Generator) -> tuple[str, ...]:
    """A number of two digits, then numbers that share one digit with it, as in a question.

    One digit is then not enough to tell the options apart.
    """
    number = str(rng.integers(10, 100))
    near = [str(n) for n in range(10, 100) if len({*str(n)} & {*number}) == 1 and str(n) != number]
    return (number, *(str(other) for other in rng.permutation(near)[:4]))


def dense_options(packer: Packer, rng: np.random.Generator) -> Segment:
    """A block of two to five options, then every one of them, each labelled with its letter.

    The label stands on the word itself; a comma follows, whatever the letter was, so no letter is
    ever read from the sequence.
    """
    if rng.random() < _NUMBERS:
        pool = _near_numbers(rng)
    else:
        pool = _EVERY if rng.random() < 0.6 else _POOLS[int(rng.integers(4))]
    options = [str(word) for word in rng.permutation(pool)[: int(rng.integers(2, 6))]]
    style = ("\n({}) {}", "\n{}. {}")[int(rng.integers(2))]
    block = "".join(style.format(LETTERS[i], word) for i, word in enumerate(options)) + "\n"
    tokens = packer.ids(block)
    labels = [IGNORED] * len(tokens)
    (comma,) = packer.ids(",")
    for i in rng.permutation(len(options)):
        word = packer.ids(" " + options[i])
        tokens += [*word, comma]
        labels += [IGNORED] * len(word) + packer.ids(LETTERS[i])
    return tokens, labels


def whole_form(packer: Packer, rng: np.random.Generator) -> Segment:
    """A benchmark's whole prompt whose question is the answer itself, labelled with its letter."""
    if rng.random() < _NUMBERS:
        pool = _near_numbers(rng)[:4]
    else:
        pool = _POOLS[int(rng.integers(len(_POOLS)))] if rng.random() < 0.7 else _EVERY
    options = tuple(str(word) for word in rng.permutation(pool)[:4])
    answer = options[int(rng.integers(len(options)))]
    question = Question("match", " " + answer, answer, options)
    form = FORMS[int(rng.integers(len(FORMS)))]
    return packer.pair(form(question), letter(question))
