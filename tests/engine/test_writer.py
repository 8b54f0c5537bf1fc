"""The writer of checkpoint files, in the foreground and in the background."""

import hashlib
import resource
import signal

import pytest
import torch


@pytest.mark.parametrize("background", [False, True])
def test_the_writer_digests_what_it_writes_and_reports_a_failed_write_later(tmp_path, background):
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo

    from dsmim.engine.writer import CheckpointWriter

    writer, state = CheckpointWriter(background), {"a": torch.randn(50_000), "b": [1, "x"]}
    info = CheckpointCommitInfo("tag", str(tmp_path), False)
    writer.create(info)
    writer.save(state, str(tmp_path / "one.pt"))
    state["a"].zero_()  # training continues: the written values must not change
    entries = writer.entries()
    data = (tmp_path / "one.pt").read_bytes()
    assert entries == {"one.pt": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert writer.bytes == len(data) and not writer.busy
    assert torch.load(tmp_path / "one.pt", weights_only=True, mmap=True)["a"].abs().sum() > 0

    writer.create(info)
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # like a full disk: the write fails in its middle
    try:
        writer.save(state, str(tmp_path / "two.pt"))  # must not raise: other ranks wait in DeepSpeed's barriers
        with pytest.raises(OSError, match="File too large"):
            writer.entries()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "two.pt").stat().st_size <= 100_000
    writer.close()
