"""An answer that is decoded token by token equals the one that is decoded at once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
import tokenizers
from transformers import PreTrainedTokenizerFast

from tokencomp.serving.hf.text import AnswerText, token_bytes

TEXTS = ("Grüße: 東京 and 🙂🙃, e\u0301 …", "a b  c\n\n\td", "\ud55c\uae00" * 30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of bytes and a few words, so that characters take several tokens."""
    from recipes.tiny.tokenizer import load_tokenizer, write_tokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "")
    return load_tokenizer(folder)


def answers(tokenizer: Any) -> list[list[int]]:
    """Return token sequences of texts, of random tokens, and of characters that are cut off."""
    chance = random.Random(0)
    result = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    result += [[chance.randrange(len(tokenizer)) for _ in range(60)] for _ in range(40)]
    return result + [tokens[:-1] for tokens in result[:3]] + [[]]


def test_pieces_are_the_whole(tokenizer: Any) -> None:
    for tokens in answers(tokenizer):
        answer = AnswerText(tokenizer)
        pieces = [answer.add(token) for token in tokens]
        assert "".join([*pieces, answer.finish()]) == tokenizer.decode(
            tokens, skip_special_tokens=True
        )
        assert not answer.stopped


def test_stop_texts_cut_where_a_search_of_the_whole_text_finds_them(tokenizer: Any) -> None:
    chance = random.Random(1)
    for tokens in answers(tokenizer)[:20]:
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        start = chance.randrange(len(whole))
        stops = [whole[start : start + 3], "no such text", whole[start] + "never"]
        answer, text = AnswerText(tokenizer, stops), ""
        for token in tokens:
            text += answer.add(token)
            assert whole.startswith(text) and len(text) <= whole.index(stops[0])
            if answer.stopped:
                break
        assert text + answer.finish() == whole[: whole.index(stops[0])]


def test_bytes_of_tokens_are_those_of_the_text(tokenizer: Any) -> None:
    """Also of parts of characters, which have no text."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    bare = tokenizers.Tokenizer(model)
    bare.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    fallback = PreTrainedTokenizerFast(tokenizer_object=bare)
    for reader in (tokenizer, fallback):
        for text in (*TEXTS, "aaa"):
            tokens = reader.encode(text, add_special_tokens=False)
            parts = [token_bytes(reader, token, reader.decode([token])) for token in tokens]
            assert b"".join(parts) == reader.decode(tokens).encode()


def test_of_two_stop_texts_in_one_token_the_first_one_ends_the_answer() -> None:
    class Words:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(["one ", "two, three. four"][token] for token in tokens)

    answer = AnswerText(Words(), ["three", "two"])
    assert answer.add(0) + answer.add(1) + answer.finish() == "one " and answer.stopped
