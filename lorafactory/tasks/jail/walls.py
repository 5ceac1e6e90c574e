"""What a program may not do, asked of Linux: namespaces, mounts, rights and limits, by way of the C library, since
Python has os.unshare from 3.12 on and no mount. Everything raises OSError where the system refuses.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

ROOT = "/proc"  # where the new root is built: a folder that every Linux has and that nothing below is taken from
SHOWN = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
NEW_MOUNTS, NEW_IPC, NEW_USERS, NEW_PIDS, NEW_NETWORK = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
NO_SUID, NO_DEVICES, NO_EXECUTION, BIND, RECURSIVE, PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
DEATH_SIGNAL, DUMPABLE, NO_NEW_RIGHTS = 1, 4, 38  # of prctl


def own_users(proc: int, user: int, group: int) -> None:
    """A namespace of users that holds this one alone, with all rights inside, and that no further one can be made in."""
    _call("unshare", NEW_USERS)
    write(proc, "self/setgroups", "deny")
    write(proc, "self/uid_map", f"{user} {user} 1")
    write(proc, "self/gid_map", f"{group} {group} 1")
    write(proc, "sys/user/max_user_namespaces", "0")


def leave_the_system(proc: int) -> None:
    """No network and no shared objects; children see no process but their own."""
    _call("unshare", NEW_PIDS | NEW_NETWORK | NEW_IPC)
    with suppress(OSError):  # not every kernel lets a user namespace do it
        write(proc, "sys/kernel/shmall", "0")  # of the new IPC namespace: no memory that no process's limit counts


def shut(size: int, user: int, group: int) -> None:
    """A root that holds the interpreter's folders and the system's libraries, read-only, and a writable /tmp, where it
    leaves the process. The mounts are this process's and its children's own."""
    _call("unshare", NEW_MOUNTS)
    os.umask(0o022)
    _mount("none", "/", None, RECURSIVE | PRIVATE)
    _mount("lorafactory", ROOT, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    for place in dict.fromkeys((*SHOWN, sys.base_prefix, sys.base_exec_prefix)):
        if os.path.islink(place):
            os.makedirs(os.path.dirname(ROOT + place), exist_ok=True)
            os.symlink(os.readlink(place), ROOT + place)
        elif os.path.exists(place):
            folder = place if os.path.isdir(place) else os.path.dirname(place)
            os.makedirs(ROOT + folder, exist_ok=True)
            if folder != place:
                open(ROOT + place, "x").close()
            _mount(place, ROOT + place, None, BIND | RECURSIVE)
    os.mkdir(ROOT + "/tmp")
    read_only = (ctypes.c_uint64 * 4)(1 | NO_SUID)  # struct mount_attr: MOUNT_ATTR_RDONLY and _NOSUID, to set
    at_here, recursive, size_of = ctypes.c_long(-100), ctypes.c_long(0x8000), ctypes.c_long(32)
    _call("syscall", ctypes.c_long(442), at_here, ROOT.encode(), recursive, read_only, size_of)  # mount_setattr
    options = f"size={size},nr_inodes=1000,mode=700,uid={user},gid={group}"
    _mount("lorafactory", ROOT + "/tmp", "tmpfs", NO_SUID | NO_DEVICES | NO_EXECUTION, options)
    os.chdir(ROOT)
    _call("pivot_root", b".", b".")  # the old root now lies over the new one,
    _call("umount2", b".", 2)  # until here
    os.chdir("/tmp")


def drop(proc: int, root: bool, user: int, group: int) -> None:
    """No rights and none to be had; dies with its parent; and no child of the same user can look into it."""
    if root:
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
        _call("prctl", DUMPABLE, 1, 0, 0, 0)  # else its own maps are root's
        with suppress(OSError):  # where users may not have namespaces, the program cannot make one either
            own_users(proc, user, group)
    _call("prctl", NO_NEW_RIGHTS, 1, 0, 0, 0)
    _call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    _call("prctl", DUMPABLE, 0, 0, 0, 0)
    _call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def limit(order: dict[str, Any]) -> None:
    """The limits of each process, for this one and its children."""
    for which, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_FSIZE, order["file_bytes"], order["file_bytes"]),
        (resource.RLIMIT_NPROC, order["processes"], order["processes"]),
        (resource.RLIMIT_CPU, order["cpu_seconds"], order["cpu_seconds"] + 1),
        (resource.RLIMIT_AS, order["memory_bytes"], order["memory_bytes"]),
    ):
        most = resource.getrlimit(which)[1]
        resource.setrlimit(
            which, (soft, hard) if most == resource.RLIM_INFINITY else (min(soft, most), min(hard, most))
        )


def write(proc: int, file: str, text: str) -> None:
    handle = os.open(file, os.O_WRONLY, dir_fd=proc)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), options.encode())


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        said = [a.decode() for a in arguments if isinstance(a, bytes) and a]
        raise OSError(f"{' '.join([name, *said])}: {os.strerror(ctypes.get_errno())}")
