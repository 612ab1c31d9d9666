"""The kernel in C and its NumPy form are one: the same bytes, the same words; built, left out, and under sanitizers."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _encodings import (
    CHANGES,
    FORMS,
    KERNEL,
    NUMPY,
    ONE_OF_A_FORM,
    changed,
    check_back,
    flat,
    forced,
    made,
    packed_by,
    sparse_by,
    trained,
    using,
)
from _thorough import examples
from fuzz import seeds
from golden import make
from hypothesis import given, settings
from hypothesis import strategies as st

import everystep
from everystep import codecs
from everystep.codecs import codes, native, packed
from everystep.codecs.delta import UNGROUPED, Form
from everystep.codecs.planes import WORDS

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "everystep" / "codecs" / "kernel"
PURE = [SOURCES / f"{name}.c" for name in ("codes", "packed", "sparse", "planes")]
COMPILERS = [each for each in ("gcc", "clang") if shutil.which(each)]
BORDERS = [0, 1, 2, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 2048, 4095, 4096, 4097, 5 * 1024 + 1]
needs_kernel = pytest.mark.skipif(native.kernel is None, reason="no compiler built the kernel")
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C compiler")


@needs_compiler
def test_where_there_is_a_compiler_there_is_the_kernel() -> None:
    assert native.kernel is not None, "pip install -e . builds it"
    assert (os.environ.get("EVERYSTEP_KERNEL") != "0") == codecs.HAS_KERNEL == (everystep.KERNEL == "C")


# the same bytes ------------------------------------------------------------------------------------------------------


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Form, Array, Array]:
    """(form, data, base): any width and key, at the borders of blocks, of many ways to differ."""
    width = draw(st.sampled_from([1, 2, 4, 8]))
    shift = draw(st.one_of(st.just(UNGROUPED), st.integers(0, 8 * width - 1)))
    form = Form(width, draw(st.booleans()), shift)
    count = draw(st.one_of(st.sampled_from(BORDERS), st.integers(0, 3000), st.sampled_from([66_000, 70_000])))
    chance = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    base = chance.integers(0, 256, count * width, np.uint8)
    if draw(st.booleans()):  # few exponents
        base.view(WORDS[width])[:] >>= draw(st.integers(0, 8 * width - 1))
    data = base.copy()
    words = data.view(WORDS[width])
    share = draw(st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]))
    bits = draw(st.integers(0, 8 * width))
    where = np.flatnonzero(chance.random(count) < share)
    moves = chance.integers(0, 256, where.size * width, np.uint8).view(WORDS[width])
    words[where] += moves & words.dtype.type((1 << bits) - 1)
    return form, data, base


@needs_kernel
@settings(max_examples=examples(150), deadline=None)
@given(pairs())
def test_both_forms_give_the_same_bytes(case: tuple[Form, Array, Array]) -> None:
    form, data, base = case
    plans = []
    for by in (KERNEL, NUMPY):
        with using(by):
            plans.append(packed.plan(data, base, form))
    assert plans[0].header == plans[1].header
    assert np.allclose(plans[0][2:], plans[1][2:], rtol=1e-9)
    for codec, stored in forced(data, base, form, FORMS):
        for by in FORMS:
            with using(by):
                check_back(codec, stored, data, base)
    words = data.view(WORDS[form.width])
    differ = int((words != base.view(words.dtype)).sum())
    for most in {0, max(differ - 1, 0), differ, words.size}:
        ways = []
        for by in (KERNEL, NUMPY):
            with using(by):
                ways.append(packed.pack_sparse(data, base, form, most))
        assert ways[0] == ways[1] and (ways[0] is None or differ <= most)


@needs_kernel
@pytest.mark.parametrize("dtype", ONE_OF_A_FORM.values())
def test_both_forms_choose_alike_what_to_store_as_changes(dtype: str) -> None:
    for how in CHANGES:
        data = made(dtype, 66_000, 3)
        base = changed(data, dtype, how, 3)
        found = []
        for by in (KERNEL, NUMPY):
            with using(by):
                codec, pieces = codecs.encode(data, dtype, 1, 1 << 16, 0.97, base=base)
                found.append((codec == codecs.SPARSE) and b"".join(pieces))
        assert found[0] == found[1], how


def hidden(form: Form, count: int) -> tuple[Array, Array]:
    """Words that a sample takes for others: it sees at most 128 of each 1024 of so many, and these stand still."""
    base = made("|u1", count * form.width, 4)
    data = made("|u1", count * form.width, 5)
    seen = np.arange(count) % 1024 < 128
    data.view(WORDS[form.width])[seen] = base.view(WORDS[form.width])[seen]
    return data, base


ALL_FORMS = [*ONE_OF_A_FORM, Form(8, False, 56), Form(4, True, 0), Form(2, False, 15), Form(1, True, 7)]


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_words_that_no_sample_saw_are_escaped(form: Form) -> None:
    data, base = hidden(form, 70_000)
    (_, stored), *_ = found = forced(data, base, form, FORMS)
    assert len(stored) > data.nbytes * 7 // 8, "nothing of what moved was foreseen"
    for codec, body in found:
        for by in FORMS:
            with using(by):
                check_back(codec, body, data, base)


MANY_KEYS = np.random.default_rng(0).integers(0, 1 << 16, 3 << 19).astype("<u2")
"""Of each of 256 keys more than 64 in a sample of one in 64."""
CASES: dict[str, tuple[Form, Any, Any]] = {
    "all equal": (Form(4, True, 23), np.arange(9000, dtype="<u4"), np.arange(9000, dtype="<u4")),
    "all different": (Form(4, True, 23), np.arange(9000, dtype="<u4") + 5, np.arange(9000, dtype="<u4")),
    "one word": (Form(8, False, UNGROUPED), np.array([1 << 63], "<u8"), np.array([0], "<u8")),
    "62 low bits": (
        Form(8, False, UNGROUPED),
        np.random.default_rng(0).integers(1 << 61, 1 << 63, 3000).astype("<u8"),
        np.zeros(3000, "<u8"),
    ),
    "every number of low bits": (
        Form(8, False, UNGROUPED), np.tile(np.uint64(1) << np.arange(64, dtype="<u8"), 50), np.zeros(3200, "<u8")
    ),
    "every key": (Form(2, True, 7), MANY_KEYS, MANY_KEYS ^ 3),
    "keys of eight bytes": (
        Form(8, True, 52), np.arange(1 << 16, dtype="<u8") << 46, (np.arange(1 << 16, dtype="<u8") << 46) ^ 3
    ),
    "every key, few words of each": (
        Form(2, True, 7), np.arange(1 << 14, dtype="<u2") * 2 + 1, np.arange(1 << 14, dtype="<u2") * 2
    ),
    "one key": (Form(2, True, 7), np.full(5000, 0x3F81, "<u2"), np.full(5000, 0x3F80, "<u2")),
    "keys with 63 and 64 words": (
        Form(2, True, 7), np.repeat([0x81, 0x101], [63, 64]), np.repeat([0x80, 0x100], [63, 64])
    ),
    "255 zigzags": (Form(1, False, UNGROUPED), np.arange(4096).astype("u1"), np.zeros(4096, "u1")),
    "512 changes": (Form(4, False, UNGROUPED), np.arange(4096, dtype="<u4") % 8 == 0, np.zeros(4096, "<u4")),
    "1 change at the end": (Form(2, True, 10), np.arange(4097) == 4096, np.zeros(4097, "<u2")),
    "a gap of more than 65536": (Form(1, False, UNGROUPED), np.arange(200_001) % 100_000 == 0, np.zeros(200_001, "u1")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_odd_cases_come_back(name: str) -> None:
    form, new, old = CASES[name]
    data, base = (flat(np.asarray(each).astype(WORDS[form.width])) for each in (new, old))
    found = forced(data, base, form, FORMS)
    for codec, stored in found:
        for by in FORMS:
            with using(by):
                check_back(codec, stored, data, base)
    contexts = [
        len(codes.read(memoryview(stored), sparse=codec == codecs.SPARSE)[0].lengths) for codec, stored in found
    ]
    number = {"every key": 257, "one key": 2, "keys with 63 and 64 words": 2}
    if name == "every key, few words of each":  # of which a sample sees half
        assert contexts == [129, 2 * 257]
    else:
        assert contexts == [number.get(name, contexts[0]), 2 * number.get(name, contexts[1] // 2)]


def test_a_header_says_the_codes_of_its_sample() -> None:
    """By hand: of 4 words one is 2 further, one 1 back, two stand still; residuals 4, 1, 0, 0."""
    base = np.zeros(4, "<u2")
    data = np.array([2, 0xFFFF, 0, 0], "<u2")
    for by in FORMS:
        stored = packed_by(by, flat(data), flat(base), Form(2, False, UNGROUPED))
        # symbols 4, 1, 0, 0, and the escape: codes of 2 bits, in that order 10, 01, 00, 11
        assert stored[:5] == bytes([2, 0, 255, 0, 0])
        assert stored[5:10] == bytes([0, 5, 2 | 2 << 4, 2 | 0 << 4, 0 | 2 << 4])
        bits = "10" + "0" + "01" + "00" + "00"
        assert stored[10:] == struct.pack("<HH", 2, int(bits[::-1], 2))
        assert sparse_by(by, flat(data), flat(base), Form(2, False, UNGROUPED))[:5] == bytes([2, 2, 255, 0, 0])


# the module ----------------------------------------------------------------------------------------------------------


@needs_kernel
def test_the_kernel_refuses_what_does_not_fit() -> None:
    kernel, data, out = native.kernel, np.zeros(64, np.uint8), np.zeros(1 << 17, np.uint8)
    for width, ordered, shift in [(3, 0, 0), (0, 0, 0), (-1, 0, 0), (4, 2, 0), (4, -1, 0), (4, 0, 32), (4, 0, -1)]:
        with pytest.raises(ValueError):
            kernel.plan(data, data, width, ordered, shift)
        with pytest.raises(ValueError):
            kernel.pack_sparse(data, data, width, ordered, shift, 4, out)
    header, *_ = kernel.plan(data, data, 4, 1, 23)
    for wrong in (data[:60], data[:63], np.zeros(68, np.uint8)):
        with pytest.raises(ValueError):
            kernel.plan(data, wrong, 4, 1, 23)
        with pytest.raises(ValueError):
            kernel.pack(header, data, wrong, out)
        with pytest.raises(ValueError):
            kernel.unpack(b"", wrong, data)
        with pytest.raises(ValueError):
            kernel.unpack_sparse(b"", wrong, data)
        with pytest.raises(ValueError):
            kernel.split(data, 4, False, wrong)
    for most in (-1, 65):
        with pytest.raises(ValueError):
            kernel.pack_sparse(data, data, 4, 1, 23, most, out)
    with pytest.raises(ValueError):
        kernel.pack(b"", data, data, out)
    assert kernel.pack(bytes(header) + b"\0", data, data, out) is None
    assert kernel.pack(b"\3" + bytes(header)[1:], data[:63], data[:63], out) is None
    assert kernel.pack(header, data, data, out[:10]) is kernel.pack_sparse(data, data, 4, 1, 23, 4, out[:10]) is None
    frozen = data.copy()
    frozen.flags.writeable = False
    for call in (kernel.unpack, kernel.unpack_sparse):
        with pytest.raises((BufferError, ValueError)):
            call(b"", data, frozen)
    with pytest.raises((BufferError, ValueError)):
        kernel.plan(data[::2], data[:32], 4, 1, 23)
    rows = tuple(data.reshape(4, 16))
    for wrong_rows in (rows[:3], (), rows + rows, (*rows[:3], data[:15])):
        with pytest.raises(ValueError):
            kernel.join(wrong_rows, False, np.zeros(64, np.uint8))
    with pytest.raises(TypeError):
        kernel.join([*rows], False, np.zeros(64, np.uint8))


# without a kernel ----------------------------------------------------------------------------------------------------

WITHOUT = """
import json, sys
sys.path.insert(0, sys.argv[2])
import everystep
from everystep import codecs
from golden import make
from test_kernel import codecs_of, drifting
assert not codecs.HAS_KERNEL and everystep.KERNEL == "NumPy"
here = everystep.open(sys.argv[1], settings=make.SMALL)
run = here.run("without")
for step, state in enumerate(drifting(), 1):
    run.save(step, state=state).wait()
