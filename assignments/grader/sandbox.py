"""What a process gives up before it runs a submission. Elsewhere than on Linux that is little.

Each layer works without the others, with or without root, inside or outside a container:
  limits    time, memory, size of files, number of open files (setrlimit)
  user      run as the user nobody, if the grader is root and that user may read Python
  files     read Python and the submission, write one scratch folder, nothing else (Landlock)
  calls     no network, no new processes, no signals to others, no tracing (seccomp)
"""

import ctypes
import os
import platform
import resource
import stat
import struct
import sys
from pathlib import Path

NOBODY = 65534
# System calls by machine. The first line of those refused: forks, signals, tracing, reading another
# process, io_uring. The second: changes of modes, owners, times and attributes, since Landlock
# does not stop these.
NUMBERS = {
    "x86_64": {
        "refused": (
            *(57, 58, 62, 101, 200, 234, 310, 311, 424, 425, 434, 438),
            *(90, 91, 92, 93, 94, 260, 268, 280, 188, 189, 190, 452),
        ),
        **{"socket": 41, "clone": 56, "clone3": 435, "arch": 0xC000003E},
    },
    "aarch64": {
        "refused": (
            *(117, 129, 130, 131, 270, 271, 424, 425, 434, 438),
            *(52, 53, 54, 55, 88, 5, 6, 7, 452),
        ),
        **{"socket": 198, "clone": 220, "clone3": 435, "arch": 0xC00000B7},
    },
}
libc = ctypes.CDLL(None, use_errno=True)


def confine(scratch: Path, readable: list[Path], seconds: int, memory: int) -> list[str]:
    """Give up what a submission must not have. Returns the layers that are in force."""
    set_limits(seconds, memory)
    drop = os.getuid() == 0 and all_may_read(readable)
    if drop:
        os.chown(scratch, NOBODY, NOBODY)
    layers = ["limits"]
    if sys.platform != "linux":
        return layers
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no way back through a setuid program
    layers += ["files"] * restrict_files(scratch, readable)
    if drop:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        layers.append("user")
    # A process that stays root, because others may not read its Python, loses root's powers.
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    return layers + ["calls"] * restrict_calls()


def set_limits(seconds: int, memory: int):
    """memory: bytes of address space on top of what the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: pages * resource.getpagesize() + memory,
        resource.RLIMIT_FSIZE: 2**24,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for what, value in limits.items():
        try:
            resource.setrlimit(what, (value, value))
        except (ValueError, OSError):
            continue  # a lower hard limit is in force already


def all_may_read(folders: list[Path]) -> bool:
    """Whether every user may enter these folders and read them."""
    for folder in folders:
        for place in (folder, *folder.parents):
            needed = stat.S_IXOTH if place.is_dir() else stat.S_IROTH
            if place.exists() and not place.stat().st_mode & needed:
                return False
    return True


def restrict_files(scratch: Path, readable: list[Path]) -> bool:
    """Landlock (Linux 5.13): from here on only what lies under these folders can be opened."""
    handled = 0x1FFF  # all rights of the first version: execute, read, write, make, remove
    version = libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    handled |= (0x2000 if version >= 2 else 0) | (0x4000 if version >= 3 else 0)
    attributes = struct.pack("Q", handled)
    ruleset = libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    allow(ruleset, scratch, 0x1FFF & ~0x1 | handled & 0x4000)
    for folder in readable:
        if folder.exists():
            rights = 0x1 | 0x4 | (0x8 if folder.is_dir() else 0)  # execute, read, list
            allow(ruleset, folder, rights)
    allow(ruleset, Path("/dev/null"), 0x4 | 0x2)
    return libc.syscall(446, ctypes.c_int(ruleset), ctypes.c_uint32(0)) == 0


def allow(ruleset: int, folder: Path, rights: int):
    """Add a rule: these rights for everything under a folder."""
    place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, place)
    libc.syscall(445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    os.close(place)


def restrict_calls() -> bool:
    """seccomp: forks, sockets, signals to others and tracing fail with "not permitted"."""
    numbers = NUMBERS.get(platform.machine())
    if numbers is None:
        return False
    # A program of (code, jump if true, jump if false, value); each rule ends in an answer.
    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    allowed, no, not_there = 0x7FFF0000, 0x00050001, 0x00050000 + 38
    program = [(load, 0, 0, 4), (equal, 1, 0, numbers["arch"]), (answer, 0, 0, no), (load, 0, 0, 0)]
    for number in (*numbers["refused"], numbers["socket"]):
        program += [(equal, 0, 1, number), (answer, 0, 0, no)]
    # A thread is a clone with CLONE_THREAD. A filter cannot see the flags of clone3, so that call
    # "does not exist", and libc uses clone instead.
    program += [(equal, 0, 1, numbers["clone3"]), (answer, 0, 0, not_there)]
    program += [(equal, 0, 3, numbers["clone"]), (load, 0, 0, 16)]
    program += [(any_bit, 1, 0, 0x10000), (answer, 0, 0, no), (answer, 0, 0, allowed)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    return libc.prctl(22, 2, filters, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
