"""The lock of a run: which process is writing a journal, and whether it still is.

A lock is a symbolic link whose target names its holder. Creating a link is atomic everywhere, NFS included, and the
link comes with its content, so that no lock is ever seen without a holder. A killed process leaves its lock behind; the
next process on the same machine takes it over. The right to remove a dead holder's lock is itself a lock, named after
the dead one, so that of several takers one wins and none removes a live lock.

filelock 4.3.1 (`SoftFileLock`, `StrictSoftFileLock`) was tried in its place. The first takes a killed process whose
parent has not reaped it for alive, takes over the live lock of another machine that has the same host name, refuses
the lock of a killed container although `flock` shows that nobody holds it, and fails with an `IsADirectoryError` at a
folder of the lock's name; the second never takes over a killed process's lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import IO

from expo.errors import EnvironmentFailure, InputError
from expo.files import shown

LOCK_SUFFIX = ".lock"
"""Of the link beside a journal that names the process writing it."""


def alone_here(stream: IO[str], path: Path) -> bool:
    """Whether `flock` shows that no other process on this machine holds the file; False where it does not work."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another run is writing {path.parent}; wait for it, or choose another output") from error
    except OSError:
        return False
    return True


NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})
"""The errors of a file system that has no symbolic links."""

ENDED = frozenset("ZX")
"""The states of a process that has ended and may not have been reaped yet."""

RETRY_SECONDS = 0.01


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock."""

    host: str
    machine: str
    """/etc/machine-id; two machines may have the same host name."""
    boot: str
    """The kernel's boot id, which changes at every reboot."""
    pids: str
    """The pid namespace: in another one (a container), the same pid is another process."""
    pid: int
    born: str
    """When the process started, in clock ticks since boot; pids are reused."""
    nonce: str = ""
    """Distinguishes this lock from the same process's next one."""


UNKNOWN = Holder("", "", "", "", 0, "")


