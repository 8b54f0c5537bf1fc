"""Remote shards: read whole http(s) and s3 objects, and the output of commands, with retries.

Every transfer has its own event loop and connections, which end with it. fsspec's usual instances share one loop
thread, which does not survive a fork, and a forked data worker would close the connections of its parent. A new
connection costs one handshake per shard of hundreds of megabytes.

`pipe:COMMAND` is run by /bin/sh, which takes the exit status of a pipeline from its last command only. So in
`pipe:curl URL | gzip -d` a failure of curl is not noticed here; the short output is, because shards are compared with
their index. One command without `|`, or `bash -o pipefail -c '…'`, reports the failure itself.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import re
import signal
import ssl
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import BinaryIO

SCHEMES = ("http", "https", "s3")
PIPE = "pipe:"
CHUNK = 2**20  # bytes of one read
# Statuses that are retried beside every 5xx: request timeout and too many requests.
_RETRIED = (408, 429)
# The random streams of training come from `random`; drawing from it here, in a thread, would change them.
_jitter = random.SystemRandom()


_S3_HINT = "; s3 answers so for a missing object too, unless you may list the bucket"
_HEADER = (
    "; if it needs a token, give a header by the environment: "
    """FSSPEC_HTTP='{"client_kwargs": {"headers": {"Authorization": "Bearer TOKEN"}}}'"""
)
_HINTS = {401: _HEADER, 403: _HEADER}


class Missing(ValueError):
    """There is no object at that address."""


class _Transient(Exception):
    """A failure that another attempt may not meet; its text is the reason."""


def is_remote(shard: str) -> bool:
    """Return whether a shard is named by an address or a command, not by a local path."""
    return shard.startswith(PIPE) or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", shard) is not None


def check(shard: str, what: str, allow_pipe: bool) -> None:
    """Check that a remote shard can be read.

    Raises ValueError, beginning with `what`, for an unknown scheme, for a command unless allow_pipe, and when the
    packages of the extra are missing.
    """
    scheme = shard.partition(":")[0].lower()
    if shard.startswith(PIPE):
        if not allow_pipe:
            raise ValueError(
                f"{what}: {shard!r} would run a command on this machine; allow it with data.allow_pipe=true on the "
                "command line, or with --allow-pipe for the shards commands"
            )
    elif scheme not in SCHEMES:
        raise ValueError(
            f"{what}: {shard!r}: {scheme}:// cannot be read; use http://, https:// or s3://, pipe:COMMAND, or a local "
            "path"
        )
    else:
        # Imported now, by the thread that may fork: a child forked during another thread's import would have an import
        # lock that is never released.
        _filesystem_class(shard, f"{what}: {shard!r}")


def download(url: str, file: BinaryIO, attempts: int = 5, first_wait: float = 1.0, timeout: float = 60.0) -> None:
    """Write a whole object into a file that is open for writing, from its beginning.

    Server errors, broken connections, transfers cut short and `timeout` seconds without a byte are retried from the
    beginning, after first_wait seconds, doubled each time, ± 50 % at random. Raises Missing or ValueError for what
    another attempt cannot fix, and ValueError after the last attempt; errors of the file pass unchanged.
    """
    for attempt in range(1, attempts + 1):
        file.seek(0)
        file.truncate()
        try:
            return asyncio.run(_copy(url, file, timeout))
        except _Transient as error:
            reason = error
        if attempt < attempts:
            time.sleep(first_wait * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5))
    raise ValueError(f"{url}: could not be read in {attempts} attempts; the last one: {reason}")


def fetch_small(
    url: str, limit: int = 2**28, attempts: int = 5, first_wait: float = 1.0, timeout: float = 60.0
) -> bytes | None:
    """Return a whole object of at most `limit` bytes, such as an index; None when there is none.

    A command has none. Raises ValueError as download does, and for a larger object.
    """
    if url.startswith(PIPE):
        return None
    file = _Limited(url, limit)
    try:
        download(url, file, attempts, first_wait, timeout)
    except Missing:
        return None
    return file.getvalue()


class _Limited(io.BytesIO):
    def __init__(self, url: str, limit: int):
        super().__init__()
        self.url, self.limit = url, limit

    def write(self, data) -> int:
        if self.tell() + len(data) > self.limit:
            raise ValueError(f"{self.url}: is larger than {self.limit} bytes, so it is no index; check the address")
        return super().write(data)


async def _copy(url: str, file: BinaryIO, timeout: float) -> None:
    """Make one attempt. Errors of the source become _Transient, Missing or ValueError; errors of the file pass."""
    pipe = url.startswith(PIPE)
    source = _command(url.removeprefix(PIPE)) if pipe else _object(url, _filesystem(url, timeout))
    async with aclosing(source):
        while chunk := await _next(url, source, timeout):
            file.write(chunk)
    file.flush()


async def _next(url: str, source: AsyncIterator[bytes], timeout: float) -> bytes:
    try:
        async with asyncio.timeout(timeout):
            return await anext(source, b"")
    except _Transient:
        raise
    except TimeoutError:
        raise _Transient(f"no byte for {timeout:g} s") from None
    except Exception as error:
        raise _classified(url, error) from error


async def _object(url: str, filesystem) -> AsyncIterator[bytes]:
    session = await filesystem.set_session()
    try:
        source = await filesystem.open_async(url, "rb", size=0)  # with a size given, http does not request it
        try:
            while chunk := await source.read(CHUNK):
                yield chunk
        finally:
            await source.close()
    finally:
        await session.close()


def _filesystem(url: str, timeout: float):
    """Return a filesystem of the running loop, without the library's own retries: they would multiply with ours."""
    create = _filesystem_class(url, url)
    if url.lower().startswith("s3:"):
        config = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 0}}
        filesystem = create(asynchronous=True, skip_instance_cache=True, config_kwargs=config)
        filesystem.retries = 1
        return filesystem
    from aiohttp import ClientTimeout

    # By default aiohttp stops every transfer after five minutes and ignores the environment's proxy.
    client = {"timeout": ClientTimeout(total=None), "trust_env": True, "read_bufsize": CHUNK}
    from fsspec.config import conf

    # An option given here replaces the one of FSSPEC_HTTP, which may hold an Authorization header.
    client |= conf.get("http", {}).get("client_kwargs", {})
    return create(asynchronous=True, skip_instance_cache=True, client_kwargs=client)


