import tracemalloc

import pytest

from memlayers.lm.data.sources import streams

PACKED = ["gz", "xz", "zst"]
CONTENT = b'{"text": "x"}\n' * 1000


def damaged(packed: bytes) -> bytes:
    middle = len(packed) // 2
    return packed[:middle] + bytes(byte ^ 255 for byte in packed[middle : middle + 4]) + packed[middle + 4 :]


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda packed: packed[:-1],
        lambda packed: packed[:-20],
        lambda packed: packed[:3],
        lambda packed: packed + packed[:-5],
        lambda packed: packed + b"and more",
        lambda packed: b"plain text",
        damaged,
    ],
    ids=["last byte", "cut off", "a few bytes", "second cut off", "more behind it", "not packed", "damaged"],
)
def test_what_is_cut_off_or_damaged_is_named_and_never_skipped(tmp_path, packed, read, suffix, kind, spoil):
    path = tmp_path / f"docs.{kind}.{suffix}"
    path.write_bytes(spoil(packed(CONTENT, suffix)))
    with pytest.raises(ValueError, match=f"docs.{kind}.{suffix}: not a complete {suffix} file: "):
        read(path, skip=lambda message: None)


@pytest.mark.parametrize("size", [0, 10, 128 << 10, 300_000])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_zst_file_that_is_cut_off_anywhere_is_noticed(tmp_path, read, size, checksum):
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor(write_checksum=checksum)
    whole = compressor.compress(bytes(97 + (n * n >> 3) % 23 for n in range(size)))
    path = tmp_path / "book.txt.zst"
    for end in {*range(1, min(60, len(whole))), *range(len(whole) - 20, len(whole)), len(whole) // 2}:
        if 0 < end < len(whole):
            path.write_bytes(whole[:end])
            with pytest.raises(ValueError, match="not a complete zst file"):
                read(path)
    path.write_bytes(whole)
    assert sum(len(document.text) for document in read(path)) == size


@pytest.mark.parametrize("suffix", PACKED)
def test_every_member_is_read(tmp_path, packed, read, monkeypatch, suffix):
    monkeypatch.setattr(streams, "PIECE_BYTES", 10)  # so that members end and begin everywhere in a piece
    members = [b"one ", b"", b"two ", b"three" * 1000, b"", b" four"]
    path = tmp_path / f"book.txt.{suffix}"
    path.write_bytes(b"".join(packed(member, suffix) for member in members))
    assert "".join(document.text for document in read(path)).encode() == b"".join(members)


def test_zeros_between_xz_streams_and_skippable_zst_frames_are_passed_over(tmp_path, packed, read):
    xz, zst = tmp_path / "book.txt.xz", tmp_path / "book.txt.zst"
    xz.write_bytes(packed(b"one ", "xz") + bytes(200_000) + packed(b"two", "xz") + bytes(4))
    skippable = b"\x5a\x2a\x4d\x18\x05\0\0\0hello"
    many = packed(b"", "zst") * 20_000
    zst.write_bytes(skippable + packed(b"one ", "zst") + skippable + many + packed(b"two", "zst") + skippable)
    for path in (xz, zst):
        assert [document.text for document in read(path)] == ["one two"]
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="not a complete xz file"):
        read(xz)
    assert len(read(zst)) == 1
    zst.write_bytes(zst.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a complete zst file"):
        read(zst)


def test_zst_windows_of_a_gigabyte_are_read(tmp_path, read):
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "book.txt.zst"
    path.write_bytes(compressor.compress(b"long ago") + compressor.flush())
    assert [document.text for document in read(path)] == ["long ago"]


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_packed_nothing_has_no_documents(written, read, suffix, kind):
    assert read(written(f"docs.{kind}.{suffix}", b"")) == []


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_files_are_read_in_bounded_memory(written, opened, monkeypatch, kind, suffix):
    monkeypatch.setattr(streams, "READ_BYTES", 1 << 16)
    line = b'{"text": "%s"}\n' % (b"word " * 2000)
    path = written(f"docs.{kind}{suffix}", line * 1600)  # 16 MB
    (source,) = opened(path)
    tracemalloc.start()
    try:
        assert sum(len(document.text) for document in source.documents()) >= 16_000_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    dictionary = 8 << 20 if suffix == ".xz" else 0  # of xz's default preset; zstandard's 2 MB are not traced
    assert peak < dictionary + 1_500_000
