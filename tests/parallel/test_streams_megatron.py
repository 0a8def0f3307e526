"""megatron-core's IndexedDataset reads our streams, and we read its files."""

import numpy as np
import pytest
import torch
from megatron.core.datasets import indexed_dataset as megatron

from treg_megatron.data.aligned import PAIR_IDS, REF_LOGPROBS, TOKEN_REWARDS, TOKENS
from treg_megatron.data.indexed import DTYPE_CODES, IndexedReader, IndexedWriter
from treg_megatron.data.streams import open_streams


@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_megatron_reads_ours_and_we_read_megatrons(tmp_path, dtype):
    documents = [[np.arange(n) % 100 for n in document] for document in ((3, 1), (5, 0), (2,), (7, 4, 1))]
    documents = [[sequence.astype(dtype) for sequence in document] for document in documents]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    writer = IndexedWriter(ours.with_suffix(".bin"), ours.with_suffix(".idx"), dtype)
    builder = megatron.IndexedDatasetBuilder(str(theirs) + ".bin", dtype=dtype.type)
    for document in documents:
        writer.add_document(document)
        for sequence in document:
            builder.add_item(torch.from_numpy(sequence))
        builder.end_document()
    writer.finish()
    builder.finalize(str(theirs) + ".idx")
    for suffix in (".bin", ".idx"):
        assert ours.with_suffix(suffix).read_bytes() == theirs.with_suffix(suffix).read_bytes()
    by_megatron = megatron.IndexedDataset(str(ours))
    by_us = IndexedReader(theirs.with_suffix(".bin"), theirs.with_suffix(".idx"))
    sequences = [sequence for document in documents for sequence in document]
    assert len(by_megatron) == len(by_us) == len(sequences)
    np.testing.assert_array_equal(by_megatron.document_indices, by_us.document_starts)
    for i, sequence in enumerate(sequences):
        np.testing.assert_array_equal(by_megatron[i], sequence)
        np.testing.assert_array_equal(by_us[i], sequence)
        assert by_us[i].dtype == dtype


def test_megatron_reads_the_streams_of_a_run(tied_run):
    prefix = next(o for o in tied_run.overrides if o.startswith("index.output=")).removeprefix("index.output=")
    streams = open_streams(prefix)
    for name in (TOKENS, TOKEN_REWARDS, REF_LOGPROBS, PAIR_IDS):
        by_megatron = megatron.IndexedDataset(f"{prefix}_{name}")
        sequences = 1 if name == PAIR_IDS else 2
        assert len(by_megatron) == sequences * len(streams) == by_megatron.document_indices[-1]
        for i in range(len(by_megatron)):
            np.testing.assert_array_equal(by_megatron[i], streams.reader(name)[i])
