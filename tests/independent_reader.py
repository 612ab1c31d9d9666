"""Loads the live checkpoints of a run by docs/format.md alone: python tests/independent_reader.py REPO RUN."""

import base64
import functools
import io
import json
import math
import re
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import zstandard
from blake3 import blake3

LONG = "" if np.finfo("g").nmant == 63 else f":{np.finfo('g').nmant}"  # marks the long doubles of this machine
NUMPY = re.compile(rf"\|(b1|[iu]1|[SV]\d+)|[<>]([iu][248]|f[248]|c8|c16|(f12|f16|c24|c32){LONG}|U\d+|[mM]8(\[\w+\])?)")
ML = re.compile(r">?(bfloat16|b?complex32|float[468]_e\w+|u?int[124])")
BYTE = re.compile(r"torch\.(u?int[1-7]|bits(8|1x8|2x4|4x2)|float4_e2m1fn_x2)")
FOREIGN = {"torch.bits16": "<u2", "torch.complex32": [("real", "<f2"), ("imag", "<f2")]}
TABLES = {"chunks": "32s", "spots": "<IQIBBI", "base_hashes": "32s", "bases": "<IQIBBI"}


def check(truth, what):
    if not truth:
        raise ValueError(what)


def document(path):
    body, seal, rest = path.read_bytes().split(b"\n")
    check(seal == b"blake3 " + blake3(body).hexdigest().encode() and not rest, f"{path} is damaged")
    return body, json.loads(body)