run.close()
assert here.check().ok
print(json.dumps({"listing": make.listing(sys.argv[1]), "codecs": codecs_of(here["without"])}))
"""


def drifting() -> list[dict[str, Array]]:
    """Weights that move everywhere, weights of which few move, bytes."""
    fine, _ = trained("<f4", 3000, 1e-5)
    states = []
    for step in range(4):
        w = fine.view("<f4") * np.float32(1 + 1e-5 * step)
        few = fine.view("<f4").copy()
        few[:: 100 + step] += np.float32(0.5)
        states.append({"w": w, "few": few, "table": np.arange(2000, dtype="u1") * (1 + (np.arange(2000) < 40 * step))})
    return states


def codecs_of(past: Any) -> list[str]:
    """The names of the codecs of a run's chunks."""
    views = [view for one in past.checkpoints() for view in one._open().manifest.views]
    return sorted({codecs.NAMES[view.spot(i).codec] for view in views for i in range(len(view.spots))})


def test_without_the_kernel_everything_is_loaded_and_saved(tmp_path: Path) -> None:
    here = everystep.open(str(tmp_path), settings=make.SMALL)
    with using(FORMS[0]):
        run = here.run("with")
        for step, state in enumerate(drifting(), 1):
            run.save(step, state=state).wait()
        run.close()
    expected = {codecs.NAMES[codecs.SPARSE], codecs.NAMES[codecs.PACKED if FORMS[0] == KERNEL else codecs.DELTA]}
    assert set(codecs_of(here["with"])) >= expected
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), str(ROOT / "tests")]
    done = subprocess.run(
        command, env={**os.environ, "EVERYSTEP_KERNEL": "0"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"delta", "sparse"} <= set(found["codecs"]) and "packed" not in found["codecs"]
    assert found["listing"] == make.listing(str(tmp_path))
    with using(FORMS[0]):
        assert here.check().ok
        for name in ("with", "without"):
            for step, state in enumerate(drifting(), 1):
                assert list(make.told(here[name].at(step).load())) == list(make.told(state))


# how it is built -----------------------------------------------------------------------------------------------------


def built(folder: Path, compiler: str) -> Path:
    """The package as `pip install` makes it, with this compiler: the folder it lies in."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", folder / "src", ignore=ignore)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(folder / "lib")]
    environment = {**os.environ, "CC": compiler, "LDSHARED": f"{compiler} -shared"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return folder / "lib"


def imported(lib: Path, program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(lib), "EVERYSTEP_KERNEL": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=lib, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TRIP = """
import numpy as np, everystep
from everystep import codecs
base = np.arange(5000, dtype="<f4").view(np.uint8)
data = (np.arange(5000, dtype="<f4") * np.float32(1.0001)).view(np.uint8)
codec, pieces = codecs.encode(data, "<f4", 1, 65536, 0.97, base=base)
back = codecs.decode(codec, memoryview(b"".join(pieces)), data.nbytes, base)
assert bytes(back) == bytes(data)
print(everystep.__file__, everystep.KERNEL, codecs.HAS_KERNEL, codecs.NAMES[codec])
"""


def test_without_a_compiler_it_is_built_without_the_kernel(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    lib = built(tmp_path, "/bin/false")
    assert not list(lib.rglob("_kernel*.so"))
    assert imported(lib, TRIP) == f"{lib / 'everystep' / '__init__.py'} NumPy False delta"


@needs_compiler
def test_with_a_compiler_it_is_built_for_every_later_python(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    lib = built(tmp_path, COMPILERS[0])
    (made,) = lib.rglob("_kernel*.so")
    assert ".abi3." in made.name or sysconfig.get_config_var("Py_GIL_DISABLED")
    assert imported(lib, TRIP) == f"{lib / 'everystep' / '__init__.py'} C True packed"


WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wno-sign-conversion", "-Wshadow", "-Wundef", "-Wvla"]


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS)
def test_it_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    strict = [compiler, "-std=c11", "-O2", *WARNINGS, "-Werror", "-c", "-o", str(tmp_path / "out.o")]
    include = sysconfig.get_path("include")
    own = [*PURE, ROOT / "tests" / "fuzz" / "decoders.c"]
    if Path(include, "Python.h").exists():
        own.append(SOURCES / "module.c")
    for source in own:
        command = [*strict, "-DALONE", "-DPy_LIMITED_API=0x030B0000", f"-I{SOURCES}", f"-isystem{include}", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize("form", ["WIDE_IF_THERE", "PLAIN"])
def test_no_byte_outside_is_touched_whatever_is_stored(form: str, tmp_path: Path) -> None:
    """The fuzzer's harness, under the address and the undefined-behaviour sanitizer, over mutations of its seeds."""
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    for compiler in COMPILERS:
        command = [compiler, *sanitizers, str(probe), "-o", str(tmp_path / "probe")]
        if subprocess.run(command, capture_output=True, timeout=100).returncode == 0:
            break
    else:
        pytest.skip("no compiler here has sanitizers")
    program = tmp_path / "decoders"
    sources = [str(ROOT / "tests" / "fuzz" / "decoders.c"), *map(str, PURE)]
    command = [
        compiler,
        "-std=c11",
        "-O1",
        "-g",
        "-DALONE",
        f"-D{form}",
        *sanitizers,
        f"-I{SOURCES}",
        *sources,
        "-lm",
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    files = seeds.write(tmp_path / "seeds")
    done = subprocess.run([str(program), "3000", "1", *map(str, files)], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"{3000 + len(files)} inputs\n"
