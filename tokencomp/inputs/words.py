"""Words of answers, as they are compared."""

from __future__ import annotations

import re
import unicodedata


def plain_words(text: str) -> str:
    """The words in small letters, with the minus of numbers; a text without any is unchanged.

    Letters with accents are the same composed and decomposed (NFC, as NFKC takes 10² for 102).
    """
    text = unicodedata.normalize("NFC", text.lower())
    text = re.sub(r"(?<!\w)[-−–](?=[^\w\s]?\d)", "minus ", text)
    text = re.sub(r"[\ufe0e\ufe0f]", "", text)  # whether a sign is an emoji
    # Combining marks stay: accents, and vowel signs of Hindi or Thai.
    marks = ("Mn", "Mc")
    words = re.sub(r"\W", lambda c: c[0] if unicodedata.category(c[0]) in marks else " ", text)
    return " ".join(words.split()) or text.strip()
