"""Findings and their presentation: one page, one Markdown writer, one plotting library."""
