"""Hooks of torch modules, which run between the graphs of compiled models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import Installed

Needed = Callable[[nn.Module, Any, Any], bool]


def forget_compiled() -> None:
    """Make Dynamo compile calls of modules again.

    Dynamo does not notice that hooks were added or removed after compilation. Code of torch itself
    is kept, such as compiled flex attention, except for `nn.Module.__call__`.
    """
    from torch._dynamo import convert_frame, reset_code

    own, calls = str(Path(torch.__file__).parent), nn.Module.__call__.__code__.co_filename
    for reference in convert_frame.input_codes.seen + convert_frame.output_codes.seen:
        code = reference()
        if code is not None and (code.co_filename == calls or own not in code.co_filename):
            reset_code(code)


class Hooked(Installed):
    """Base of classes that install hooks and method replacements, and remove them together."""

    def _before(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        traced: Needed | None = None,
        **options: Any,
    ) -> None:
        """Call `run(module, args, kwargs)` before calls of a module, outside of compiled graphs.

        It returns new args and kwargs, or None. While Dynamo traces the call, `traced` is called
        with the same arguments: if it returns False, `run` is skipped and the graph continues.
        """
        hook = functools.partial(self._run_hook, 1, traced, compat.not_compiled(run))
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, **options))

    def _after(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        traced: Needed | None = None,
        **options: Any,
    ) -> None:
        """Like `_before`, but after the call: `run(module, args, kwargs, out)` returns a new
        output.
        """
        hook = functools.partial(self._run_hook, 2, traced, compat.not_compiled(run))
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, **options))

    def _run_hook(
        self,
        count: int,
        traced: Needed | None,
        run: Callable[..., Any],
        module: nn.Module,
        args: Any,
        *rest: Any,
    ) -> Any:
        """The hook that torch calls. `rest` holds `count` values: keyword arguments, and perhaps
        the output.

        It is a method, so that pickle comes to the owner first, which refuses to be copied.
        """
        # If another thread adds or removes hooks at this moment, torch can call a hook without
        # keyword arguments. The call of this thread does not need the hook then.
        if len(rest) < count:
            return None
        if traced is None or not torch.compiler.is_compiling() or traced(module, args, rest[0]):
            return run(module, args, *rest)
        return None
