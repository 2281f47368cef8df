"""The one error type of the kernels."""


class KernelError(ValueError):
    """A kernel was given something it cannot handle.

    The message says what was given, what is allowed and how to fix it.
    """
