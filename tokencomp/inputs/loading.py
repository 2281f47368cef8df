"""Loading a model and its processor by name, path or hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tokencomp.errors import OptionError, UnsupportedModelError, missing_package
from tokencomp.inputs.packaged import DEFAULT_MODEL, available_models, resolve
from tokencomp.inputs.pixels import limit_image_tokens

DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(device: str = "auto") -> str:
    """ "auto" is CUDA if available, else the CPU.

    Under `accelerate launch` every process gets one GPU, and `--cpu` is respected.
    """
    if device != "auto":
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise OptionError(f"device {device!r}: torch finds no CUDA GPU. Use device 'cpu'.")
        return device
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """ "auto" is bfloat16 on CUDA and float32 on the CPU."""
    if dtype not in DTYPES:
        raise OptionError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}.")
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return getattr(torch, dtype)


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
    image_max_tokens: int | None = None,
) -> tuple[Any, Any]:
    """Model in eval mode, and its processor.

    Parameters
    ----------
    name
        An embedded model, a local folder, or a hub id.
    device, dtype
        "auto", or a torch device; "auto", "float32", "bfloat16", "float16".
    attention
        Attention backend; None leaves the choice to transformers.
    image_max_tokens
        Bound on the tokens of an image, see `tokencomp.inputs.pixels.limit_image_tokens`.

    Raises
    ------
    UnsupportedModelError
        Nothing loadable has that name, no adapter serves it, or its processor has no such bound.
    """
    from tokencomp.adapters.registry import adapter_for

    path = resolve(name)
    device = pick_device(device)
    torch_dtype = pick_dtype(dtype, device)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        model, processor = load_folder(path, torch_dtype, **_from_cache(path), **options)
    except (OSError, ValueError, KeyError) as error:
        first_line, *_ = str(error).strip().splitlines() or [""]
        raise UnsupportedModelError(
            f"{name!r} cannot be loaded as a multimodal model: {first_line} "
            f"Give an embedded model ({', '.join(available_models()) or 'none is installed'}), a "
            "folder in the Hugging Face layout, or the id of a hub model that can be reached."
        ) from error
    adapter_for(model)
    if image_max_tokens is not None:
        processor = limit_image_tokens(processor, image_max_tokens)
    return model.to(device), processor


def _from_cache(path: str) -> dict[str, bool]:
    """Options for a hub id while the hub cannot be reached; without them every file is tried for
    half a minute.
    """
    from huggingface_hub import HfApi, constants

    if Path(path).exists() or constants.HF_HUB_OFFLINE:
        return {}
    try:
        HfApi().model_info(path, timeout=10)
    except Exception as error:  # of the HTTP library, by release of the hub: httpx or requests
        if "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:
            return {"local_files_only": True}
    return {}


def load_folder(path: str, dtype: torch.dtype | None = None, **options: Any) -> tuple[Any, Any]:
    """Model in eval mode on the CPU, and its processor, by the auto classes of transformers.

    The path is a folder in the Hugging Face layout, or a hub id; the dtype is float32 if it is
    None. Options go to `from_pretrained` of the model; `local_files_only=True` also to the
    config's and the processor's.
    """
    try:
        import PIL  # noqa: F401
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from None
    import transformers
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from tokencomp.models import register_auto_classes

    register_auto_classes()  # architectures that transformers lacks
    # The config comes first: its errors name the path, those of processors do not.
    local = {"local_files_only": options.get("local_files_only", False)}
    config = AutoConfig.from_pretrained(path, **local)
    processor = AutoProcessor.from_pretrained(path, **local)
    dtype = torch.float32 if dtype is None else dtype
    images = AutoModelForImageTextToText
    kinds = (images, getattr(transformers, "AutoModelForMultimodalLM", images))  # listens
    kind = next((k for k in kinds if type(config) in k._model_mapping), images)
    model = kind.from_pretrained(path, dtype=dtype, **options)
    return model.eval(), processor