class Run:  # its log, folded
    def __init__(self, repo, name):
        _, form = document(Path(repo, "format.json"))
        check((form["format"], form["version"], form["features"]) == ("everystep", 1, []), "another format")
        name = name.encode("utf-8", "surrogatepass")
        name = re.sub(rb"[^\w.-]|^\.", lambda found: b"%%%02X" % ord(found[0]), name).decode()
        self.folder, self.commits, self.attached, retired, settled = Path(repo, "runs", name), {}, {}, {}, set()
        prev, term = blake3(f"{form['id']} runs/{name}/".encode()).hexdigest(), 0
        for slot, path in enumerate(sorted(self.folder.glob("log/" + "[0-9]" * 20))):
            body, record = document(path)
            linked = (record["v"], record["seq"], record["prev"] or prev, path.name) == (1, slot, prev, f"{slot:020d}")
            check(linked, f"{path} does not continue the log")
            prev, term = blake3(body).hexdigest(), max(term, record["term"])
            for event in record["events"]:
                kind, save = event["type"], (event.get("nonce"), event.get("ordinal"))
                if kind == "commit" and record["term"] == term and save not in settled:
                    self.commits.setdefault(event["id"], event)
                elif kind in ("retire", "restore"):
                    retired.update(dict.fromkeys(event["ids"], kind == "retire"))
                elif kind == "attach":
                    self.attached[event["name"]] = event["where"]
                for id, root, *_ in event.get("moved", ()):
                    self.commits.get(id, {})["root"] = root
                settled |= {save} if kind in ("commit", "abandon") else set()
        self.live = [commit for id, commit in self.commits.items() if not retired.get(id)]

    def read(self, where, here=("", 0), base=None):
        """The plain bytes of a page or chunk at [writer, number, offset, length, plain length, codec, BLAKE3]."""
        with self.folder.joinpath("packs", *map(str, (where if where[0] else here)[:2])).open("rb") as pack:
            pack.seek(where[2])
            data = decode(where[5], pack.read(where[3]), where[4], base)
        check(blake3(data).hexdigest() == where[6] and len(data) == where[4], f"{pack.name} is damaged at {where[2]}")
        return data

    def halves(self, promised, where, here=("", 0)):  # the two lines of a document, the first of which was promised
        first, second = self.read(where, here).split(b"\n")
        check(blake3(first).hexdigest() == promised, "not the document that was committed")
        return json.loads(first), json.loads(second)

    def load(self, commit):
        """(state, path -> array) of a commit; the state holds the very objects of the mapping."""
        root, places = self.halves(commit["logical"], commit["root"])
        same = all(root[key] == commit[key] for key in ("step", "parent", "metrics"))
        check(root["format"] == 1 and root["checkpoint"] == commit["id"] and same, "the root of another checkpoint")
        pieces, state = {}, {}
        trees = [self.part(*part, at, commit["root"], pieces) for part, at in zip(root["parts"], places, strict=True)]
        arrays = {path: whole(*found) for path, found in pieces.items()}
        for nodes, leaves, values in trees:
            state = merge(state, build(iter(nodes), [arrays[leaf[0]] for leaf in leaves], values))
        return state, arrays

    def part(self, rank, promised, where, here, pieces):
        """Adds what one rank holds to `pieces`; answers its tree."""
        logical, places = self.halves(promised, where, here)
        here, promised = where if where[0] else here, [[logical["tree"]], [logical["values"]], logical["chunks"]]
        same = promised == [[page[6] for page in places[key]] for key in ("tree", "values", "chunks")]
        check(logical["rank"] == rank and same, "the part of another checkpoint")
        pages = {key: b"".join(self.read(page, here) for page in places[key]) for key in ("tree", "values", *TABLES)}
        hashes, spots, *bases = (list(struct.iter_unpack(row, pages[key])) for key, row in TABLES.items())
        chunks, bases = zip(hashes, spots, strict=True), list(zip(*bases, strict=True))
        tree, streams = json.loads(pages["tree"]), {}
        for leaf in tree["leaves"]:
            item, unit = dtype_of(leaf[1]).itemsize, logical["chunk_bytes_max"]
            unit -= unit % item if 0 < item <= unit else 0
            for box in leaf[5] or [[[0] * len(leaf[2]), leaf[2], False]]:
                nbytes = math.prod(box[1]) * item
                key = (leaf[3], leaf[1]) if nbytes < logical["small_leaf_bytes"] else len(streams)
                streams.setdefault(key, (unit, []))[1].append((leaf, box, nbytes))
        for unit, regions in streams.values():
            data, total = io.BytesIO(), sum(nbytes for _, _, nbytes in regions)
            for start in range(0, total, unit):
                data.write(self.chunk(next(chunks), min(unit, total - start), bases, places["packs"]))
            data.seek(0)
            for leaf, box, nbytes in regions:
                pieces.setdefault(leaf[0], (leaf, {}))[1].setdefault(str(box), (box, data.read(nbytes)))
        check(next(chunks, None) is None and len(hashes) == logical["count"], "a wrong number of chunks")
        return tree["nodes"], tree["leaves"], json.loads(pages["values"])

    def chunk(self, row, nbytes, bases, packs):
        (hash,), (pack, offset, length, codec, depth, base) = row
        check((depth, base) == (0, 0xFFFFFFFF) or (depth <= 64 and bases[base][1][4] == depth - 1), "another chain")
        plain = self.chunk(bases[base], nbytes, bases, packs) if depth else None
        return self.read([*packs[pack], offset, length, nbytes, codec, hash.hex()], base=plain)


def whole(leaf, held):
    """A leaf from the boxes that the ranks hold of it."""
    path, name, shape, _, kind, _ = leaf
    dtype = dtype_of(name)
    raw, covered = np.zeros((math.prod(shape), dtype.itemsize), np.uint8), np.zeros(math.prod(shape), bool)
    for (start, size, flat), data in held.values():
        outer, cut = covered.shape if flat else shape, tuple(slice(at, at + n) for at, n in zip(start, size))
        covered.reshape(outer)[cut] = True
        raw.reshape(*outer, dtype.itemsize)[cut] = np.frombuffer(data, np.uint8).reshape(*size, dtype.itemsize)
    check(covered.all(), f"{path}: the ranks do not hold all of it")
    text = {"bytes": bytes, "str": lambda data: data.decode("utf-8", "surrogatepass")}.get(kind)
    return text(raw.tobytes()) if text else np.ndarray(shape, dtype, raw.tobytes() or b"\0")


def build(nodes, leaves, values):
    kind, what, *names = next(nodes)
    if kind in ("leaf", "value"):
        return leaves[what] if kind == "leaf" else plain(values[what])
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](build(nodes, leaves, values) for _ in range(what))
    return {key: build(nodes, leaves, values) for key in (names[0] if names else map(plain, what))}


