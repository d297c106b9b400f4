"""The seccomp filter: which system calls a sandboxed process may make. A list of allowed ones; all others
fail.

Numbers are (x86_64, aarch64), as in the kernel's asm/unistd_64.h and asm-generic/unistd.h; None where there
is no such call.
"""

import errno
import struct
from collections.abc import Iterable

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> (column of the tables, AUDIT_ARCH constant)."""

Numbers = dict[str, tuple[int | None, int | None]]

# fmt: off
_COMPUTE: Numbers = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "close": (3, 57), "lseek": (8, 62), "fstat": (5, 80), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233), "futex": (202, 98), "futex_waitv": (449, 449), "set_robust_list": (273, 99),
    "get_robust_list": (274, 100), "rseq": (334, 293), "set_tid_address": (218, 96), "membarrier": (324, 283),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160),
    "getrandom": (318, 278), "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "getpid": (39, 172), "gettid": (186, 178),
    "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158), "getpriority": (140, 141),
    "getrlimit": (97, 163), "arch_prctl": (158, None), "exit": (60, 93), "exit_group": (231, 94),
    "getcpu": (309, 168), "recvfrom": (45, 207), "shutdown": (48, 210), "getsockopt": (55, 209),
    "setsockopt": (54, 208), "getsockname": (51, 204), "getpeername": (52, 205),
}

_FILES: Numbers = {
    "open": (2, None), "openat": (257, 56), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "statfs": (137, 43), "fstatfs": (138, 44),
    "umask": (95, 166), "creat": (85, None), "unlink": (87, None), "unlinkat": (263, 35), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "fsync": (74, 82), "fdatasync": (75, 83), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "utimensat": (280, 88), "flock": (73, 32), "copy_file_range": (326, 285), "sendfile": (40, 71),
    "fadvise64": (221, 223),
}

# What programs try and libraries have no fallback for: "not permitted" tells more than "no such call".
_REFUSED: Numbers = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "sendmsg": (46, 211),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "tkill": (200, 130),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mount": (165, 40),
    "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "prctl": (157, 167),
    "setuid": (105, 146), "setgid": (106, 144), "setresuid": (117, 147), "setresgid": (119, 149),
    "bpf": (321, 280),
}

_CLONE: tuple[int, int] = (56, 220)
_KILL: tuple[int, int] = (62, 129)
_TGKILL: tuple[int, int] = (234, 131)
_PRLIMIT64: tuple[int, int] = (302, 261)
_SENDTO: tuple[int, int] = (44, 206)
_SOCKETPAIR: tuple[int, int] = (53, 199)
_FCNTL: tuple[int, int] = (72, 25)
_IOCTL: tuple[int, int] = (16, 29)
# fmt: on

_CLONE_THREAD = 0x00010000
_AF_UNIX = 1
# They name a process that gets a signal of the caller's choice when a descriptor is ready: kill by another
# name.
_FCNTL_OWNER_COMMANDS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX
_IOCTL_OWNER_COMMANDS = (0x8901, 0x8902, 0x5412)  # FIOSETOWN, SIOCSPGRP; TIOCSTI types into a terminal

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_OR_EQUAL, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_X32_CALLS = 0x40000000  # a second table of x86_64 with the same architecture constant


def seccomp_filter(machine: str, pid: int, files: bool) -> bytes:
    """The filter as the kernel's array of `sock_filter`.

    Args:
        machine: as `os.uname` gives it, one of `ARCHITECTURES`.
        pid: the only process that may be signalled.
        files: whether paths may be opened at all.

    Raises:
        OSError: the machine has no table.
    """
    if machine not in ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"seccomp: no system call table for {machine}")
    column, audit_arch = ARCHITECTURES[machine]
    refuse = _returns(_FAIL | errno.EPERM)
    code = _load(4) + _step(_JUMP_EQUAL, 1, 0, audit_arch) + _returns(_KILL_PROCESS)
    code += _load(0) + _step(_JUMP_GREATER_OR_EQUAL, 0, 1, _X32_CALLS) + _returns(_FAIL | errno.ENOSYS)
    allowed = _COMPUTE | _FILES if files else _COMPUTE
    for number in _column(allowed, column):
        code += _step(_JUMP_EQUAL, 0, 1, number) + _returns(_ALLOW)
    for number in _column(_REFUSED if files else _REFUSED | _FILES, column):
        code += _step(_JUMP_EQUAL, 0, 1, number) + refuse
    code += _only_if(_CLONE[column], _step(_JUMP_BITS, 0, 1, _CLONE_THREAD), argument=0)
    code += _only_if(_KILL[column], _step(_JUMP_EQUAL, 0, 1, pid), argument=0)
    code += _only_if(_TGKILL[column], _step(_JUMP_EQUAL, 0, 1, pid), argument=0)
    code += _only_if(_SOCKETPAIR[column], _step(_JUMP_EQUAL, 0, 1, _AF_UNIX), argument=0)
    code += _only_if_null(_PRLIMIT64[column], argument=2)
    code += _only_if_null(_SENDTO[column], argument=4)
    code += _unless(_FCNTL[column], _FCNTL_OWNER_COMMANDS, argument=1)
    code += _unless(_IOCTL[column], _IOCTL_OWNER_COMMANDS, argument=1)
    return code + _returns(_FAIL | errno.ENOSYS)


def _step(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _load(offset: int) -> bytes:
    return _step(_LOAD, 0, 0, offset)


def _returns(value: int) -> bytes:
    return _step(_RETURN, 0, 0, value)


def _argument(index: int, high: bool = False) -> bytes:
    return _load(16 + 8 * index + (4 if high else 0))


def _block(number: int, body: bytes) -> bytes:
    return _step(_JUMP_EQUAL, 0, len(body) // 8, number) + body


def _only_if(number: int, test: bytes, argument: int) -> bytes:
    """`test` goes on to the next step where the call is fine, and over it where not."""
    return _block(number, _argument(argument) + test + _returns(_ALLOW) + _returns(_FAIL | errno.EPERM))


def _only_if_null(number: int, argument: int) -> bytes:
    low = _argument(argument) + _step(_JUMP_EQUAL, 0, 3, 0)
    high = _argument(argument, high=True) + _step(_JUMP_EQUAL, 0, 1, 0)
    return _block(number, low + high + _returns(_ALLOW) + _returns(_FAIL | errno.EPERM))


def _unless(number: int, values: Iterable[int], argument: int) -> bytes:
    tests = b"".join(_step(_JUMP_EQUAL, 0, 1, value) + _returns(_FAIL | errno.EPERM) for value in values)
    return _block(number, _argument(argument) + tests + _returns(_ALLOW))


def _column(table: Numbers, column: int) -> list[int]:
    return [number for numbers in table.values() if (number := numbers[column]) is not None]
