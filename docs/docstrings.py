"""Docstrings as TRL writes them, for mkdocstrings: [`~module.Name`] is a name, types have no marks, math has single backslashes."""

import re

import griffe


class TRLDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            text = re.sub(r"\[`~(?:[\w.]*\.)?(\w+)`\](?!\()", r"`\1`", obj.docstring.value)
            text = re.sub(r"\[(`[^`\]]+`)\](?![(\[])", r"\1", text)
            text = re.sub(r"^( +[\w, ]+) \((`.+)\):", self._type, text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"\\\\([()])", r"\\\1", text)

    @staticmethod
    def _type(found: re.Match) -> str:
        kinds = re.split(r",? \*optional\*", found[2])[0]  # the default is in the signature
        return f"{found[1]} ({re.sub('[`~]', '', kinds)}):"
