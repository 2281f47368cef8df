"""The tokenizer of the tiny models: byte-level BPE in Qwen2's own form, trained on ShapesQA text.

Byte fallback means that any user text tokenises and round-trips; every ShapesQA word is one token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokencomp.zoo.shapesqa.prompt_forms import LETTERS
from tokencomp.zoo.shapesqa.questions import COLORS, DIRECTIONS, PLURALS, SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FREE_FORM_SUFFIX = "\nAnswer the question using a single word or phrase."
SYSTEM = "You are a helpful assistant."
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
    "<video>",
)
# Contractions, words with one leading character, single digits, punctuation, line ends, spaces:
# the split that Qwen2's tokenizer class applies by itself when it is loaded.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    """Text in which every word that ShapesQA uses occurs, with and without a leading space."""
    words = [*SHAPES, *COLORS, *PLURALS.values(), *DIRECTIONS, *LETTERS, *"0123456789"]
    words += ["yes", "no", "left", "right", "above", "below", "top", "bottom", "before", "after"]
    words += ["Yes", "No", "image", "video", "picture", "frame", "object", "objects", "system"]
    words += ["user", "assistant", "describe", "Describe", "the", "this", "what", "who", "and"]
    texts = [form for word in words for form in (word, f" {word}", f"({word}", f"\n({word})")]
    texts += [
        SYSTEM,
        FREE_FORM_SUFFIX,
        "\nOnly give the best option.\nBest option: (",
        "Question:What\nOption:\n(A) red\n(B) blue\nOnly give the best option.\n",
        "\nA. red\nAnswer with the option's letter from the given choices directly.",
        "What color is the small circle? What shape is the red object?",
        "Is there a red circle in the video? Is there an orange star?",
        "How many objects are there? How many times does the circle flash?",
        "Is the circle in the left or right half of the image? top or bottom half",
        "Is the circle to the left or right of the square? above or below the ring?",
        "Does the circle appear before or after the square?",
        "Which shape appears first, circle or square? Which color appears last, red or blue?",
        "Which direction does the circle move?",
    ]
    return texts


def train_tokenizer(special: tuple[str, ...] = SPECIAL_TOKENS, texts: tuple[str, ...] = ()):
    """Train the BPE on the corpus and ``texts``; returns a ``tokenizers.Tokenizer``.

    Deterministic, takes milliseconds.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre
    from tokenizers.processors import ByteLevel

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(_SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus(), *texts], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    return tokenizer


def write_tokenizer(
    folder: Path,
    chat_template: str,
    special: tuple[str, ...] = SPECIAL_TOKENS,
    texts: tuple[str, ...] = (),
    names: dict[str, str] | None = None,
) -> None:
    """Write the files of a Qwen2 tokenizer: tokenizer.json, vocab.json, merges.txt and config.

    ``names`` are special tokens that a processor looks up as attributes of the tokenizer.
    """
    backend = train_tokenizer(special, texts)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))
    added = {
        str(backend.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in special
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(special[1:]),
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if names:
        config["extra_special_tokens"] = names
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder`` as any user of transformers gets it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
