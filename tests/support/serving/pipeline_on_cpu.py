"""Makes pipelines run in vLLM's build for CPUs, as `worker_extension_cls` of an engine.

Its runner never makes the buffer in which a later stage receives rows: elsewhere a dummy run does
so before the first request.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class Extension:
    """Of vLLM's worker; importing it is what matters."""


def _loading(stock: Any) -> Any:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if not get_pp_group().is_first_rank:
            self.intermediate_tensors = self.get_model().make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    return load_model


CPUModelRunner.load_model = _loading(CPUModelRunner.load_model)
