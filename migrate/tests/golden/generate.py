#!/usr/bin/env python3
"""Writes the golden files from FORMAT.md alone, without Ferry's code. Files that exist are compared, never overwritten.

Usage: generate.py [DIRECTORY]
"""
import ipaddress
import pathlib
import struct
import sys
import zlib

MIGRATION = 0x00112233445566778899AABBCCDDEEFF


def addr(text):
    a = ipaddress.ip_address(text)
    return a.packed if a.version == 6 else bytes(10) + b"\xff\xff" + a.packed


def ext(kind, data):
    e = struct.pack("<HH", kind, len(data)) + data
    return e + bytes(-len(e) % 8)


def head(kind, body_bytes, flags, proto, zone, state, retrans, version, remaining_ms, extensions):
    units = (16 + body_bytes + len(extensions)) // 8
    return struct.pack("<BBBBHBBII", kind, units, flags, proto, zone, state, retrans, version, remaining_ms)


def key(local, remote, lport, rport):
    return addr(local) + addr(remote) + struct.pack("<HH", lport, rport)


def connection(local, remote, lport, rport, proto, *, opened_by_remote=False, answered=False, assured=False, zone=0,
               state=0, retrans=0, version=1, remaining_ms=1000, counters=(0, 0, 0, 0), area=b"", extensions=b""):
    v6 = ipaddress.ip_address(local).version == 6
    flags = v6 | opened_by_remote << 1 | answered << 2 | assured << 3
    body = key(local, remote, lport, rport) + struct.pack("<4I", *counters) + area.ljust(52, b"\0")
    assert len(body) == 104
    return head(1, 104, flags, proto, zone, state, retrans, version, remaining_ms, extensions) + body + extensions


def tombstone(local, remote, lport, rport, proto, *, asked=False, zone=0, version=1, extensions=b""):
    v6 = ipaddress.ip_address(local).version == 6
    body = key(local, remote, lport, rport) + bytes(4)
    return head(2, 40, v6 | asked << 1, proto, zone, 0, 0, version, 0, extensions) + body + extensions


def tcp_area(sides, last_end, last_ack, last_window, last_len, flags, scales, last_kind, last_scale=0, last_flags=0):
    return struct.pack("<8I2I2H7B", *sides[0], *sides[1], last_end, last_ack, last_window, last_len, *flags, *scales,
                       last_kind, last_scale, last_flags) + b"\0"


def batch(records, *, raw=None, payload=None, major=1, minor=0, flags=0, codec=0, extensions=b"", sequence=3, round=2,
          count=None):
    raw = b"".join(records) if raw is None else raw
    payload = raw if payload is None else payload
    count = len(records) if count is None else count
    h = struct.pack("<4sBBHHBBI16sQIIIII", b"FRYB", major, minor, 64 + len(extensions), flags, codec, 0, count,
                    MIGRATION.to_bytes(16, "little"), sequence, round, len(payload), len(raw), zlib.crc32(raw), 0)
    crc = zlib.crc32(h + bytes(4) + extensions)
    return h + struct.pack("<I", crc) + extensions + payload


def lz4_length(n):
    out = b""
    while n >= 255:
        out += b"\xff"
        n -= 255
    return out + bytes([n])


def lz4(raw):
    """Runs of one byte become matches at distance 1, all else literals (LZ4 block format: the last 12 bytes are literals)."""
    out, literals, at, end = b"", b"", 0, len(raw) - 12
    while at < end:
        run = 0
        while at + run < end and raw[at + run] == raw[at]:
            run += 1
        if run >= 8:
            literals += raw[at:at + 1]
            match = run - 1
            token = min(len(literals), 15) << 4 | min(match - 4, 15)
            out += bytes([token]) + (lz4_length(len(literals) - 15) if len(literals) >= 15 else b"") + literals
            out += b"\x01\x00" + (lz4_length(match - 4 - 15) if match - 4 >= 15 else b"")
            literals, at = b"", at + run
        else:
            literals, at = literals + raw[at:at + 1], at + 1
    literals += raw[at:]
    out += bytes([min(len(literals), 15) << 4]) + (lz4_length(len(literals) - 15) if len(literals) >= 15 else b"")
    return out + literals


