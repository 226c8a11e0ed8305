"""What the configs share: one description of each argument, and errors that say what would work."""

import inspect
import numbers
import re
from dataclasses import fields, is_dataclass
from types import MappingProxyType, UnionType
from typing import Any, Union, get_args, get_origin


def described(config_class: type) -> type:
    """Class decorator, outside `dataclass`: what the docstring says of an argument is its help on the command line too."""
    entries = re.findall(r"^ {4}(\w+) \(.+\):\n((?: {8}.*\n|\n)+)", (inspect.getdoc(config_class) or "") + "\n", re.M)
    helps = {name: re.sub(r"\[`~?(.+?)`\]", r"`\1`", " ".join(text.split())) for name, text in entries}
    for field in fields(config_class):
        if field.name in helps:
            field.metadata = MappingProxyType({**field.metadata, "help": helps[field.name]})
    return config_class


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what an annotation such as `list[float] | None` says; whole numbers are floats too."""
    if get_origin(annotation) is list:
        return isinstance(value, list | tuple) and all(_fits(entry, get_args(annotation)[0]) for entry in value)
    if get_origin(annotation) in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(annotation))
    if annotation in (int, float):
        number = numbers.Integral if annotation is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return not isinstance(annotation, type) or isinstance(value, annotation)


class Arguments:
    """Parent of the configs, before that of TRL or transformers."""

    @classmethod
    def _own_fields(cls) -> dict[str, Any]:
        """The fields that are declared in flow_trl and below, new or with other defaults: their annotations."""
        return {
            name: annotation
            for base in reversed(cls.__mro__)
            if issubclass(base, Arguments)
            for name, annotation in inspect.get_annotations(base, eval_str=True).items()
        }

    def _check(self, name: str, condition: bool, remedy: str) -> None:
        if not condition:
            raise ValueError(f"`{name}={getattr(self, name)!r}` does not work: {remedy}.")

    def _check_types(self) -> None:
        for name, annotation in self._own_fields().items():
            value, expected = getattr(self, name), inspect.formatannotation(annotation)
            if not _fits(value, annotation):
                raise TypeError(f"`{name}={value!r}` is a {type(value).__name__}: it must be `{expected}`.")

    def _check_choices(self) -> None:
        declared = {}  # of a user's class that gives an argument another default, by its parent
        for base in reversed(type(self).__mro__):
            if issubclass(base, Arguments) and is_dataclass(base):
                declared |= {
                    field.name: field.metadata["choices"] for field in fields(base) if "choices" in field.metadata
                }
        for name in self._own_fields():
            if name in declared:
                choices = declared[name]
                known = " or ".join(map(repr, choices)) if len(choices) == 2 else f"one of {tuple(choices)}"
                self._check(name, getattr(self, name) in choices, f"choose {known}")
