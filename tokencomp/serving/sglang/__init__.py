"""The SGLang plugin (docs/engines.md). **No SGLang engine has been run with it by us.**

The entry point `sglang.srt.plugins: tokencomp` calls `register` in every process of SGLang. Without
`TOKENCOMP_SERVING` in the environment it does nothing. With it, hooks of SGLang's own registry wrap
one method of the processor and the function that embeds media, and the engine stays as it is:

1. `processing`: the main process shortens the placeholders of an item to the number that the plan
   keeps. The plan is part of the item's hash, so radix and embedding caches never mix ratios.
2. `embedding`: the worker reduces the rows of the vision tower. Each kept row carries the (t, h, w)
   offsets of its original position as digits in further columns, which travel as one more level of
   SGLang's deepstack features and are added to the positions before the decoder runs.
"""

from __future__ import annotations

import os
import pkgutil

from tokencomp.errors import TokenCompError
from tokencomp.serving import ENV_OPTIONS, ENV_UNTESTED

TESTED_VERSIONS = ("0.5.23",)
PROCESSOR = "sglang.srt.multimodal.processors.qwen_vl.QwenVLImageProcessor.process_mm_data_async"
ROUTINES = tuple(
    f"sglang.srt.models.{name}.general_mm_embed_routine"
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
)


def register() -> None:
    """Register the hooks; raises `SystemExit`, as SGLang would only log other errors."""
    if not os.environ.get(ENV_OPTIONS):
        return
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from tokencomp.serving.sglang.embedding import around_routine
    from tokencomp.serving.sglang.processing import around_processor, server_options

    try:
        server_options()
    except TokenCompError as error:
        raise SystemExit(f"tokencomp: {ENV_OPTIONS}: {error}") from error
    if sglang.__version__ not in TESTED_VERSIONS and os.environ.get(ENV_UNTESTED) != "1":
        raise SystemExit(
            f"tokencomp cannot compress in SGLang {sglang.__version__} (tested: "
            f"{', '.join(TESTED_VERSIONS)}). Set {ENV_UNTESTED}=1 to try it, or unset "
            f"{ENV_OPTIONS}."
        )
    hooks = {PROCESSOR: around_processor}
    hooks.update(dict.fromkeys(ROUTINES, around_routine))
    for target, hook in hooks.items():
        try:
            pkgutil.resolve_name(target)  # SGLang would only log that a target does not exist
        except (ImportError, AttributeError) as error:
            raise SystemExit(f"tokencomp: SGLang has no {target} ({error}).") from error
        HookRegistry.register(target, hook, HookType.AROUND)
