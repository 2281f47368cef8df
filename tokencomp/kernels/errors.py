"""The single error type that the kernels raise."""


class KernelError(ValueError):
    """An argument of a kernel is outside of what the kernel supports.

    The message says what was given, what is allowed and how to fix it.
    """
