"""Loads a checkpoint by docs/format.md alone: python tests/independent_reader.py REPO RUN [STEP]."""

import base64
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

FOREIGN = {f"torch.{sign}int{bits}": "|u1" for sign in ("", "u") for bits in range(1, 8)}
FOREIGN |= {f"torch.{name}": "|u1" for name in ("float4_e2m1fn_x2", "bits1x8", "bits2x4", "bits4x2", "bits8")}
FOREIGN |= {"torch.bits16": "<u2", "torch.complex32": [("real", "<f2"), ("imag", "<f2")]}
ML = re.compile(r">?(bfloat16|b?complex32|float[468]_e\w+|u?int[124])")
NUMPY = re.compile(r"\|(b1|[iu]1|[SV]\d+)|[<>]([iu][248]|f(2|4|8|12|16)|c(8|16|24|32)|U\d+|[mM]8(\[\w+\])?)")


def check(truth, what):
    if not truth:
        raise ValueError(what)


def body_of(path):
    body, seal, rest = path.read_bytes().split(b"\n")
    check(seal == b"blake3 " + blake3(body).hexdigest().encode() and not rest, f"{path} is damaged")
    return body


class Run:  # its log, folded
    def __init__(self, repo, name):
        form = json.loads(body_of(Path(repo, "format.json")))
        check((form["format"], form["version"], form["features"]) == ("everystep", 1, []), "another format")
        name = name.encode("utf-8", "surrogatepass")
        folder = re.sub(rb"[^\w.-]|^\.", lambda found: b"%%%02X" % ord(found[0]), name).decode()
        self.folder, self.commits, self.retired, self.attached = Path(repo, "runs", folder), {}, set(), {}
        prev, term, settled = blake3(f"{form['id']} runs/{folder}/".encode()).hexdigest(), 0, set()
        for slot, path in enumerate(sorted(self.folder.glob("log/" + "[0-9]" * 20))):
            body = body_of(path)
            record = json.loads(body)
            linked = (record["v"], record["seq"], record["prev"] or prev, path.name) == (1, slot, prev, f"{slot:020d}")
            check(linked, f"{path} does not continue the log")
            prev, term = blake3(body).hexdigest(), max(term, record["term"])
            for event in record["events"]:
                save = event.get("nonce"), event.get("ordinal")
                if event["type"] == "commit" and record["term"] == term and save not in settled:
                    self.commits[event["id"]] = event
                elif event["type"] == "retire":
                    self.retired |= set(event["ids"])
                elif event["type"] == "restore":
                    self.retired -= set(event["ids"])
                elif event["type"] == "attach":
                    self.attached[event["name"]] = event["where"]
                settled |= {save} if event["type"] in ("commit", "abandon") else set()

    def find(self, step=None):
        """The newest live commit, or the newest of a step."""
        found = [c for c in self.commits.values() if c["id"] not in self.retired and step in (None, c["step"])]
        check(found, "no such checkpoint")
        return found[-1]

    def read(self, where, here=("", 0), base=None):
        """The plain bytes of a page or chunk at [writer, number, offset, length, plain length, codec, BLAKE3]."""
        writer, number = (where if where[0] else here)[:2]
        with open(self.folder / "packs" / writer / str(number), "rb") as pack:
            pack.seek(where[2])
            stored = pack.read(where[3])
        decode = {0: lambda stored, nbytes: stored, 1: planes, 2: lambda *known: delta(base, *known)}[where[5]]
        data = decode(stored, where[4])
        intact = blake3(data).hexdigest() == where[6] and len(data) == where[4]
        check(intact, f"{pack.name} is damaged at {where[2]}")
        return data

    def attachment(self, name):
        return b"".join(self.read(where) for where in self.attached[name])

    def load(self, commit):
        """(state, path -> array) of a commit; the state holds the very objects of the mapping."""
        body = self.read(commit["root"])
        root, places = map(json.loads, body.split(b"\n"))
        check(blake3(body.split(b"\n")[0]).hexdigest() == commit["logical"], "not the root that was committed")
        same = all(root[key] == commit[key] for key in ("step", "parent", "metrics"))
        check(root["format"] == 1 and root["checkpoint"] == commit["id"] and same, "the root of another checkpoint")
        pieces, state = {}, {}
        trees = [self.part(hash, at, commit["root"], pieces) for (_, hash), at in zip(root["parts"], places)]
        arrays = {path: whole(*found) for path, found in pieces.items()}
        for nodes, leaves, values in trees:
            state = merge(state, build(iter(nodes), [arrays[leaf[0]] for leaf in leaves], values))
        return state, arrays

    def part(self, hash, where, here, pieces):
        """Adds what one rank holds to `pieces`; answers its tree."""
        here, body = where if where[0] else here, self.read(where, here)
        logical, part = map(json.loads, body.split(b"\n"))
        check(blake3(body.split(b"\n")[0]).hexdigest() == hash, "not the part that was committed")
        promised = [[logical["tree"]], [logical["values"]], logical["chunks"]]
        check([[where[6] for where in part[k]] for k in ("tree", "values", "chunks")] == promised, "other pages")
        names = ("tree", "values", "chunks", "spots", "base_hashes", "bases")
        tree, values, hashes, spots, *bases = (b"".join(self.read(w, here) for w in part[k]) for k in names)
        bases = list(zip(*map(struct.iter_unpack, ("32s", "<IQIBBI"), bases)))
        nodes, leaves = json.loads(tree)["nodes"], json.loads(tree)["leaves"]
        streams, regions, most = {}, [], logical["chunk_bytes_max"]
        for leaf in leaves:
            item = dtype_of(leaf[1]).itemsize
            unit = most - most % item if 0 < item <= most else most
            for box in leaf[5] or [[[0] * len(leaf[2]), leaf[2], False]]:
                nbytes = math.prod(box[1]) * item
                key = (leaf[3], leaf[1]) if nbytes < logical["small_leaf_bytes"] else len(regions)
                stream = streams.setdefault(key, {"unit": unit, "nbytes": 0, "data": bytearray()})
                regions.append((leaf, box, stream, stream["nbytes"], nbytes))
                stream["nbytes"] += nbytes
        chunks = zip(struct.iter_unpack("32s", hashes), struct.iter_unpack("<IQIBBI", spots))
        for stream in streams.values():
            for start in range(0, stream["nbytes"], stream["unit"]):
                nbytes = min(stream["unit"], stream["nbytes"] - start)
                stream["data"] += self.chunk(*next(chunks), nbytes, bases, part["packs"])
        check(next(chunks, None) is None and len(hashes) == 32 * logical["count"], "a wrong number of chunks")
        for leaf, box, stream, start, nbytes in regions:
            held = pieces.setdefault(leaf[0], (leaf, {}))[1]
            held.setdefault(str(box), (box, stream["data"][start : start + nbytes]))
        return nodes, leaves, json.loads(values)

    def chunk(self, digest, spot, nbytes, bases, packs):
        pack, offset, length, codec, depth, base = *spot[:5], bases[spot[5]] if spot[4] else None
        check(base is None or base[1][4] == depth - 1, "a chain of another length")
        plain = self.chunk(*base, nbytes, bases, packs) if base else None
        return self.read([*packs[pack], offset, length, nbytes, codec, digest[0].hex()], base=plain)


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
        built = np.dtype(tables, align=node["aligned"])
        return np.dtype((np.record, built)) if node.get("record") else built
    if ML.fullmatch(node):
        return np.dtype(getattr(ml_dtypes, node.lstrip(">"))).newbyteorder(">" if node[0] == ">" else "=")
    bare, _, bits = node.partition(":")
    check(node in FOREIGN or NUMPY.fullmatch(bare), f"unknown element type {node}")
    check(bare[1:] not in ("f12", "f16", "c24", "c32") or int(bits or 63) == np.finfo("g").nmant, "a long double")
    return np.dtype(FOREIGN.get(node, bare))


