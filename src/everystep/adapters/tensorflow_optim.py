"""Keras optimizers: their variables by the names of the model's variables that they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from everystep.adapters.tensorflow_values import is_variable, unwrap

Names = tuple[str, ...]
Known = Mapping[int, tuple[Any, list[str]]]
"""By the id of TensorFlow's variable, the variable and all names that it has."""
_OWN = ("_variables", "_trainable_variables")
_AUTOMATIC = re.compile(r"variable(_\d+)?")


@dataclass(frozen=True)
class Part:
    """A variable of an optimizer: ("iteration",), or ("state", "model.dense.kernel", "momentum")."""

    names: Names
    variable: Any
    others: tuple[Names, ...] = ()


def parts(optimizer: Any, known: Known) -> tuple[list[Part], list[str]]:
    """The variables of an optimizer, without those of one inside of it; and the names of what it updates."""
    trained = list(optimizer._trainable_variables)
    names = [_names(variable, number, known) for number, variable in enumerate(trained)]
    found: list[Part] = []
    taken: set[Names] = set()
    placed: set[int] = set()

    def add(variable: Any, choices: list[Names]) -> None:
        first = choices[0]
        number = 0
        while first in taken:
            number += 1
            first = (*choices[0][:-1], f"{choices[0][-1]}_{number}")
        taken.add(first)
        placed.add(id(variable))
        found.append(Part(first, variable, tuple(choices[1:]) if not number else ()))

    for number, attribute, variable in _aligned(optimizer, len(trained)):
        if id(variable) not in placed:
            slot = _slot(variable, trained[number], attribute)
            add(variable, [("state", name, slot) for name in names[number]])
    attributes = {id(value): name.lstrip("_") for name, value in vars(optimizer).items()}
    for variable in optimizer._variables:
        if id(variable) not in placed:
            owner = _owner(variable, trained)
            if owner is not None:
                slot = _slot(variable, trained[owner], "state")
                add(variable, [("state", name, slot) for name in names[owner]])
            else:
                automatic = _AUTOMATIC.fullmatch(variable.name) is not None
                add(variable, [(attributes.get(id(variable), "variable") if automatic else variable.name,)])
    return found, [aliases[0] for aliases in names]


def _names(variable: Any, number: int, known: Known) -> list[str]:
    """The names of a variable that is updated, best first; its position where nobody tracks it."""
    aliases = known.get(id(unwrap(variable)), (variable, []))[1]
    return [*aliases, f"variable{number}"]


def _aligned(optimizer: Any, count: int) -> Iterator[tuple[int, str, Any]]:
    """Entries of the lists that have one variable, or None, for each that is updated: (position, list, variable)."""
    for attribute, value in vars(optimizer).items():
        if attribute in _OWN or not isinstance(value, list) or len(value) != count:
            continue
        if all(entry is None or is_variable(entry) for entry in value):
            for number, entry in enumerate(value):
                if entry is not None:
                    yield number, attribute, entry


def _prefix(variable: Any) -> str:
    """How Keras begins the name of a slot of this variable."""
    name = getattr(variable, "path", None) or variable.name
    return str(name).replace("/", "_").replace(":", "_") + "_"


def _slot(variable: Any, owner: Any, attribute: str) -> str:
    name, prefix = str(variable.name), _prefix(owner)
    return name[len(prefix) :] if name.startswith(prefix) and len(name) > len(prefix) else attribute.lstrip("_")


def _owner(variable: Any, trained: list[Any]) -> int | None:
    """Which of those that are updated a variable was made for, told from its name."""
    fitting = [number for number, owner in enumerate(trained) if str(variable.name).startswith(_prefix(owner))]
    return max(fitting, key=lambda number: len(_prefix(trained[number])), default=None)
