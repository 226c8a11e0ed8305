"""Docstrings as TRL writes them, for mkdocstrings: [`~module.Name`] is a name, and math has single backslashes."""

import re

import griffe


class TRLDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            text = re.sub(r"\[`~(?:[\w.]*\.)?(\w+)`\](?!\()", r"`\1`", obj.docstring.value)
            text = re.sub(r"\[(`[^`\]]+`)\](?![(\[])", r"\1", text)
            obj.docstring.value = re.sub(r"\\\\([()])", r"\\\1", text)
