"""The servers of remote shards."""

from tests.shards.conftest import bucket, server  # noqa: F401 - fixtures
