"""The filter's program, run by a machine for classic BPF written from the kernel's documentation.

That the kernel reads it the same way is what the escape suite shows.
"""

import struct

import pytest

from megatron_k2.errors import UserError
from megatron_k2.sandbox import syscall_filter as filters

ALLOW, PERMISSION, NO_SUCH_CALL, KILL = "allow", "EPERM", "ENOSYS", "kill"
ANSWERS = {0x7FFF0000: ALLOW, 0x00050001: PERMISSION, 0x00050026: NO_SUCH_CALL, 0x80000000: KILL}


def decide(program: bytes, arch: int, number: int, *arguments: int) -> str:
    words = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("=IIQ6Q", number, arch, 0, *(word % (1 << 64) for word in words))
    steps = list(struct.iter_unpack("=HBBI", program))
    assert len(steps) <= 4096
    place, loaded = 0, 0
    while True:
        code, if_true, if_false, value = steps[place]
        place += 1
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return ANSWERS[value]
        else:
            tests = {
                0x15: loaded == value,
                0x35: loaded >= value,
                0x45: bool(loaded & value),
            }
            place += if_true if tests[code] else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_each_call_is_decided_as_listed(machine):
    program, arch = filters.syscall_filter(machine), filters.AUDIT_ARCH[machine]
    plain = {filters.CLONE[machine], filters.SOCKET[machine], filters.SOCKETPAIR[machine]}
    for number in range(600):
        expected = ALLOW
        if number in filters.DENIED[machine]:
            expected = PERMISSION
        elif number == 435:
            expected = NO_SUCH_CALL
        if number not in plain:
            assert decide(program, arch, number) == expected, number


def test_arguments_of_clone_socket_and_ioctl_are_looked_at():
    program, arch = filters.syscall_filter("x86_64"), 0xC000003E
    assert decide(program, arch, 56, 0x003D0F00) == ALLOW  # pthread_create
    for flag in (0x00020000, 0x02000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(program, arch, 56, flag | 17) == PERMISSION
    families = {family: decide(program, arch, 41, family) for family in range(46)}
    assert [f for f, answer in families.items() if answer == ALLOW] == [1, 2, 10]
    assert decide(program, arch, 53, 1) == ALLOW
    assert decide(program, arch, 16, 1, 0x5401) == ALLOW
    assert decide(program, arch, 16, 1, 0x5412) == PERMISSION
    # The kernel looks at the low half of a request: so must we.
    assert decide(program, arch, 16, 1, 0x5412 | 1 << 32) == PERMISSION


def test_another_architecture_and_x32_end_the_program():
    program = filters.syscall_filter("x86_64")
    assert decide(program, 0x40000003, 1) == KILL  # i386, whose numbers mean other calls
    assert decide(program, 0xC000003E, 0x40000000 | 41, 2) == KILL


def test_a_filter_whose_jumps_are_off_by_one_is_seen():
    program = bytearray(filters.syscall_filter("x86_64"))
    program[8 + 2] = 0  # the architecture's test falls into the kill
    assert decide(bytes(program), 0xC000003E, 1) != ALLOW


def test_an_unknown_machine_is_refused_with_those_known():
    with pytest.raises(UserError, match="riscv64; known: x86_64, aarch64"):
        filters.syscall_filter("riscv64")
