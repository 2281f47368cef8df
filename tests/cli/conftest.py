from support.embedded import examples, folder, loaded

__all__ = ["examples", "folder", "loaded"]