TCP4 = dict(local="10.0.0.5", remote="192.0.2.7", lport=49152, rport=443, proto=6, answered=True, assured=True,
            state=3, retrans=2, version=0x2ABBCCDD, remaining_ms=431_999_000, counters=(1000, 70_000, 900, 5 << 27 | 1 << 26 | 77),
            area=tcp_area([(0x10203040, 0x1020F040, 65535, 0xA0B0C0D0), (0xA0B0C0D4, 0xA0B1C0D0, 8_388_480, 0x10203040)],
                          0xA0B0C0D4, 0x10203040, 509, 4, (0x23, 0x33), (7, 9), 3 | 8))
RECORDS = [
    connection(**TCP4),
    connection("2001:db8::5", "2001:db8:1::7", 80, 50000, 6, opened_by_remote=True, zone=0x1064, state=9, version=0,
               remaining_ms=120_000, counters=(1, 80, 0, 0),
               area=tcp_area([(1, 1, 1, 0), (0, 0, 0, 0)], 7, 8, 65535, 1, (0x03, 0), (14, 0), 0, 14, 0xF)),
    connection("10.0.0.5", "192.0.2.53", 5353, 53, 17, answered=True, version=7, remaining_ms=30_000,
               counters=(1, 60, 1, 120), area=struct.pack("<H", 1234)),
    connection("10.0.0.5", "192.0.2.54", 1, 2, 17, opened_by_remote=True, zone=4094, area=struct.pack("<H", 65535)),
    connection("10.0.0.5", "192.0.2.9", 2905, 2906, 132, answered=True, assured=True, state=4, remaining_ms=210_000,
               area=struct.pack("<IIB", 0xDEADBEEF, 0xFEEDF00D, 1 | 4 | 8)),
    connection("10.0.0.5", "192.0.2.10", 77, 0x0800, 1, opened_by_remote=True, answered=True),
    connection("10.0.0.5", "192.0.2.10", 77, 0x0800, 1),
    connection("fd00::1", "fd00::2", 9, 0x8000, 58),
    connection("10.0.0.5", "192.0.2.11", 0, 321, 47, answered=True, assured=True, remaining_ms=180_000),
    connection("10.0.0.5", "192.0.2.11", 5, 6, 136),
    connection("10.0.0.5", "224.0.0.5", 0, 0, 89, version=0x3FFFFFFF),
    tombstone("10.0.0.5", "192.0.2.7", 49153, 443, 6, version=0x3FFFFFFF),
    tombstone("fd00::1", "fd00::2", 9, 0x8000, 58, asked=True, zone=12),
]
OPTIONAL = bytes([0x80 | 5, 2]) + b"something new."
MANDATORY = bytes([0x05, 2]) + b"something new."
assert len(OPTIONAL) == len(MANDATORY) == 16
RAW = b"".join(RECORDS)
PACKED = lz4(RAW)
assert len(PACKED) < len(RAW)

FILES = {
    "v1.0-plain.bin": batch(RECORDS),
    "v1.0-lz4.bin": batch(RECORDS, payload=PACKED, codec=1),
    "v1.0-empty.bin": batch([]),
    # What a later minor version may add: all of it can be passed over.
    "v1.9-optional.bin": batch(
        [OPTIONAL, connection(**TCP4, extensions=ext(0x0001, b"12345") + ext(0x7FFF, b"")), OPTIONAL, *RECORDS[1:-1],
         tombstone("fd00::1", "fd00::2", 9, 0x8000, 58, asked=True, zone=12, extensions=ext(9, bytes(range(12))))],
        minor=9, flags=0xFF00, extensions=ext(0x0002, b"header") + ext(3, b"more of it")),
    # And what can not.
    "v1.9-mandatory-kind.bin": batch([*RECORDS[:2], MANDATORY], minor=9),
    "v1.9-mandatory-extension.bin": batch([connection(**TCP4, extensions=ext(0x8123, b"12345"))], minor=9),
    "v1.9-mandatory-header-extension.bin": batch(RECORDS, minor=9, extensions=ext(1, b"") + ext(0x8456, b"abcd")),
    "v1.9-mandatory-flag.bin": batch(RECORDS, minor=9, flags=0x0104),
    "v1.9-codec.bin": batch(RECORDS, payload=PACKED, codec=2, minor=9),
    "v2.0.bin": batch(RECORDS, major=2),
}

directory = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
different = 0
for name, content in FILES.items():
    path = directory / name
    if not path.exists():
        path.write_bytes(content)
        print(f"{name}: {len(content)} bytes written")
    elif path.read_bytes() != content:
        different += 1
        print(f"{name}: DIFFERENT from what this program writes")
sys.exit(different != 0)
