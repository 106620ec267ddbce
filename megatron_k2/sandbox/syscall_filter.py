"""The system calls that bwrap's programs are refused, as a classic BPF program for seccomp.

Namespaces do not confine what has none (kernel keys, AF_VSOCK, io_uring, eBPF), and a program may
make more of them, with capabilities inside. The list follows Docker's default profile, with
io_uring, SysV IPC and ptrace added. Numbers: Linux's tables of x86-64 and of the generic calls.
"""

import platform
import struct

from megatron_k2.errors import UserError

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

DENIED = {
    "x86_64": (
        # ptrace, process_vm_readv and _writev, kcmp, pidfd_getfd, process_madvise
        *(101, 310, 311, 312, 438, 440),
        # mount, umount2, pivot_root, chroot, the new mount calls, mount_setattr, name_to_handle_at
        *(165, 166, 155, 161, 428, 429, 430, 431, 432, 433, 442, 303, 304),
        # unshare, setns, personality, acct, swapon, swapoff, reboot, sethostname, setdomainname
        *(272, 308, 135, 163, 167, 168, 169, 170, 171),
        # kernel modules, kexec, bpf, perf_event_open, userfaultfd, io_uring
        *(175, 176, 313, 246, 320, 321, 298, 323, 425, 426, 427),
        # keys, SysV shared memory, semaphores, messages
        *(248, 249, 250, 29, 30, 31, 67, 64, 65, 66, 220, 68, 69, 70, 71),
        # POSIX message queues, fanotify, quotactl, lookup_dcookie, nfsservctl, uselib, ustat
        *(240, 241, 242, 243, 244, 245, 300, 179, 443, 212, 180, 134, 136),
        # iopl, ioperm, modify_ldt, the clock, syslog, vhangup, memory policies
        *(172, 173, 154, 164, 227, 159, 305, 103, 153, 237, 238, 239, 256, 279),
        # landlock and seccomp stay: they only take away
    ),
    "aarch64": (
        *(117, 270, 271, 272, 438, 440),
        *(40, 39, 41, 51, 428, 429, 430, 431, 432, 433, 442, 264, 265),
        *(97, 268, 92, 89, 224, 225, 142, 161, 162),
        *(105, 106, 273, 104, 294, 280, 241, 282, 425, 426, 427),
        *(217, 218, 219, 194, 195, 196, 197, 190, 191, 192, 193, 186, 187, 188, 189),
        *(180, 181, 182, 183, 184, 185, 262, 60, 443, 18, 42),
        *(170, 112, 116, 58, 266, 171, 235, 236, 237, 238, 239),
    ),
}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
SOCKET = {"x86_64": 41, "aarch64": 198}
SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
IOCTL = {"x86_64": 16, "aarch64": 29}
X32_BIT = 0x4000_0000
NAMESPACE_FLAGS = 0x7E02_0000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
SOCKET_FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET and AF_INET6, which network namespaces confine; not AF_VSOCK, AF_ALG."""
TERMINAL_INJECTIONS = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX write into the terminal that started us."""

EPERM, ENOSYS = 1, 38
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, ERRNO, KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
NUMBER_AT, ARCH_AT, FIRST_ARGUMENT_AT, SECOND_ARGUMENT_AT = 0, 4, 16, 24


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _when(test: int, value: int, result: int) -> bytes:
    """Return ``result`` if the loaded word passes, else go on."""
    return _instruction(test, value, 0, 1) + _instruction(RETURN, result)


def _on(number: int, body: bytes) -> bytes:
    """``body`` for one system call, which must return; the number stays loaded for others."""
    return _instruction(EQUAL, number, 0, len(body) // 8) + body


def syscall_filter(machine: str | None = None) -> bytes:
    """The filter, as ``bwrap --seccomp`` reads it.

    Raises:
        UserError: a machine whose system calls are not known here.
    """
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCH:
        raise UserError(f"no system-call filter for {machine}; known: {', '.join(AUDIT_ARCH)}")
    refused = ERRNO | EPERM
    allow = _instruction(RETURN, ALLOW)
    first = _instruction(LOAD, FIRST_ARGUMENT_AT)
    families = b"".join(_when(EQUAL, family, ALLOW) for family in SOCKET_FAMILIES)
    sockets = first + families + _instruction(RETURN, refused)
    injections = b"".join(_when(EQUAL, request, refused) for request in TERMINAL_INJECTIONS)
    program = [
        _instruction(LOAD, ARCH_AT),
        _instruction(EQUAL, AUDIT_ARCH[machine], 1, 0),
        _instruction(RETURN, KILL),
        _instruction(LOAD, NUMBER_AT),
        _when(AT_LEAST, X32_BIT, KILL),
        *(_when(EQUAL, number, refused) for number in DENIED[machine]),
        # glibc falls back to clone, whose flags can be read here.
        _when(EQUAL, CLONE3, ERRNO | ENOSYS),
        _on(CLONE[machine], first + _when(ANY_BIT, NAMESPACE_FLAGS, refused) + allow),
        _on(SOCKET[machine], sockets),
        _on(SOCKETPAIR[machine], sockets),
        _on(IOCTL[machine], _instruction(LOAD, SECOND_ARGUMENT_AT) + injections + allow),
        allow,
    ]
    return b"".join(program)
