"""What hdfs-native raises becomes errors of ours: told here without a server, and met in tests_services."""

from __future__ import annotations

import pytest

from everystep.errors import (
    AlreadyExists,
    Damaged,
    ObjectMissing,
    ReadOnly,
    StorageError,
    StorageFull,
    UnknownOutcome,
    Unreachable,
)
from everystep.storage.hdfs_errors import explain, silent

PROTOCOL = "org.apache.hadoop.hdfs.protocol"
STACK = "\\n\\tat org.apache.hadoop.hdfs.server.namenode.FSNamesystem.startFile(FSNamesystem.java:2345)"


def answer(kind: str, said: str) -> RuntimeError:
    """As the library words a NameNode's exception."""
    return RuntimeError(f'RPCError("{kind}", "{said}{STACK}")')


DENIED, PASSING = "org.apache.hadoop.security.AccessControlException", "org.apache.hadoop.ipc.RetriableException"
SAFE_MODE = "org.apache.hadoop.hdfs.server.namenode.SafeModeException"


def not_placed(running: int, excluded: str) -> RuntimeError:
    said = (
        f"File /a could only be replicated to 0 nodes instead of minReplication (=1).  There are {running} datanode(s) "
    )
    return answer("java.io.IOException", f"{said}running and {excluded} node(s) are excluded in this operation.")


TABLE = [
    (FileNotFoundError("/a"), "get", ObjectMissing, ""),
    (FileNotFoundError("/a"), "rename", UnknownOutcome, ""),
    (FileExistsError("/a"), "rename", AlreadyExists, ""),
    (FileExistsError("/.tmp-1"), "put", Unreachable, ""),
    (IsADirectoryError("/a"), "get", Damaged, "folder"),
    (NotImplementedError("File encryption"), "put", StorageError, "File encryption"),
    (OSError("Connection refused (os error 111)"), "get", Unreachable, "Connection refused"),
    (OSError("RPC listener disconnected"), "rename", UnknownOutcome, "may be there"),
    (RuntimeError('DataTransferError("All nodes failed for write")'), "put", Unreachable, "All nodes failed"),
    (RuntimeError("ChecksumError"), "get", Damaged, "checksum"),
    (RuntimeError("NoSASLMechanism"), "get", StorageError, "does not let this process in"),
    (RuntimeError('GSSAPIError(GSS_S_FAILURE, 1, "a ticket")'), "put", StorageError, "does not let this process in"),
    (answer(SAFE_MODE, "Name node is in safe mode."), "put", Unreachable, "safe mode"),
    (answer("org.apache.hadoop.ipc.StandbyException", "Operation category WRITE"), "rename", Unreachable, "not ready"),
    (answer(PASSING, "SafeModeException: in safe mode"), "put", Unreachable, "safe mode"),
    (answer(f"{PROTOCOL}.DSQuotaExceededException", "The DiskSpace quota of /a"), "put", StorageFull, "quota"),
    (answer(f"{PROTOCOL}.NSQuotaExceededException", "The NameSpace quota"), "put", StorageFull, "quota"),
    (answer(DENIED, "Permission denied: user=eve"), "put", ReadOnly, "eve"),
    (answer(DENIED, "Permission denied: user=eve"), "delete", ReadOnly, "eve"),
    (answer(DENIED, "Permission denied: user=eve"), "list", StorageError, "cannot read"),
    (not_placed(1, "no"), "put", StorageFull, "block"),
    (not_placed(1, "1"), "put", Unreachable, "DataNode"),
    (not_placed(0, "no"), "put", Unreachable, "DataNode"),
    (answer("org.apache.hadoop.fs.ParentNotDirectoryException", "/a is one"), "put", StorageError, "file lies"),
    (answer("org.apache.hadoop.HadoopIllegalArgumentException", "no"), "put", StorageError, "HadoopIllegalArgument"),
]


@pytest.mark.parametrize(
    ("error", "verb", "kind", "said"), TABLE, ids=[f"{n}-{kind.__name__}" for n, (_, _, kind, _) in enumerate(TABLE)]
)
def test_each_becomes_ours(error: Exception, verb: str, kind: type[Exception], said: str) -> None:
    found = explain(error, verb, "hdfs://host/a")
    assert type(found) is kind and said in found.what
    assert found.where == "hdfs://host/a"
    assert "FSNamesystem" not in str(found), "a stack of Java says nothing to the reader"
    assert found.do or isinstance(found, (ObjectMissing, AlreadyExists))


def test_quotes_of_the_namenode_are_quotes() -> None:
    said = r"Permission denied: user=eve, access=WRITE, inode=\"/a\":root:supergroup:drwxr-xr-x"
    assert 'inode="/a":root' in explain(answer(DENIED, said), "put_new", "here").what


def test_silence() -> None:
    assert type(silent("stat", "here", 3.0)) is Unreachable
    assert type(silent("rename", "here", 3.0)) is UnknownOutcome


def test_long_words_are_cut() -> None:
    found = explain(OSError("x" * 5000), "get", "here")
    assert len(found.what) < 400
