from embedded_support import examples, folder, loaded

__all__ = ["examples", "folder", "loaded"]
