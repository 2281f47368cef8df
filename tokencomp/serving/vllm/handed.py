"""Methods of requests, from the middleware to the processor in the same process.

The middleware resolves the options of a request, and writes the whole method where the processor of
vLLM reads options. The processor finds the method here by that text, and resolves nothing again.
"""

from __future__ import annotations

import json

from tokencomp.method import Method

MOST = 4096  # more than the requests that run or wait
_methods: dict[str, Method] = {}


def hand_on(method: Method) -> None:
    """Remember the method of a request. Called in one thread, `handed` in any."""
    text = json.dumps(method.plain, sort_keys=True)
    _methods.pop(text, None)
    _methods[text] = method
    while len(_methods) > MOST:
        del _methods[next(iter(_methods))]


def handed(text: str) -> Method | None:
    """The method of a request with these options, as JSON with sorted keys; None: resolve them."""
    return _methods.get(text)
