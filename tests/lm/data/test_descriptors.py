import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("resource")

SCRIPT = """
    import json, pickle, resource
    from pathlib import Path
    import numpy as np
    import transformers
    from memlayers.lm.data import DataConfig, Windows, encode, open_corpus, prepare, spans

    transformers.PreTrainedTokenizerFast  # which loads libraries by themselves
    files = 130
    for number in range(files):
        with open(f"{number:03}.jsonl", "w") as stream:
            for line in range(9):
                stream.write(json.dumps({"id": f"{number} {line}", "text": f"tea {number} cup {line}"}) + "\\n")
    config = DataConfig(
        sources=tuple(f"{number:03}.jsonl" for number in range(files)), vocab_size=257, holdout_percent=30
    )
    in_one = prepare(DataConfig(sources=(".",), vocab_size=257, holdout_percent=30), "in-one", progress=False)
    assert len(in_one.train.shards) == 1

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    spans.MERGED_BYTES = 2000  # a document or none of each part at a time
    corpus = prepare(config, "corpus", progress=False)
    assert sum(bool(list(Path("corpus").glob(f"{split}*"))) for split in ("validation", "test")) == 2
    for name in ("validation", "test"):
        for suffix in ("tokens", "documents.npy"):
            assert Path(f"corpus/{name}.{suffix}").read_bytes() == Path(f"in-one/{name}.{suffix}").read_bytes()
    train = open_corpus("corpus").train
    assert len(train.shards) > 100
    shards = [np.fromfile(file, "<u2") for file in sorted(Path("corpus").glob("train-*.tokens"))]
    windows = Windows(train, 10)
    expected = [shard[start : start + 10] for shard in shards for start in range(0, len(shard) - 9, 10)]
    assert len(windows) == len(expected)
    for number in (*range(len(windows)), 0, 3):
        assert windows[number]["input_ids"].tolist() == expected[number].tolist()
    assert train.tokens.tolist() == np.concatenate(shards).tolist()
    assert len(train.documents) == train.num_documents == in_one.train.num_documents
    assert train.num_words == in_one.train.num_words
    part = train.prefix(train.num_tokens - 1)
    assert len(part.shards) > 100
    held = [shard.tokens[0] for shard in part.shards]
    pickled = pickle.dumps(train)
    assert len(pickled) < 1000 * len(train.shards)
    del train, part, windows  # and the maps that they keep open
    again = pickle.loads(pickled)
    assert [shard.tokens[0] for shard in again.shards][: len(held)] == held
    print("done")
"""


def test_more_shards_and_parts_than_descriptors_are_made_opened_and_read(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
