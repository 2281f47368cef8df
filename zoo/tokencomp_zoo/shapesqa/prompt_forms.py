"""Prompts of ShapesQA questions: in words, and as multiple choice in the forms of benchmarks."""

from __future__ import annotations

from tokencomp.zoo.shapesqa.questions import Question

LETTERS = "ABCDE"


def letter(question: Question) -> str:
    """Letter of the right option."""
    return LETTERS[question.options.index(question.answer)]


def mvbench_prompt(question: Question) -> str:
    """Multiple choice as lmms-eval's ``mvbench`` tasks put it."""
    lines = "".join(f"({LETTERS[i]}) {option}\n" for i, option in enumerate(question.options))
    return f"Question:{question.text}\nOption:\n{lines}Only give the best option.\n"


def mlvu_question(question: Question) -> str:
    """Question text with options as MLVU files hold it."""
    lines = "".join(f"\n({LETTERS[i]}) {option}" for i, option in enumerate(question.options))
    return question.text + lines


def mlvu_prompt(question: Question) -> str:
    """Multiple choice as lmms-eval's ``mlvu_dev`` task puts it."""
    return mlvu_question(question) + "\nOnly give the best option.\nBest option: ("
