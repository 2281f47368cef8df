"""Clicks on pages of MiniWoB++."""
