"""Compiled code: optional, with a torch fallback."""