def planes(stored, nbytes):
    (width, turned, number), at, rows = struct.unpack_from("<BBH", stored), 4, []
    for _ in range(number):
        how, size = struct.unpack_from("<BI", stored, at)
        rows.append((how, stored[at + 5 : at + 5 + size]))
        at += 5 + size
    check(at == len(stored), "bytes left over")
    words = joined(rows, nbytes, width)
    return ((words >> 1) | (words << (8 * width - 1)) if turned else words).tobytes()


def delta(base, stored, nbytes):
    width, ordered, shift = stored[:3]
    rows, at, top = [], 3 + 5 * width, 8 * width - 1
    for how, size in struct.iter_unpack("<BI", stored[3:at]):
        rows.append((how, stored[at : at + size]))
        at += size
    words, old = joined(rows, nbytes, width), np.frombuffer(base, f"<i{width}")
    if shift < 255:  # grouped by the base's exponent
        key = ((old.view(f"<u{width}") & ((1 << top) - 1)) >> shift).astype("u1")
        grouped, words = words, np.empty_like(words)
        words[np.argsort(key, kind="stable")] = grouped
    turn = (lambda x: x ^ ((x >> top) & ((1 << top) - 1))) if ordered else (lambda x: x)
    return turn(((words >> 1).view(f"<i{width}") ^ -(words & 1).view(f"<i{width}")) + turn(old)).tobytes()


def joined(rows, nbytes, width):
    count = nbytes // width
    forms = {0: bytes, 1: lambda row: zstandard.ZstdDecompressor().decompress(row, count), 2: lambda row: row * count}
    rows = [forms[how](row) for how, row in rows]
    check({len(row) * width for row in rows} == {nbytes}, "planes of another length")
    return np.frombuffer(b"".join(rows), np.uint8).reshape(width, -1).T.reshape(-1).view(f"<u{width}")


if __name__ == "__main__":
    run = Run(*sys.argv[1:3])
    for path, array in sorted(run.load(run.find(*map(int, sys.argv[3:])))[1].items()):
        print(path, np.asarray(array).dtype, np.shape(array), blake3(np.asarray(array).tobytes()).hexdigest())
