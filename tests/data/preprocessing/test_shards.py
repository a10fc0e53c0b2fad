"""The cut depends on the inputs alone, loses nothing, and bounds the number of datasets."""

from hypothesis import given
from hypothesis import strategies as st

from samba_megatron.data.preprocessing.inputs import InputFile
from samba_megatron.data.preprocessing.shards import plan_shards

MB = 1 << 20
files = st.lists(
    st.tuples(st.integers(0, 5_000 * MB), st.sampled_from(["jsonl", "jsonl.zst", "txt"])),
    min_size=1,
    max_size=30,
).map(lambda rows: [InputFile(f"/{n}.{kind}", size, "") for n, (size, kind) in enumerate(rows)])


@given(files=files, shard_bytes=st.none() | st.integers(MB, 3_000 * MB))
def test_every_byte_is_in_one_piece_in_order(files, shard_bytes):
    shards = plan_shards(files, shard_bytes)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    pieces = [piece for shard in shards for piece in shard.pieces]
    assert all(shard.pieces for shard in shards)
    position = {file.path: 0 for file in files}
    order = []
    for piece in pieces:
        assert piece.start == position[piece.file.path]
        end = piece.file.size if piece.end < 0 else piece.end
        position[piece.file.path] = end
        order.append(piece.file)
        if piece.file.packed or piece.file.path.endswith("txt"):
            assert (piece.start, piece.end) == (0, -1)
    assert all(position[file.path] == file.size for file in files)
    assert list(dict.fromkeys(order)) == files


def test_a_small_corpus_is_one_shard_and_a_huge_one_has_thousands():
    assert len(plan_shards([InputFile("/a.jsonl", 300 * MB, "")])) == 1
    assert len(plan_shards([InputFile("/a.jsonl", 2_000 * MB, "")])) == 8
    huge = [InputFile(f"/{n}.jsonl", 50_000 * MB, "") for n in range(1200)]
    shards = plan_shards(huge)
    assert 1500 < len(shards) <= 2500
    sizes = [shard.text_bytes for shard in shards]
    assert max(sizes) < 2 * sum(sizes) / len(sizes)
