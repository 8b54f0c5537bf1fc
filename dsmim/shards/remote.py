"""Bytes from elsewhere: http(s) and s3 objects and the output of commands, whole, with retries.

Every transfer runs in an event loop and with connections of its own, which end with it. fsspec's usual instances share
one loop thread, which does not survive a fork, and their connections would be closed under the parent by a forked data
worker. Beginning anew costs a handshake per shard of hundreds of megabytes.

`pipe:COMMAND` is run by /bin/sh, which takes the status of a pipeline from its last command only: in
`pipe:curl URL | gzip -d` a failing curl goes unnoticed here (its short output does not: shards are held against their
index). One command without `|`, or `bash -o pipefail -c '…'`, tells of the failure itself.
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
# What a server may answer better a moment later: request timeout and too many requests, beside every 5xx.
_RETRIED = (408, 429)
# The training's random streams are seeded through `random`; drawing from it here, in a thread, would disturb them.
_jitter = random.SystemRandom()


class Missing(ValueError):
    """There is no object at that address."""


class _Passing(Exception):
    """A failure that may pass; its text is the reason."""


def is_remote(shard: str) -> bool:
    """Whether a shard is named by an address or a command, and not by a local path."""
    return shard.startswith(PIPE) or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", shard) is not None


def check(shard: str, what: str, allow_pipe: bool) -> None:
    """Raises ValueError, beginning with `what`, for a scheme that cannot be read, for a command unless they are allowed
    by name, and when the packages of the extra are missing."""
    scheme = shard.partition(":")[0].lower()
    if shard.startswith(PIPE):
        if not allow_pipe:
            raise ValueError(
                f"{what}: {shard!r} would run a command on this machine; allow it with data.allow_pipe=true in the "
                "recipe, or with --allow-pipe for the shards commands"
            )
    elif scheme not in SCHEMES:
        raise ValueError(
            f"{what}: {shard!r}: {scheme}:// cannot be read; use http://, https:// or s3://, pipe:COMMAND, or a local "
            "path"
        )
    else:
        # Imported here and now, by the thread that may fork: a fork while another thread imports a module leaves the
        # child with an import lock that nobody opens.
        _filesystem_class(shard, f"{what}: {shard!r}")


def download(url: str, file: BinaryIO, attempts: int = 5, first_wait: float = 1.0, timeout: float = 60.0) -> None:
    """Write a whole object into a file opened for writing, from its beginning.

    Server errors, broken connections, transfers cut short and `timeout` seconds without a byte are retried from the
    beginning, after first_wait seconds and then twice as long each time, give or take a half. Raises Missing or
    ValueError for what trying again does not mend, and after the last attempt; errors of the file pass unchanged.
    """
    for attempt in range(1, attempts + 1):
        file.seek(0)
        file.truncate()
        try:
            return asyncio.run(_copy(url, file, timeout))
        except _Passing as error:
            reason = error
        if attempt < attempts:
            time.sleep(first_wait * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5))
    raise ValueError(f"{url}: could not be read in {attempts} attempts; the last one: {reason}")


def fetch_small(
    url: str, limit: int = 2**28, attempts: int = 5, first_wait: float = 1.0, timeout: float = 60.0
) -> bytes | None:
    """A whole object of at most `limit` bytes, such as an index; None when there is none (commands have none).

    Raises ValueError as download does, and for an object that is larger.
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
            raise ValueError(f"{self.url}: is larger than {self.limit} bytes, which is not what was expected there")
        return super().write(data)


async def _copy(url: str, file: BinaryIO, timeout: float) -> None:
    """One attempt. Only what the source raises is judged; an error of the file is none of the network's."""
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
    except _Passing:
        raise
    except TimeoutError:
        raise _Passing(f"no byte for {timeout:g} s") from None
    except Exception as error:
        raise _judged(url, error) from error


async def _object(url: str, filesystem) -> AsyncIterator[bytes]:
    session = await filesystem.set_session()
    try:
        source = await filesystem.open_async(url, "rb", size=0)  # a size spares http a request for it
        try:
            while chunk := await source.read(CHUNK):
                yield chunk
        finally:
            await source.close()
    finally:
        await session.close()


def _filesystem(url: str, timeout: float):
    """A filesystem of the running loop. The libraries' own retries are off: there would be five times five attempts."""
    create = _filesystem_class(url, url)
    if url.lower().startswith("s3:"):
        config = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 0}}
        filesystem = create(asynchronous=True, skip_instance_cache=True, config_kwargs=config)
        filesystem.retries = 1
        return filesystem
    from aiohttp import ClientTimeout

    # aiohttp alone would cut every transfer off after five minutes, and overlook the proxy of the environment.
    client = {"timeout": ClientTimeout(total=None), "trust_env": True, "read_bufsize": CHUNK}
    return create(asynchronous=True, skip_instance_cache=True, client_kwargs=client)


def _filesystem_class(url: str, what: str):
    """Raises ValueError, beginning with `what`, when a package is missing."""
    try:
        from fsspec import get_filesystem_class

        return get_filesystem_class(url.partition(":")[0].lower())
    except ImportError:
        raise ValueError(f"{what}: needs an extra package; run: pip install 'dsmim[remote]'") from None


async def _command(command: str) -> AsyncIterator[bytes]:
    with tempfile.TemporaryFile() as complaints:  # a pipe that nobody reads would stop a talkative command
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", command, stdout=asyncio.subprocess.PIPE, stderr=complaints, start_new_session=True
        )
        try:
            while chunk := await process.stdout.read(CHUNK):
                yield chunk
            if await process.wait():
                complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 500))
                tail = complaints.read().decode(errors="replace").strip()
                raise _Passing(f"the command ended with status {process.returncode}: {tail}")
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the shell, and what it started
                await process.wait()


def _judged(url: str, error: Exception) -> Exception:
    """What an error of aiohttp, s3fs or botocore means: try again, or tell the user."""
    status = _status(error)
    if status == 404:
        return Missing(f"{url}: does not exist (404)")
    if status and status < 500 and status not in _RETRIED:
        hint = "; s3 says so of missing objects too, to those who may not list the bucket" if status == 403 else ""
        return ValueError(f"{url}: cannot be read: {_words(error)} (status {status}){hint}")
    if isinstance(error, ssl.SSLError):  # a ValueError, too
        return ValueError(f"{url}: its certificate is not trusted ({_words(error)}); see SSL_CERT_FILE")
    if isinstance(error, ValueError) or type(error).__name__ == "ParamValidationError":  # aiohttp's, botocore's
        return ValueError(f"{url}: is no address of an object ({_words(error)})")
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):  # botocore's
        return ValueError(
            f"{url}: no credentials ({_words(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or for a public bucket FSSPEC_S3='{\"anon\": true}'"
        )
    return _Passing(f"{_words(error)}" + (f" (status {status})" if status else ""))


def _status(error: Exception) -> int | None:
    """The http status behind an error, where there is one."""
    if isinstance(error, FileNotFoundError):
        return 404
    answer = getattr(error.__cause__, "response", None)  # s3fs makes OSErrors of botocore's errors
    if isinstance(answer, dict):
        return answer["ResponseMetadata"]["HTTPStatusCode"]
    return getattr(error, "status", None)


def _words(error: Exception) -> str:
    return getattr(error, "message", "") or getattr(error, "strerror", "") or str(error) or type(error).__name__