def _content(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _born(pid: int) -> str:
    """When a process started; empty where there is none, "alive" where the system does not tell."""
    if Path("/proc/self/stat").exists():
        fields = _content(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name, in (), may contain anything
        ended = len(fields) < 20 or fields[0] in ENDED
        return "" if ended else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"


def this_process() -> Holder:
    """This process, as the holder of a lock."""
    try:
        pids = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        pids = ""
    boot, machine = _content("/proc/sys/kernel/random/boot_id"), _content("/etc/machine-id")
    return Holder(socket.gethostname(), machine, boot, pids, os.getpid(), _born(os.getpid()))


def is_dead(held: Holder, me: Holder, last_sign: float, *, alone_here: bool) -> bool:
    """Whether the holder of a lock is known to have ended; nothing is known of a holder on another machine.

    Args:
        held: The holder.
        me: This process.
        last_sign: When the lock was last touched, in seconds since 1970.
        alone_here: Whether `flock` has shown that no process on this machine holds the lock.
    """
    if held.boot != me.boot:
        restarted = bool(me.machine) and (held.host, held.machine) == (me.host, me.machine)
        return restarted and last_sign < time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    if held.pids != me.pids:
        return alone_here
    return bool(me.boot or held.host == me.host) and _born(held.pid) != held.born


class RunLock:
    """The lock of a run, acquired when it is created.

    Args:
        path: The lock's path; it guards the folder that contains it.
        alone_here: Whether `flock` has shown that no other process on this machine holds it.

    Raises:
        InputError: Another run holds it, or may hold it; the message names that run.
        OSError: The folder cannot be written.
    """

    def __init__(self, path: Path, *, alone_here: bool) -> None:
        self._path = path
        self._me = replace(this_process(), nonce=secrets.token_hex(8))
        while not _create(path, self._me):
            held, last_sign = _holder(path), _last_sign(path)
            if held is None:
                time.sleep(RETRY_SECONDS)  # it has just been released
            elif is_dead(held, self._me, last_sign, alone_here=alone_here):
                remove_dead(path, held, alone_here=alone_here)
            else:
                raise InputError(_refusal(path, held, self._me))

    def require_held(self) -> None:
        """See that nobody else has been given what this run writes, since it was taken for dead.

        Raises:
            EnvironmentFailure: Another run holds the lock.
        """
        held = _holder(self._path)
        if held is not None and held != self._me and held != UNKNOWN:
            raise EnvironmentFailure(f"another run has taken over {self._path.parent}: it took this one for dead")

    def beat(self) -> None:
        """Renew the lock's timestamp, from which others read when this run was last active."""
        with contextlib.suppress(OSError, NotImplementedError):
            os.utime(self._path, follow_symlinks=False)

    def release(self) -> None:
        """Release the lock; does nothing if this process no longer holds it."""
        with contextlib.suppress(OSError):
            if _holder(self._path) == self._me:
                self._path.unlink()


def _create(path: Path, me: Holder) -> bool:
    """Create the lock; returns whether this process holds it now: NFS may resend a request that had succeeded."""
    return create_once(path, json.dumps(asdict(me), separators=(",", ":"))) or _holder(path) == me


def create_once(path: Path, content: str) -> bool:
    """Create a path together with its short content, as a symbolic link where there are such; False if it is there."""
    try:
        path.symlink_to(content)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _create_file(path, content)
    return True


def content_of(path: Path) -> str:
    """The content of a path that `create_once` created."""
    return str(path.readlink()) if path.is_symlink() else path.read_text(encoding="utf-8")


def _create_file(path: Path, content: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True


def _holder(path: Path) -> Holder | None:
    """The holder of a lock; None where nobody holds it."""
    try:
        held = Holder(**json.loads(content_of(path)))
        return held if held.nonce.isalnum() else UNKNOWN
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError):
        return UNKNOWN


def _last_sign(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return time.time()


def holder_of(pid: int) -> Holder:
    """A process on this machine, as the holder of a lock."""
    return replace(this_process(), pid=pid, born=_born(pid))


def is_locked(journal: Path) -> bool:
    """Whether another run holds a journal, or may hold it; nothing is written to find out."""
    path = lock_of(journal)
    held = _holder(path)
    return held is not None and not is_dead(held, this_process(), _last_sign(path), alone_here=False)


def release(journal: Path, ended: Holder | None) -> bool:
    """Remove the lock of a process that has ended; whether the journal can be taken now.

    Args:
        journal: The journal's file.
        ended: The process that is known to have ended, wherever it ran; None: whichever has ended on this machine.
    """
    path, me = lock_of(journal), this_process()
    held = _holder(path)
    if held is None:
        return _is_unlocked(journal)
    if replace(held, nonce="") != ended and not is_dead(held, me, _last_sign(path), alone_here=False):
        return False
    try:
        remove_dead(path, held)
    except InputError:  # another one is about to remove it
        return False
    return _is_unlocked(journal)


def _is_unlocked(journal: Path) -> bool:
    """Whether nobody has a lock of the file system's own, which may outlive a process on a machine that is gone."""
    try:
        with journal.open("r+") as stream:
            alone_here(stream, journal)
    except FileNotFoundError:
        return True
    except InputError:
        return False
    return True


def lock_of(journal: Path) -> Path:
    """The lock of a journal's writer."""
    return journal.with_name(journal.name + LOCK_SUFFIX)


def remove_dead(path: Path, held: Holder, *, alone_here: bool = False) -> None:
    """Remove the lock of a holder that has ended, and not one that another process has taken meanwhile."""
    right = RunLock(path.with_name(f"{path.name}.{held.nonce}"), alone_here=alone_here)
    try:
        if _holder(path) == held:  # another taker may have been faster, and a new run may hold it
            path.unlink()
    finally:
        right.release()


def _refusal(path: Path, held: Holder, me: Holder) -> str:
    if held.boot == me.boot and held.host == me.host:
        return f"another run (process {held.pid}) is writing {path.parent}; wait for it, or choose another output"
    who = f"process {held.pid} on {shown(held.host)}" if held.host else "of unknown origin"
    ago = timedelta(seconds=max(0, int(time.time() - _last_sign(path))))
    return f"another run ({who}, last active {ago} ago) is writing {path.parent}; if it is dead, remove {path}"
