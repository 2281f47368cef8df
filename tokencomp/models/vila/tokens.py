"""The tokenizer of VILA: media tokens, separators and conversation formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokencomp.errors import CheckpointError

IMAGE, VIDEO = "<image>", "<vila/video>"

# Conversation formats of checkpoints whose tokenizer has no template of its own.
_CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + "SYSTEM<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "vicuna_v1": (
        "{% if messages[0]['role'] != 'system' %}A chat between a curious user and an artificial "
        "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
        "user's questions.{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %} USER: {{ m['content'] }}"
        "{% elif m['role'] == 'assistant' %} ASSISTANT: {{ m['content'] }}</s>"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    ),
    "llama_3": (
        "{% if messages[0]['role'] != 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural "
        "language.<|eot_id|>{% endif %}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "hermes_2": _CHATML.replace("SYSTEM", "Answer the questions."),
    "chatml": _CHATML.replace("SYSTEM", "You are a helpful assistant"),
}


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of `folder/llm`, which pads on the left.

    `<image>` and `<vila/video>` are added if they are missing, as in checkpoints older than NVILA.
    The new ids lie past the end of the embedding table, which is safe because the model replaces
    them before any look-up.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "llm", padding_side="left")
    missing = [token for token in (IMAGE, VIDEO) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_ids(tokenizer: Any, encoder: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the ids of an encoder's start and end tokens without a beginning-of-sequence token."""

    def ids(text: str | None) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids if text else []

    return ids(encoder["start_tokens"]), ids(encoder["end_tokens"])


def chat_template(tokenizer: Any, name: str | None, folder: Path | None = None) -> str | None:
    """Return the conversation format as a jinja template.

    `name` is a key of ``TEMPLATES``, the stem of a `.jinja` file in `folder`, or a template itself.
    Without a name the format of the tokenizer is returned, which may be None.
    """
    if name is None:
        return tokenizer.chat_template
    if name in TEMPLATES:
        return TEMPLATES[name]
    file = None if folder is None else folder / f"{name}.jinja"
    if file is not None and file.is_file():
        return file.read_text(encoding="utf-8").replace("    ", "").replace("\n", "")
    if "{%" in name or "{{" in name:
        return name
    raise CheckpointError(
        f"chat_template={name!r}: unknown. Known: {', '.join(TEMPLATES)}, or put {name}.jinja "
        "into the folder."
    )