def merge(first, second):
    both = type(first) is type(second) is dict
    return {**second, **{key: merge(value, second.get(key)) for key, value in first.items()}} if both else first


def plain(node):
    kind, body = next(iter(node.items())) if isinstance(node, dict) else (None, node)
    if kind in (None, "i", "t"):
        return body if kind is None else int(body, 16) if kind == "i" else tuple(map(plain, body))
    raw = base64.b64decode(body) if kind == "b" else bytes.fromhex(body)
    if kind in ("b", "s"):
        return raw if kind == "b" else raw.decode("utf-8", "surrogatepass")
    return complex(*struct.unpack(">dd", raw)) if kind == "c" else struct.unpack(">d", raw)[0]


def dtype_of(name):
    node = json.loads(name) if isinstance(name, str) and name[:1] == "{" else name
    if isinstance(node, list):
        return np.dtype((dtype_of(node[0]), tuple(node[1])))
    if isinstance(node, dict):
        tables = {key: list(map(plain, node[key])) for key in ("names", "titles", "offsets")}
        tables |= {"formats": list(map(dtype_of, node["formats"])), "itemsize": node["itemsize"]}
        return np.dtype((np.record if node.get("record") else np.void, np.dtype(tables, align=node["aligned"])))
    if ML.fullmatch(node):
        return np.dtype(getattr(ml_dtypes, node.lstrip(">"))).newbyteorder(">" if node[0] == ">" else "=")
    check(node in FOREIGN or BYTE.fullmatch(node) or NUMPY.fullmatch(node), f"unknown element type {node}")
    return np.dtype(FOREIGN.get(node, "u1" if BYTE.fullmatch(node) else node.partition(":")[0]))


@functools.lru_cache(64)
def decode(codec, stored, nbytes, base):
    """The plain bytes of 0 RAW, 1 PLANES, 2 DELTA, 3 PACKED and 4 SPARSE."""
    if codec == 0:
        return stored
    file, leans = io.BytesIO(stored), codec in (2, 3, 4)
    check(codec == 1 or (leans and base is not None and len(base) == nbytes), "an unknown codec, or not its base")
    width, ordered, shift = struct.unpack("<BBB" if leans else "<BBH", file.read(3 if leans else 4))
    check(width in (1, 2, 4, 8) and nbytes % width == 0 and ordered >> 1 == (codec == 4), "a header without sense")
    check(not leans or shift < 8 * width or shift == 255, "a header without sense")
    top, most = 8 * width - 1, (1 << (8 * width - 1)) - 1
    if not leans:
        words = planes(file, file, width, nbytes)
        return ((words >> 1) | (words << top) if ordered else words).tobytes()
    old = np.frombuffer(base, f"<i{width}")
    key = np.zeros(len(old), "u1") if shift == 255 else ((old.view(f"<u{width}") & most) >> shift).astype("u1")
    if codec == 2:  # grouped by the base's exponent
        grouped = planes(io.BytesIO(file.read(5 * width)), file, width, nbytes)
        words = np.empty_like(grouped)
        words[np.argsort(key, kind="stable")] = grouped
    else:
        words = (changes if codec == 4 else residuals)(file, width, key).astype(f"<u{width}")
    turn = (lambda x: x ^ ((x >> top) & most)) if ordered & 1 else (lambda x: x)
    return turn(((words >> 1).view(f"<i{width}") ^ -(words & 1).view(f"<i{width}")) + turn(old)).tobytes()


def planes(heads, file, width, nbytes):
    rows, count, zstd = [], nbytes // width, zstandard.ZstdDecompressor()
    forms = {0: bytes, 1: lambda row: zstd.stream_reader(row).read(count + 1), 2: lambda row: row * count}
    for _ in range(width):
        how, size = struct.unpack("<BI", heads.read(5))
        rows.append(forms[how](file.read(size)))
    check({len(row) * width for row in rows} == {nbytes} and not file.read(), "planes of another length")
    return np.frombuffer(b"".join(rows), np.uint8).reshape(width, -1).T.reshape(-1).view(f"<u{width}")


