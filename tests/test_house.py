"""The laws of the house, read from the code: who may import whom, what appears nowhere, how long anything may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import everystep
from everystep import errors

SOURCE = Path(everystep.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
DOOR = {
    "__init__", "repository", "run", "past", "checkpoint",
    "loop", "rules", "metrics", "environment", "config", "keeping", "asking", "difference", "lineage", "rehearsal",
    "importing", "forecast", "tracking", "workers", "telling", "dataloading", "paths", "checking", "access",
    "between", "front",
}  # fmt: skip

# Law 1: a room may import the rooms on its line, and itself. `settings` and `errors` import nothing of ours.
GROUND = {"errors", "settings", "seam", "schema"}
PLAN: dict[str, set[str]] = {
    "errors": set(),
    "settings": set(),
    "seam": set(),
    "schema": {"errors", "settings"},
    "adapters": GROUND,
    "codecs": GROUND,
    "storage": GROUND,
    "catalog": GROUND,
    "analysis": GROUND,
    "formats": GROUND,
    "vault": GROUND | {"storage", "codecs"},
    "save": GROUND | {"adapters", "codecs", "vault"},
    "restore": GROUND | {"adapters", "vault"},
    "upkeep": GROUND | {"vault"},
    "exchange": GROUND | {"formats", "restore", "adapters"},
    "the door": GROUND
    | {"adapters", "codecs", "storage", "catalog", "analysis", "vault", "save", "restore", "upkeep", "exchange"},
    "integrations": {"the door"},
    "cli": {"the door"},
}
GUESTS = {"cli", "integrations", "web"}

# Law 3: a library in its one room.
HOMES = {
    "torch": ("adapters/torch", "integrations/"),
    "tensorflow": ("adapters/tensorflow", "integrations/"),
    "keras": ("adapters/tensorflow", "integrations/"),
    "jax": ("adapters/jax", "integrations/"),
    "flax": ("adapters/jax", "integrations/"),
    "tensorstore": ("formats/orbax",),
    "mxnet": ("adapters/mxnet", "integrations/"),
    "obstore": ("storage/cloud",),
    "boto3": ("storage/cloud",),
    "hdfs_native": ("storage/hdfs",),
    "cryptography": ("security/",),
    "sqlite3": ("catalog/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "zstandard": ("codecs/",),
}
# Law 4: what could run code that data names.
NEVER_MODULES = {"pickle", "cPickle", "marshal", "dill", "cloudpickle", "shelve", "joblib"}
NEVER_CALLS = {"eval", "exec", "compile", "__import__"}
# Law 6.
NEVER_ROOMS = {"core", "common", "utils", "util", "helpers", "helper", "misc", "base", "lib"}
# Law 11: the outside comes in through the seam. Adapters may reach for the random state, which is part of a state.
OUTSIDE = {
    "os", "time", "threading", "subprocess", "socket", "tempfile", "shutil", "secrets", "signal", "atexit", "queue",
    "multiprocessing", "concurrent", "asyncio", "datetime", "uuid", "pathlib", "io", "glob",
}  # fmt: skip
_MODULE = re.compile(r"everystep(\.[a-z_]+)+")
FUNCTION_LINES_MAX, FILE_LINES_MAX = 60, 500


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room_of(name: str) -> str:
    top = name.split("/")[0].removesuffix(".py")
    return "the door" if top in DOOR else top


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, inside functions and for types too, with the line."""
    package = ["everystep", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            stem = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            base = (stem + (node.module or "")).rstrip(".")
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE.fullmatch(node.value):
            yield node.value, node.lineno  # importlib.import_module("everystep.…")


def target_room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "everystep":
        return None
    rooms = {room_of(name_of(path)) for path in FILES}
    return parts[1] if len(parts) > 1 and parts[1] in rooms and parts[1] not in DOOR else "the door"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_law_1_imports_go_down_only(path: Path) -> None:
    room = room_of(name_of(path))
    if room == "__main__":
        room = "cli"
        allowed = {"cli"}
    else:
        assert room in PLAN, f"{name_of(path)}: no such room in the plan; add it to the table with what it may import"
        allowed = PLAN[room] | {room}
    for module, line in imports_of(path):
        target = target_room(module)
        if target == "the door" and module in ("everystep.settings", "everystep.errors"):
            continue
        assert target is None or target in allowed, (
            f"{name_of(path)}:{line} imports {module}: {room} may import {', '.join(sorted(allowed))} (law 1)"
        )


def test_law_1_the_table_itself_goes_down() -> None:
    order = list(PLAN)
    for room, below in PLAN.items():
        assert all(order.index(other) < order.index(room) for other in below), f"the plan lets {room} import upwards"


def test_law_2_save_and_restore_do_not_know_each_other() -> None:
    assert "restore" not in PLAN["save"] and "save" not in PLAN["restore"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_law_3_a_library_has_one_home(path: Path) -> None:
    for module, line in imports_of(path):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or name_of(path).startswith(homes), (
            f"{name_of(path)}:{line} imports {module}, which belongs in {' or '.join(homes)} (law 3)"
        )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_law_4_nothing_runs_code_that_data_names(path: Path) -> None:
    for module, line in imports_of(path):
        assert module.split(".")[0] not in NEVER_MODULES, f"{name_of(path)}:{line} imports {module} (law 4)"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in NEVER_CALLS, f"{name_of(path)}:{node.lineno} calls {node.func.id} (law 4)"
        if isinstance(node, ast.Call) and any(k.arg == "allow_pickle" for k in node.keywords):
            raise AssertionError(f"{name_of(path)}:{node.lineno} passes allow_pickle (law 4)")


@pytest.mark.parametrize("path", [p for p in FILES if room_of(name_of(p)) in GUESTS], ids=name_of)
def test_law_5_guests_use_the_door(path: Path) -> None:
    for module, line in imports_of(path):
        if target_room(module) == "the door" and module != "everystep":
            name = module.removeprefix("everystep.")
            assert name in everystep.__all__, f"{name_of(path)}:{line} goes past the door to {module} (law 5)"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert isinstance(node.value, ast.Name) and node.value.id == "self", (
                f"{name_of(path)}:{node.lineno} reaches for {node.attr} (law 5)"
            )


def test_law_6_every_room_has_a_meaning() -> None:
    for path in FILES:
        parts = {part.removesuffix(".py").strip("_") for part in path.relative_to(SOURCE).parts}
        assert not parts & NEVER_ROOMS, f"{name_of(path)}: a room with this name holds anything (law 6)"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_law_7_short_enough_to_read(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES_MAX, f"{name_of(path)} has {lines} lines, at most {FILE_LINES_MAX} (law 7)"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, (
                f"{name_of(path)}:{node.lineno} {node.name} has {length} lines, at most {FUNCTION_LINES_MAX} (law 7)"
            )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_law_8_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        assert node.type is not None, f"{name_of(path)}:{node.lineno} a bare except (law 8)"
        if isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"):
            uses = [n for n in ast.walk(node) if isinstance(n, ast.Raise)] or node.name is not None
            assert uses, f"{name_of(path)}:{node.lineno} catches everything and drops it (law 8)"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_law_8_what_is_raised_is_one_of_ours(path: Path) -> None:
    ours = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    # What Python's own protocols ask for; and what the same file catches and says better.
    builtin = {"NotImplementedError", "StopIteration", "TypeError", "AttributeError"} | _caught(tree_of(path))
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        called = node.exc.func
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        if name[:1].isupper() and name not in ours and not _defined_in_room(path, name):
            assert name in builtin or name == "Exit", f"{name_of(path)}:{node.lineno} raises {name}, not ours (law 8)"


def _caught(tree: ast.Module) -> set[str]:
    handlers = [node.type for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is not None]
    found = [node for handler in handlers for node in ast.walk(handler)]
    return {n.id for n in found if isinstance(n, ast.Name)} | {n.attr for n in found if isinstance(n, ast.Attribute)}


def _defined_in_room(path: Path, name: str) -> bool:
    room = path.parent if path.parent != SOURCE else None
    files = room.rglob("*.py") if room else [path]
    return any(isinstance(n, ast.ClassDef) and n.name == name for f in files for n in ast.walk(tree_of(f)))


def test_law_8_every_error_has_a_kind_and_an_exit_code_of_its_own() -> None:
    kinds: dict[str, str] = {}
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.Error):
            assert "kind" in vars(kind), f"{name} has no kind of its own (law 8)"
            assert kind.kind not in kinds, f"{name} and {kinds[kind.kind]} have the same kind (law 8)"
            kinds[kind.kind] = name
            assert 0 < kind.exit_code < 64


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_law_9_no_async_twins(path: Path) -> None:
    found = [n for n in ast.walk(tree_of(path)) if isinstance(n, (ast.AsyncFunctionDef, ast.Await))]
    assert not found, f"{name_of(path)}: one synchronous door, and a handle for what is under way (law 9)"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_law_11_the_outside_comes_in_through_the_seam(path: Path) -> None:
    name = name_of(path)
    if name.startswith("seam/"):
        return
    for module, line in imports_of(path):
        top = module.split(".")[0]
        assert top not in OUTSIDE, f"{name}:{line} imports {top}; the outside comes in through seam/ (law 11)"
        assert top != "random" or name.startswith("adapters/"), f"{name}:{line} imports random (law 11)"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input"), f"{name}:{node.lineno} {node.func.id}() (law 11)"


def test_the_door_offers_what_it_says() -> None:
    public = {
        name for name, value in vars(everystep).items()
        if not name.startswith("_") and not isinstance(value, type(everystep)) and name != "annotations"
    }  # fmt: skip
    assert public | {"__version__"} == set(everystep.__all__)


def test_every_public_name_says_what_it_is() -> None:
    for name in everystep.__all__:
        value = getattr(everystep, name)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), f"everystep.{name} has no docstring"
        if isinstance(value, type):
            for method, member in vars(value).items():
                if not method.startswith("_") and callable(member) and not isinstance(member, type):
                    inherited = any(getattr(getattr(b, method, None), "__doc__", None) for b in value.__mro__)
                    assert inherited, f"everystep.{name}.{method} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring"
