"""The documents say what the code does: settings, errors, links, code blocks, the example of the format."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import everystep
from everystep import errors
from everystep.codecs import NAMES
from everystep.schema.dtype import FOREIGN, ML_DTYPES
from everystep.settings import LIMITS
from everystep.vault import record

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
GOLDEN = ROOT / "tests" / "golden" / "format-1"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sections(name: str) -> dict[str, str]:
    """Heading -> the text below it, of a page with headings of the second level."""
    parts = re.split(r"^## (.+)$", (DOCS / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(set(parts[1::2])) == len(parts[1::2]), f"{name} has a heading twice"
    return dict(zip(parts[1::2], parts[2::2]))


# settings and errors -------------------------------------------------------------------------------------------------


def test_every_setting_has_its_heading_with_its_default() -> None:
    found = sections("settings.md")
    fields = {field.name: field.default for field in dataclasses.fields(everystep.Settings)}
    assert list(found) == list(fields) == list(LIMITS), "docs/settings.md has the order of settings.py"
    for name, default in fields.items():
        shown = re.search(r"Default `([^`]+)`", found[name])
        assert shown is not None and shown[1] == repr(default), f"the default of {name} is {default!r}"
        assert LIMITS[name][0] <= default <= LIMITS[name][1]
        assert "*Change it*" in " ".join(found[name].split()), f"{name}: say when to change it"


def classes() -> dict[str, type]:
    kinds = (errors.Error, Warning)
    return {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, kinds)}


def test_every_error_has_its_heading_with_its_kind_and_exit_code() -> None:
    found = sections("errors.md")
    assert list(found) == list(classes()), "docs/errors.md lists the classes in the order of errors.py"
    for name, kind in classes().items():
        if issubclass(kind, errors.Error):
            assert f"kind `{kind.kind}`, exit code {kind.exit_code}." in found[name], f"{name}: kind and exit code"


def test_kinds_are_unique_and_exit_codes_are_no_successes() -> None:
    found = [kind for kind in classes().values() if issubclass(kind, errors.Error)]
    assert len({kind.kind for kind in found}) == len(found)
    assert all("kind" in vars(kind) and 0 < kind.exit_code < 126 for kind in found)
    for kind in found:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.kind)


def test_every_error_that_reaches_users_is_at_the_door() -> None:
    between_rooms = {"ObjectMissing", "AlreadyExists", "UnknownOutcome"}
    assert set(classes()) - between_rooms <= set(everystep.__all__)


# the format ----------------------------------------------------------------------------------------------------------


def test_the_format_names_every_event_with_its_fields() -> None:
    text = sections("format.md")["Events"]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")]
    found: dict[str, list[str]] = {}
    event = ""
    for title, cells in rows[1:]:
        event = title.strip(" `") or event
        found.setdefault(event, []).extend(re.findall(r"`(\w+)`", cells))
    assert found == {kind.__struct_config__.tag: list(kind.__struct_fields__) for kind in record._EVENTS}


@pytest.mark.parametrize("name", [*ML_DTYPES, *FOREIGN])
def test_the_format_names_every_element_type(name: str) -> None:
    text = sections("format.md")["Element types"]
    for sign in ("int", "uint"):
        text = text.replace(f"`torch.{sign}1` … `torch.{sign}7`", " ".join(f"`torch.{sign}{n}`" for n in range(1, 8)))
    assert f"`{name}`" in text


def test_the_format_names_every_kind_of_leaf_composite_node_and_codec() -> None:
    from everystep.adapters import numpy as numpy_adapter
    from everystep.adapters import torch as torch_adapter
    from everystep.schema import ROLES
    from everystep.schema.tree import _DICT_TYPES, _RECORDS

    tree = sections("format.md")["The tree"]
    for kind in (*numpy_adapter.KINDS, *torch_adapter.KINDS, *ROLES):
        assert f"`{kind}`" in tree or kind.startswith("scalar:"), kind
    assert "".join(kind[-1] for kind in numpy_adapter.KINDS if kind.startswith("scalar:")) in tree
    for kind in ("value", "leaf", "list", "tuple", *_DICT_TYPES, *_RECORDS):
        assert f'["{kind}", ' in tree, kind
    for number, name in NAMES.items():
        assert f"| {number} | {name.upper()} |" in sections("format.md")["Codecs"]


def test_the_example_of_the_format_is_the_golden_repository() -> None:
    files = [GOLDEN / "format.json", *sorted((GOLDEN / "runs" / "tiny").rglob("*"))]
    stored = [path.read_bytes() for path in files if path.is_file()]
    blocks = list(code_blocks(sections("format.md")["An example"], "json"))
    assert len(blocks) >= 6
    for block in blocks:
        for line in block.splitlines():
            assert any(line.encode() in body for body in stored), line


# What a page takes for granted: the program that its blocks stand in.
PRELUDES = {
    "README.md": """
import collections, numpy, torch
model = torch.nn.Sequential(collections.OrderedDict(fc=torch.nn.Linear(2, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 2), torch.ones(4, 1)), shuffle=True)
v, state = 0.5, {"w": numpy.arange(3.0)}
def train_step(x=torch.ones(1, 2), y=torch.ones(1, 1)):
    with torch.no_grad():
        model.fc.weight += 1e-4
    return 0.25
"""
}

# links and code ------------------------------------------------------------------------------------------------------


def code_blocks(text: str, language: str) -> Iterator[str]:
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield found[1]


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_compile(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in [*code_blocks(text, "python"), *code_blocks(text, "python compile")]:
        compile(block, name_of(page), "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if "```python\n" in page.read_text("utf-8")], ids=name_of)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    """The blocks of a page, one behind the other, as one program. What cannot run alone is marked `python compile`."""
    program = PRELUDES.get(page.name, "") + "\n".join(code_blocks(page.read_text(encoding="utf-8"), "python"))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if page.is_relative_to(DOCS)], ids=name_of)
def test_pages_are_readable_as_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ") and text.endswith("\n") and "\t" not in text
    prose = re.sub(r"^```.*?^```$|^\|.*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert all(len(line) <= 130 for line in prose.splitlines()), "prose has lines of at most 130 characters"


@pytest.mark.parametrize("page", sorted((DOCS / "decisions").glob("*.md")), ids=name_of)
def test_decisions_have_four_parts_and_are_numbered(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    number = int(page.name[:4])
    assert text.startswith(f"# {number}. ") and re.fullmatch(r"\d{4}-[a-z0-9-]+", page.stem)
    assert re.findall(r"^\*\*(\w+)\.\*\*", text, flags=re.MULTILINE) == ["Context", "Decision", "Why", "Consequences"]
    assert 10 <= len(text.splitlines()) <= 25


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(page.name[:4]) for page in sorted((DOCS / "decisions").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))
