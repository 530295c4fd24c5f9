"""Compiled code: optional, and never the only way to a result."""
