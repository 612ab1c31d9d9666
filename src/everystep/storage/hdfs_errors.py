"""What hdfs-native raises, in everystep's own errors."""

from __future__ import annotations

import re

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

_ANSWER = re.compile(r'RPCError\("([\w.$]*)", "(.*)"\)', re.DOTALL)
"""The NameNode's answer to a call: an exception's class, and its text with a stack behind it."""
_PASSING = {
    "SafeModeException", "RetriableException", "StandbyException", "NotReplicatedYetException", "LeaseExpiredException",
    "ServerTooBusyException", "ObserverRetryOnActiveException",
}  # fmt: skip
_REFUSED = {"AccessControlException", "AuthorizationException", "InvalidToken", "SecretManager$InvalidToken"}
_FULL = {"NSQuotaExceededException", "DSQuotaExceededException", "QuotaByStorageTypeExceededException",
         "QuotaExceededException"}  # fmt: skip
_NOT_PLACED = re.compile(r"could only be (?:replicated|written) to 0.*There are (\d+) datanode.*?(no|\d+) node")
_DO_REFUSED = "check HADOOP_USER_NAME or the Kerberos ticket (klist), and who may do what there (hdfs dfs -ls -d)"
_DO_SILENT = "check the NameNode: host, port, DataNodes (hdfs dfsadmin -report); earlier checkpoints are whole"
_DO_FULL = "free space, or have the quota raised (hdfs dfs -count -q); every earlier checkpoint is whole"


def silent(verb: str, where: str, seconds: float) -> StorageError:
    """For a call that nothing answers."""
    return _lost(verb, f"HDFS has not answered for {seconds:g} s", where)


def explain(error: BaseException, verb: str, where: str) -> StorageError | Damaged:
    """
    Args:
        verb: of the storage; "rename" for the call that makes an object appear, of which alone it matters whether it
            was carried out.
    """
    if isinstance(error, FileNotFoundError):
        if verb == "rename":  # what should have been renamed is gone: an earlier call, sent twice, may have done it
            return UnknownOutcome("the file is not where it was written", where=where, do="look at the run's log")
        return ObjectMissing("no such file", where=where)
    if isinstance(error, FileExistsError):
        if verb == "put":  # the name was drawn for this one file: an earlier call, sent twice, has made it
            return Unreachable("a call was answered twice", where=where, do=_DO_SILENT)
        return AlreadyExists("the file is there already", where=where)
    if isinstance(error, IsADirectoryError):
        return Damaged("a folder lies where a file belongs", where=where, do="run fsck")
    if isinstance(error, NotImplementedError):
        return StorageError(f"hdfs-native cannot do this: {error}", where=where, do="take a folder without encryption")
    text = str(error)
    if text == "ChecksumError":
        return Damaged("a block does not have its checksum", where=where, do="run hdfs fsck, and everystep fsck")
    answer = _ANSWER.match(text)
    if answer is not None:
        said = answer[2].replace("\\n", "\n").replace('\\"', '"')
        return _answered(answer[1].rpartition(".")[2], said.partition("\n")[0], verb, where)
    if re.match(r"SASLError|GSSAPIError|NoSASLMechanism", text):
        return StorageError("HDFS does not let this process in", where=where, do=_DO_REFUSED)
    return _lost(verb, f"HDFS cannot be reached: {_short(text)}", where)


def _answered(kind: str, said: str, verb: str, where: str) -> StorageError:
    if kind in _PASSING or any(name in said for name in _PASSING):
        return Unreachable(f"HDFS is not ready: {_short(said)}", where=where, do=_DO_SILENT)
    if kind in _REFUSED:
        if verb in ("get", "list", "stat"):
            return StorageError(f"cannot read this: {_short(said)}", where=where, do=_DO_REFUSED)
        return ReadOnly(f"cannot write here: {_short(said)}", where=where, do=_DO_REFUSED)
    if kind in _FULL:
        return StorageFull(f"a quota is used up: {_short(said)}", where=where, do=_DO_FULL)
    placed = _NOT_PLACED.search(said)
    if placed is not None:
        if int(placed[1]) > 0 and placed[2] == "no":
            return StorageFull(f"no DataNode takes a block: {_short(said)}", where=where, do=_DO_FULL)
        return Unreachable(f"no DataNode is there: {_short(said)}", where=where, do=_DO_SILENT)
    if kind == "ParentNotDirectoryException":
        return StorageError("a file lies where a folder should be", where=where, do="give another folder")
    return StorageError(f"HDFS answers {kind}: {_short(said)}", where=where, do=_DO_SILENT)


def _lost(verb: str, what: str, where: str) -> StorageError:
    if verb == "rename":
        return UnknownOutcome(f"{what}; the file may be there or not", where=where, do=_DO_SILENT)
    return Unreachable(what, where=where, do=_DO_SILENT)


def _short(text: str) -> str:
    return text.strip() if len(text) <= 300 else f"{text[:300].strip()} …"
