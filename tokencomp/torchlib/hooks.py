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
    """Let Dynamo compile calls of modules anew.

    It does not look whether hooks have come or gone since it compiled a call, so that code compiled
    before would run without new hooks, and with old ones. Functions of torch that are compiled
    by themselves, such as flex attention, are left alone.
    """
    from torch._dynamo import convert_frame, reset_code

    own, calls = str(Path(torch.__file__).parent), nn.Module.__call__.__code__.co_filename
    for reference in convert_frame.input_codes.seen + convert_frame.output_codes.seen:
        code = reference()
        if code is not None and (code.co_filename == calls or own not in code.co_filename):
            reset_code(code)


class Hooked(Installed):
    """Something that installs hooks, and perhaps method replacements, and removes them together."""

    def _before(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        needed: Needed | None = None,
        traced: Needed | None = None,
        **options: Any,
    ) -> None:
        """Call `run` before the calls of a module that need it.

        Parameters
        ----------
        run
            Called as `run(module, args, kwargs)`, between the graphs of a compiled model; gives new
            args and kwargs, or None.
        needed
            Called in the same way: whether there is anything to do; None: always. Dynamo traces it.
        traced
            Asked in its place while Dynamo traces the call.
        """
        hook = functools.partial(_hook, 1, needed, traced or needed, compat.not_compiled(run))
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, **options))

    def _after(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        needed: Needed | None = None,
        traced: Needed | None = None,
        **options: Any,
    ) -> None:
        """Like `_before`, after the calls: `run(module, args, kwargs, out)` gives a new output."""
        hook = functools.partial(_hook, 2, needed, traced or needed, compat.not_compiled(run))
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, **options))


def _hook(
    count: int,
    needed: Needed | None,
    traced: Needed | None,
    run: Callable[..., Any],
    module: nn.Module,
    args: Any,
    *rest: Any,
) -> Any:
    """What torch calls: `rest` are `count` values, keyword arguments and perhaps the output."""
    # A thread may reach a module just while another one installs or removes its hooks. torch then
    # calls a hook without keyword arguments, and the thread's own call does not need it.
    if len(rest) < count:
        return None
    asked = traced if torch.compiler.is_compiling() else needed
    if asked is not None and not asked(module, args, rest[0]):
        return None
    return run(module, args, *rest)
