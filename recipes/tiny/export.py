"""Writes a trained tiny model as a standard Hugging Face folder."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.tiny.families.parts import Family
from recipes.tiny.tokenizer import load_tokenizer
from tokencomp.storage import write_json, write_text

if TYPE_CHECKING:
    import torch


def export(model: torch.nn.Module, family: Family, folder: Path) -> Path:
    """Write config, fp16 weights, tokenizer, processor and chat template into ``folder``.

    The configuration files are written in the oldest form that every supported transformers
    version, vLLM and lmms-eval still read, whatever version runs the training.
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    text = folder / family.text_folder
    family.write_tokenizer(text)
    tokenizer = load_tokenizer(text)
    for name, value in family.files(tokenizer).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, value)
    write_text(text / "chat_template.jinja", family.chat_template)
    generation = {
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": [
            tokenizer.convert_tokens_to_ids("<|im_end|>"),
            tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        ],
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "do_sample": False,
    }
    write_json(text / "generation_config.json", generation)
    parts: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in model.state_dict().items():
        part, _, published = family.weight_name(name).rpartition("/")
        parts[part][published] = tensor.detach().to(torch.float16).contiguous()
    for part, weights in parts.items():
        save_file(weights, folder / part / "model.safetensors", metadata={"format": "pt"})
    return folder
