"""Views of an object that show some of its attributes with other values."""

from __future__ import annotations

from typing import Any


class AttributeView:
    """Reads as `original`, apart from the attributes that it has itself.

    An attention module chooses its backend by its config, and a backend reads the module's config.
    A view of either lets both see another value, and the original does not change.

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
