"""Frames on the host's side: the golden bytes of both implementations, and any stream survived."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diapause.guest import protocol
from diapause.guest.frames import Decoder, Frame, LostPlaceError, encode, unnumbered
from diapause.guest.protocol import FRAME_MAX, PAYLOAD_MAX, ProtocolError, Welcome
from tests.framework.agent import ROOT

GOLDEN = ROOT / "rust/agent/tests/golden/frames-v1.bin"
CORPUS = ROOT / "rust/agent/fuzz/corpus/frames"
FRAMES = [
    Frame(protocol.ACK, 0, 0, 0, 7, b""),
    Frame(protocol.STDIN, 0, 3, 1, 0, b"hello"),
    Frame(protocol.EXEC, protocol.MORE, 2**32 - 1, 1 << 40, 2**64 - 1, b"{" * 300),
    Frame(protocol.STDOUT, 0, 1, 2, 3, b"\xa5" * PAYLOAD_MAX),
]
NONCE = "00" * 16


def decode(stream: bytes, piece: int = 5000) -> list[Frame]:
    decoder, found = Decoder(), []
    for at in range(0, len(stream), piece):
        part = stream[at : at + piece]
        decoder.space()[: len(part)] = part
        decoder.fill(len(part))
        found += [frame._replace(payload=bytes(frame.payload)) for frame in decoder.frames()]
    return found


def welcome(nonce: str = NONCE) -> bytes:
    text = (
        f'{{"protocol":1,"nonce":"{nonce}","version":"1","boot_id":"b","incarnation":"i",'
        '"epoch":1,"resumed":false,"received":0,"realtime_ns":0,"monotonic_ns":0,"pid":1,'
        '"failed":[],"from_a_newer_agent":true}'
    )
    return unnumbered(protocol.WELCOME, text.encode())


def search(stream: bytes, piece: int) -> tuple[Welcome | None, Decoder]:
    decoder = Decoder()
    for at in range(0, len(stream), piece):
        part = stream[at : at + piece]
        space = decoder.space()
        assert len(space) >= len(part)
        space[: len(part)] = part
        decoder.fill(len(part))
        found = decoder.find_welcome(NONCE)
        if found is not None:
            return found, decoder
    return None, decoder


def test_golden_frames_are_the_same_on_both_sides() -> None:
    assert b"".join(encode(frame) for frame in FRAMES) == GOLDEN.read_bytes()
    assert decode(GOLDEN.read_bytes()) == FRAMES


def test_the_corpus_breaks_nothing() -> None:
    entries = sorted(CORPUS.iterdir())
    assert len(entries) >= 5
    for entry in entries:
        piece, stream = entry.read_bytes()[0], entry.read_bytes()[1:]
        with contextlib.suppress(LostPlaceError):
            decode(stream, piece * 16 + 1)
        assert search(stream, piece * 16 + 1)[0] is None


@given(st.binary(max_size=2000), st.integers(1, 300))
def test_any_stream_is_survived(stream: bytes, piece: int) -> None:
    with contextlib.suppress(LostPlaceError):
        decode(stream, piece)
    with contextlib.suppress(LostPlaceError):
        decode(encode(FRAMES[1]) + stream, piece)
    assert search(stream, piece)[0] is None


@given(st.lists(st.binary(max_size=700), max_size=10), st.integers(1, 3000), st.integers(0, 2000))
def test_frames_come_whole_in_any_pieces(payloads: list[bytes], piece: int, zeros: int) -> None:
    frames = [Frame(protocol.STDOUT, 0, 1, n, 0, p) for n, p in enumerate(payloads, 1)]
    assert decode(bytes(zeros).join(map(encode, frames)), piece) == frames


@given(st.binary(max_size=200), st.data())
def test_a_flipped_bit_never_passes(payload: bytes, data: st.DataObject) -> None:
    frame = bytearray(encode(Frame(protocol.STDOUT, 0, 1, 1, 0, payload)))
    at = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[at // 8] ^= 1 << at % 8
    found: list[Frame] = []
    with contextlib.suppress(LostPlaceError):
        found = decode(bytes(frame))
    assert found == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(0, FRAME_MAX), st.integers(500, 5000))
def test_a_welcome_is_found_behind_any_rubbish(cut: int, length: int, piece: int) -> None:
    stale = unnumbered(protocol.WELCOME, bytes(length)[: PAYLOAD_MAX - 1])
    data = encode(FRAMES[3])[:length]
    stream = data + welcome("ff" * 16) + stale[: cut + 40] + welcome() + encode(FRAMES[1])
    found, decoder = search(stream, piece)
    assert found is not None
    assert found.nonce == NONCE
    if piece > len(welcome()) + 100:
        rest = list(decoder.frames())
        assert [frame.payload for frame in rest] in ([], [b"hello"])


@given(st.binary(max_size=300))
def test_a_payload_that_is_none_is_a_protocol_error(payload: bytes) -> None:
    kinds = (protocol.Welcome, protocol.Exited, protocol.ExecFailed, protocol.Filesystems)
    for kind in kinds:
        with contextlib.suppress(ProtocolError):
            protocol.decode_json(payload, kind)


@pytest.mark.parametrize("payload", [b"", b"1234567", b"123456789", b"[" * 30000])
def test_sizes_and_depths_are_bounded(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_credit(payload)
    with pytest.raises(ProtocolError):
        protocol.decode_json(payload, protocol.Filesystems)


def test_text_from_the_guest_is_short_and_printable() -> None:
    assert protocol.clean_text("a\x1b[31m\n" + "b" * 5000).startswith("a?[31m?bbb")
    assert len(protocol.clean_text("b" * 5000)) == 1024
    assert len(protocol.clean_list(["x"] * 5000)) == 64
