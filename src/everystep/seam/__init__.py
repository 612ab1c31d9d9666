"""The one seam to the outside: files, clock, randomness, threads and processes come in through here."""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from everystep.seam.threads import Pool, Task

if sys.platform != "win32":
    import fcntl

__all__ = ["REAL", "Files", "Pool", "Process", "Seam", "Task"]
SYNC_FILE_RANGE_WRITE = 2
_RANKS_HERE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE")
NICE_MAX = 19
_LOADED = time.time()


class Files:
    """The file calls of the operating system that local storage needs, so that tests can fail any of them."""

    def create(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)

    def open_read(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        return os.preadv(fd, [into], offset)

    def set_direct(self, fd: int, on: bool) -> bool:
        """Has whole blocks go from this process's memory to the disk, or no longer; False where nothing changed."""
        if not hasattr(os, "O_DIRECT"):
            return False
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except OSError:  # not on this file system
            return False
        return True

    def begin_sync(self, fd: int, start: int, nbytes: int) -> None:
        """Has the system begin to write these bytes to the disk, where it can be asked to. Whether they got there is
        what `fsync` says."""
        begin = _sync_file_range()
        if begin is not None:
            begin(fd, start, nbytes, SYNC_FILE_RANGE_WRITE)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        os.link(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def fsync_folder(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def names(self, path: str) -> list[tuple[str, bool]]:
        """(name, is a folder) of everything in a folder."""
        with os.scandir(path) as entries:
            return [(e.name, _is_folder(e)) for e in entries]

    def size(self, path: str) -> int:
        return os.stat(path).st_size

    def modified(self, path: str) -> float:
        return os.stat(path).st_mtime

    def free(self, path: str) -> int:
        """Bytes that this process may still write there."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def absolute(self, path: str) -> str:
        return os.path.abspath(os.path.expanduser(path))

    def own_folder(self, path: str) -> bool:
        """Makes a folder that is this user's alone, where it is not there yet; False where it is somebody else's."""
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077

    def open_shared(self, path: str) -> int:
        """A file that several processes read, write and lock; it is made where it is not there yet."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def lock(self, fd: int, *, alone: bool, wait: bool = True) -> bool:
        """Locks an open file, for this process alone or beside others, until it is closed; False where others have it
        and nobody is to wait."""
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def is_at(self, fd: int, path: str) -> bool:
        """Whether an open file is still the one at a path."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(path))
        except FileNotFoundError:
            return False

    def nbytes(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def map(self, fd: int, nbytes: int) -> memoryview:
        """The first bytes of an open file, without a copy of them; they stay when it is closed, or removed."""
        return memoryview(mmap.mmap(fd, nbytes, prot=mmap.PROT_READ))

    def remove_tree(self, path: str) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def read_text(self, path: str) -> str:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads to itself: no reason to see nothing of the folder


@dataclass(frozen=True)
class Process:
    """Who is writing: enough to tell, on the same machine, whether that process still lives."""

    host: str
    machine: str
    boot: str
    pid: int
    started: str


class Seam:
    """The real outside. Tests hand in a subclass with another clock, other files or another process table."""

    def __init__(self, files: Files | None = None) -> None:
        self.files = files or Files()

    # clock and chance
    def now(self) -> float:
        return time.time()

    def local_time(self, seconds: float) -> str:
        """A time as local date and time; as it is, where no calendar reaches."""
        try:
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
        except (OverflowError, ValueError, OSError):
            return f"{seconds:g} s"

    def monotonic(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def token(self, size: int) -> str:
        """`size` random bytes, in hexadecimal."""
        return os.urandom(size).hex()

    # threads
    def start(self, target: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    def pool(self, workers: int, name: str, begin: Callable[[], None] | None = None) -> Pool:
        return Pool(workers, name, begin)

    def step_back(self, nice: int) -> None:
        """Lowers the priority of the calling thread, for good, where threads have one each: `nice` as of the command
        of that name. Where they have not, nothing happens."""
        if not nice or not sys.platform.startswith("linux"):
            return
        thread = threading.get_native_id()
        try:
            os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + nice, NICE_MAX))
        except OSError:
            return  # a system that does not let it: the thread keeps the priority that it has

    def memory(self) -> int | None:
        """Bytes of memory that this process may hold, by the machine or its control group; None if nobody says."""
        try:
            machine = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        except (AttributeError, ValueError, OSError):
            machine = []
        return min([*machine, *_memory_limits()], default=None)

    def condition(self) -> threading.Condition:
        return threading.Condition()

    def lock(self) -> Any:
        return threading.RLock()

    def in_main_thread(self) -> bool:
        return threading.current_thread() is threading.main_thread()

    # processes
    def pid(self) -> int:
        return os.getpid()

    def process(self) -> Process:
        namespace = _link("/proc/self/ns/pid")
        return Process(
            host=socket.gethostname(),
            machine=_text("/etc/machine-id"),
            boot=f"{_text('/proc/sys/kernel/random/boot_id')} {namespace}".strip(),
            pid=os.getpid(),
            started=_life(os.getpid())[1],
        )

    def began(self) -> float:
        """When this process began, by the clock of `now`."""
        ticks = _life(os.getpid())[1]
        if not ticks:
            return _LOADED
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(ticks) / os.sysconf("SC_CLK_TCK")

    def is_gone(self, other: Process) -> bool:
        """True only where this machine can know that the process does not exist any more."""
        here = self.process()
        if other.boot != here.boot:
            return bool(here.machine) and other.machine == here.machine and other.boot[:36] != here.boot[:36]
        if not here.boot and other.host != here.host:
            return False
        try:
            os.kill(other.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        state, started = _life(other.pid)
        # One that has ended and was not waited for by its parent still has its entry; one whose entry may not be
        # read lives, as far as can be known.
        return state in ("Z", "X") or ("" not in (started, other.started) and started != other.started)

    def environ(self, name: str) -> str | None:
        return os.environ.get(name)

    def cache_folder(self) -> str | None:
        """Where this user's programs may keep what can be made anew; made if need be, None where there is none."""
        home = os.path.expanduser("~")
        kinds = {"darwin": f"{home}/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", "")}
        general = os.environ.get("XDG_CACHE_HOME") or kinds.get(sys.platform) or f"{home}/.cache"
        folder = os.environ.get("EVERYSTEP_CACHE") or os.path.join(general, "everystep")
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
        except OSError:
            return None
        return folder

    def ask(self, *command: str, seconds: float = 3.0) -> str | None:
        """What a command prints, or None where it is missing, fails or takes too long."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    def run_script(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: str,
        seconds: float,
        heard: Callable[[str], None],
    ) -> int | None:
        """Runs a command to its end; its exit code, or None if it was ended, with all it had started, for taking too
        long. What it prints goes into the file `output`, and to `heard` as it comes."""
        with open(output, "wb") as sink, open(output, encoding="utf-8", errors="replace") as source:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip
            limit = time.monotonic() + seconds
            earlier = signal.getsignal(signal.SIGTERM)
            if self.in_main_thread():  # who is ended in between must not leave it running
                signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            try:
                while True:
                    try:
                        return process.wait(0.05)
                    except subprocess.TimeoutExpired:
                        heard(source.read())
                    if time.monotonic() > limit:
                        return None
            finally:
                if self.in_main_thread():
                    signal.signal(signal.SIGTERM, earlier)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                heard(source.read())

    def host_folder(self) -> str | None:
        """Where processes of this user on this host meet, for a while; None on a system without such locks."""
        if sys.platform == "win32":
            return None
        return os.path.join(tempfile.gettempdir(), f"everystep-{os.getuid()}")

    def ranks_here(self) -> int:
        """How many processes of this job run on this host, as the launcher says; 1 if none says."""
        said = next((found for name in _RANKS_HERE if (found := self.environ(name))), "1")
        first = re.match(r"\d{1,6}", said)  # Slurm says "8(x2),4"
        return max(int(first[0]), 1) if first else 1

    def scratch_folder(self, parent: str | None) -> tempfile.TemporaryDirectory[str]:
        """A new folder in `parent`, or where the system has such; leaving the context removes it with all in it."""
        return tempfile.TemporaryDirectory(prefix="everystep-", dir=parent, ignore_cleanup_errors=True)

    def add_line(self, path: str, line: str) -> None:
        """Adds a line to a text file that several processes write."""
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def tell(self, line: str) -> None:
        """A line for the person at the terminal."""
        print(line, file=sys.stderr, flush=True)

    # the end of the process
    def at_exit(self, function: Callable[[], None]) -> Callable[[], None]:
        """Calls the function at exit; the answer takes that back."""
        atexit.register(function)
        return lambda: atexit.unregister(function)

    def on_signals(self, stop: Callable[[str], None]) -> Callable[[], None]:
        """Calls `stop(name)` on SIGTERM and SIGINT, then a handler of the user's that was there; a second signal
        goes where the first would have gone without us. The answer takes that back."""
        if not self.in_main_thread():
            return lambda: None
        before: dict[int, Any] = {}
        own = os.getpid()

        def handle(number: int, frame: Any) -> None:
            earlier = before.get(number)
            signal.signal(number, earlier if earlier is not None else signal.SIG_DFL)
            if os.getpid() != own:  # a forked child, such as a loader's worker, has no loop to end
                os.kill(os.getpid(), number)
                return
            stop(signal.Signals(number).name)
            if callable(earlier) and earlier is not signal.default_int_handler:
                earlier(number, frame)

        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)

        def restore() -> None:
            for number, earlier in before.items():
                if signal.getsignal(number) is handle:
                    signal.signal(number, earlier if earlier is not None else signal.SIG_DFL)

        return restore


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The system's own call; Python has none. It runs without the interpreter lock."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return cast(Callable[[int, int, int, int], int], found)


def _memory_limits() -> Iterator[int]:
    """What the control groups of this process, and those around them, may hold."""
    for line in _text("/proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, name = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if kinds else ("/sys/fs/cgroup", "memory.max")
        parts = path.strip("/").split("/")
        for count in range(len(parts), -1, -1):
            text = _text("/".join([root, *parts[:count], name]))
            if text.isdigit():
                yield int(text)


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _life(pid: int) -> tuple[str, str]:
    """The kernel's state of a process, and its start time (ticks since boot), which tells a reused pid from the
    process that had it."""
    found = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (found[0], found[19]) if len(found) > 19 else ("", "")


REAL = Seam()
