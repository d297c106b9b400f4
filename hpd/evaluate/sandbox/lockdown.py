"""What a sandboxed process gives up, in order: namespaces, limits, privileges, system calls.

Runs inside the sandbox before any untrusted line, so it imports the standard library only. Each step raises
OSError where the system refuses it. Linux only; the manual pages are namespaces(7), pivot_root(2),
capabilities(7), seccomp(2).
"""

import ctypes
import errno
import os
import resource
import signal
import sys
import sysconfig
from pathlib import Path

from syscalls import seccomp_filter

_CLONE_NEWUSER, _CLONE_NEWNS, _CLONE_NEWPID = 0x10000000, 0x00020000, 0x20000000
_CLONE_NEWNET, _CLONE_NEWIPC, _CLONE_NEWUTS = 0x40000000, 0x08000000, 0x04000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 38, 22
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522

_NOBODY = 65534
# Above every range that distributions hand out.
_FIRST_UID = 1_990_000_000

_libc = ctypes.CDLL(None, use_errno=True)


def enter_namespaces(scratch_mib: int) -> None:
    """Leave the host's processes, network, mounts and host name; the caller's next fork is process 1 of the
    new ones.

    The new root holds the standard library and system libraries (read-only) and an empty /tmp of
    `scratch_mib`; there is no /proc and no /sys. As root this needs no user namespace, otherwise one is made.
    """
    flags = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    if os.geteuid() != 0 or _libc.unshare(flags) != 0:
        uid, gid = os.geteuid(), os.getegid()
        _check(_libc.unshare(flags | _CLONE_NEWUSER), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{_NOBODY} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{_NOBODY} {gid} 1")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _change_root(scratch_mib)


def limit_resources(
    cpu_seconds: int, memory_mib: int, scratch_mib: int, open_files: int, threads: int
) -> None:
    """Hard limits of this process and its children. Hard and soft are one: reaching the processor time is a
    SIGKILL."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_mib * 2**20,
        resource.RLIMIT_FSIZE: scratch_mib * 2**20,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_NPROC: threads,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def drop_privileges(supervisor_pid: int) -> None:
    """No capability, no way to get one back, not readable by processes of the same user, dead with the
    parent.

    Root becomes a user of its own for each sandbox, numbered after the supervisor's process id.
    """
    if os.geteuid() == 0:
        os.setgroups([])
        for uid in (_FIRST_UID + supervisor_pid, _NOBODY):
            try:
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                break
            except OSError:  # a container that maps few users: its root without capabilities is what is left
                continue
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    for option, value in (
        (_PR_SET_NO_NEW_PRIVS, 1),
        (_PR_SET_DUMPABLE, 0),
        (_PR_SET_PDEATHSIG, int(signal.SIGKILL)),
    ):
        _check(_libc.prctl(option, value, 0, 0, 0), "prctl")


def filter_system_calls(files: bool) -> None:
    """Allow computing and threads, and files where `files`; no process, socket, signal to others, or change
    of limits."""
    content = seccomp_filter(os.uname().machine, os.getpid(), files)

    class FilterProgram(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    program = FilterProgram(len(content) // 8, content)
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0), "seccomp")


def _change_root(scratch_mib: int) -> None:
    base = next(path for path in ("/tmp", "/mnt", "/run", "/var") if os.path.isdir(path))
    # Descriptors, since the new root may cover the sources: a Python below /tmp.
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in _visible_paths()}
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4k,mode=755")
    os.mkdir(base + "/tmp")  # before the sources, which may lie in it
    scratch = f"size={scratch_mib}m,nr_inodes=1k,mode=1777"
    _mount("tmpfs", base + "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, scratch)
    for path, source in sources.items():
        target = base + path
        if os.path.isdir(f"/proc/self/fd/{source}"):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(f"/proc/self/fd/{source}", target, None, _MS_BIND)
        _remount_read_only(target, devices=path.startswith("/dev/"))
        os.close(source)
    for link in ("/lib", "/lib64", "/bin"):
        if os.path.islink(link) and not os.path.lexists(base + link):
            os.symlink(os.readlink(link), base + link)
    for path in _hidden_paths():
        if os.path.isdir(base + path):
            _mount(
                "tmpfs",
                base + path,
                "tmpfs",
                _MS_NOSUID | _MS_NODEV | _MS_RDONLY,
                "size=4k,nr_inodes=2,mode=755",
            )
    _mount("none", base, None, _MS_REMOUNT | _MS_BIND | _MS_NOSUID | _MS_NODEV | _MS_RDONLY)
    os.chdir(base)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/tmp")


def _visible_paths() -> list[str]:
    """The standard library and the shared libraries that its modules load, without those inside another of
    them."""
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "/lib64", "/usr/lib64"]
    debian = [f"{parent}/{sysconfig.get_config_var('MULTIARCH')}" for parent in ("/lib", "/usr/lib")]
    paths += debian if os.path.isdir(debian[1]) else ["/lib", "/usr/lib"]
    if sys.base_exec_prefix != "/usr":
        paths.append(f"{sys.base_exec_prefix}/lib")
    folders = sorted({path for path in paths if os.path.isdir(path) and not os.path.islink(path)})
    outer = [path for path in folders if not any(path.startswith(other + "/") for other in folders)]
    return [*outer, *(path for path in ("/dev/null", "/dev/zero", "/dev/urandom") if os.path.exists(path))]


def _hidden_paths() -> list[str]:
    """Installed packages: a solution may use the standard library only, and data sets are installed as
    packages."""
    names = ("site-packages", "dist-packages")
    parents = (
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        "/usr/lib/python3",
        "/usr/lib64/python3",
    )
    version = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    return sorted(
        {f"{parent}/{name}" for parent in (*parents, f"{sys.base_exec_prefix}/{version}") for name in names}
    )


def _remount_read_only(target: str, devices: bool) -> None:
    # Flags that the original mount has are locked in a user namespace: they must be repeated.
    current = os.statvfs(target).f_flag
    kept = (_MS_NOEXEC if current & os.ST_NOEXEC else 0) | (
        _MS_NODEV if current & os.ST_NODEV or not devices else 0
    )
    _mount("none", target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | kept)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = (source.encode(), target.encode(), kind and kind.encode(), options and options.encode())
    _check(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno() or errno.EPERM
        raise OSError(number, f"{what}: {os.strerror(number)}")
