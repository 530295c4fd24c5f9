"""Findings and how they are shown: the one page, the one Markdown writer, the one plotting library."""
