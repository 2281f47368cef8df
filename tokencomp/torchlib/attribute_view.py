"""Stand-ins for an object, in which some attributes have other values."""

from __future__ import annotations

from typing import Any


class AttributeView:
    """A stand-in for `original`, in which some attributes have other values.

    An attention module chooses its backend by its config, and a backend reads the module's config.
    A view of the config or of the module changes a value for both, and leaves the original as
    it is.

    Parameters
    ----------
    original
        The object whose other attributes are read.
    **attributes
        Attributes with values of their own.
    """

    def __init__(self, original: Any, **attributes: Any) -> None:
        self.tokencomp_original = original
        for name, value in attributes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokencomp_original"], name)