def residuals(file, width, key):
    contexts, tables = codes(file, [width])
    return values(file, contexts[key], tables)


def changes(file, width, key):
    contexts, tables = codes(file, [4, width])  # of gaps and of residuals
    sizes = np.frombuffer(file.read(2 * len(tables)), "<u4").astype(int)
    check(sizes.sum() <= len(key), "more changes than words")
    which = np.repeat(np.arange(len(tables)).reshape(-1, 2), sizes, axis=0)
    found, words, at = values(file, which.reshape(-1), tables).reshape(-1, 2), np.zeros(len(key), "u8"), 0
    for context in np.flatnonzero(sizes):
        gaps, words_of = found[at : at + sizes[context], 0], np.flatnonzero(contexts[key] == context)
        words[words_of[np.cumsum(gaps.astype(int) + 1) - 1]] = found[at : at + sizes[context], 1]
        at += sizes[context]
    return words


def codes(file, widths):
    """The context of each key, and of each code the 256 next eight bits: symbol, length, how many symbols there are."""
    contexts, tables, last = np.zeros(256, int), [], -1
    for context in range(struct.unpack("<H", file.read(2))[0] + 1):
        if context:
            (key,) = file.read(1)
            check(key > last, "keys out of order")
            contexts[key], last = context, key
        for width in widths:
            first, count = file.read(2)
            halves = [half for byte in file.read(count // 2 + 1) for half in (byte & 15, byte >> 4)][: count + 1]
            pairs = sorted([*zip(halves[1:], range(first, first + count)), (halves[0], 128)])  # the escape is the last
            table = [(symbol, length, 16 * width) for length, symbol in pairs if length for _ in range(256 >> length)]
            whole = len(table) == 256 and len(halves) == count + 1 and pairs[-1][0] <= 8
            check(whole and first + count <= 16 * width, "a code that makes no sense")
            tables.append([table[int(f"{byte:08b}"[::-1], 2)] for byte in range(256)])  # a code's highest bit is first
    return contexts, np.array(tables)


def values(file, which, tables):
    """Blocks of 1024 values, read side by side; `which` is the code of each."""
    blocks = -(-len(which) // 1024)
    sizes, stored = np.frombuffer(file.read(2 * blocks), "<u2").astype(int), file.read()
    check(len(sizes) == blocks and sizes.sum() == len(stored), "blocks of another length")
    window = np.ndarray(len(stored) + 9, "<u8", stored + bytes(16), strides=(1,))  # eight bytes from any byte on

    def bits(at, count):
        from_here = window[np.minimum(at >> 3, len(stored) + 8)] >> (at & 7).astype("u8")
        return from_here & ((1 << np.asarray(count, "u8")) - np.uint64(1))

    starts = 8 * (np.cumsum(sizes) - sizes)
    at, out = starts.copy(), np.zeros((1024, blocks), "u8")
    rows = np.append(which, np.zeros(1024 * blocks - len(which), int)).reshape(blocks, 1024).T
    for step, row in enumerate(rows[: len(which)]):
        lanes = blocks - (1024 * (blocks - 1) + step >= len(which))
        here, row = at[:lanes], row[:lanes]
        symbol, length, limit = tables[row, bits(here, 8)].T
        here += length
        escaped = np.flatnonzero(symbol == 128)
        symbol[escaped] = bits(here[escaped], 7)
        here[escaped] += 7
        check((symbol < limit).all(), "a symbol that does not exist")
        low = np.maximum(symbol // 2 - 1, 0)
        half, top = np.minimum(low, 32), (symbol - 2 * low).astype("u8")
        low_bits = bits(here, half) | bits(here + 32, low - half) << np.uint64(32)
        out[step, :lanes] = top << low.astype("u8") | low_bits
        here += low
    check(((at - starts + 7) // 8 == sizes).all(), "a block of another length")
    return out.T.reshape(-1)[: len(which)]


if __name__ == "__main__":
    print(*(run.load(commit)[1] for run in [Run(*sys.argv[1:])] for commit in run.live), sep="\n")
