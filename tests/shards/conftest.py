"""Servers on loopback."""

import pytest

from tests.shards.servers import serving


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        yield server


@pytest.fixture
def bucket(monkeypatch):
    """An s3 client of a local server with one bucket, "shards"; the environment names that server."""
    import boto3  # imported here, because these two take a second that other tests do not need
    from moto.server import ThreadedMotoServer

    endpoint = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    endpoint.start()
    host, port = endpoint.get_host_and_port()
    names = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION")
    values = {f"AWS_{name}": "us-east-1" for name in names} | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    for name, value in (values | {"NO_PROXY": "127.0.0.1", "AWS_EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    yield client
    endpoint.stop()
