"""The role of what a program hands over by itself: told from the names at its top."""

from __future__ import annotations

from typing import Any

from everystep.schema import Roled

_ROLES = {
    "weights": ("model", "models", "params", "parameters", "weights", "w", "model_state_dict", "state_dict"),
    "optimizer": (
        "optimizer", "optimizers", "opt", "optim", "opt_state", "optimizer_state", "optimizer_state_dict",
        "optimizer_states",
    ),
    "rng": ("rng", "key", "keys", "seed", "prng"),
}  # fmt: skip
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}


def with_roles(state: Any) -> Any:
    """Top-level entries of an explicit state get their role from their name."""
    if type(state) is not dict:
        return state
    return {
        key: Roled(_ROLE_OF.get(key.lower(), "other") if isinstance(key, str) else "other", value)
        for key, value in state.items()
    }