def _filesystem_class(url: str, what: str):
    """Return fsspec's class for a URL. Raises ValueError, beginning with `what`, when a package is missing."""
    try:
        from fsspec import get_filesystem_class

        return get_filesystem_class(url.partition(":")[0].lower())
    except ImportError:
        raise ValueError(f"{what}: needs an extra package; run: pip install 'dsmim[remote]'") from None


async def _command(command: str) -> AsyncIterator[bytes]:
    with tempfile.TemporaryFile() as stderr:  # a full pipe that is not read would block the command
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", command, stdout=asyncio.subprocess.PIPE, stderr=stderr, start_new_session=True
        )
        try:
            while chunk := await process.stdout.read(CHUNK):
                yield chunk
            if await process.wait():
                stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 500))
                tail = stderr.read().decode(errors="replace").strip()
                raise _Transient(f"the command ended with status {process.returncode}: {tail}")
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the shell and its children
                await process.wait()


def _classified(url: str, error: Exception) -> Exception:
    """Return what an error of aiohttp, s3fs or botocore means: _Transient to try again, ValueError for the user."""
    status = _status(error)
    if status == 404:
        return Missing(f"{url}: does not exist (404)")
    if status and status < 500 and status not in _RETRIED:
        hint = _HINTS.get(status, "") if url.lower().startswith("http") else _S3_HINT * (status == 403)
        return ValueError(f"{url}: cannot be read: {_message(error)} (status {status}){hint}")
    if isinstance(error, ssl.SSLError):  # a ValueError, too
        return ValueError(f"{url}: its certificate is not trusted ({_message(error)}); see SSL_CERT_FILE")
    if isinstance(error, ValueError) or type(error).__name__ == "ParamValidationError":  # aiohttp's, botocore's
        return ValueError(f"{url}: is no address of an object ({_message(error)})")
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):  # botocore's
        return ValueError(
            f"{url}: no credentials ({_message(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or for a public bucket FSSPEC_S3='{\"anon\": true}'"
        )
    return _Transient(f"{_message(error)}" + (f" (status {status})" if status else ""))


def _status(error: Exception) -> int | None:
    """Return the http status behind an error; None when there is none."""
    if isinstance(error, FileNotFoundError):
        return 404
    answer = getattr(error.__cause__, "response", None)  # s3fs turns botocore's errors into OSErrors
    if isinstance(answer, dict):
        return answer["ResponseMetadata"]["HTTPStatusCode"]
    return getattr(error, "status", None)


def _message(error: Exception) -> str:
    return getattr(error, "message", "") or getattr(error, "strerror", "") or str(error) or type(error).__name__
