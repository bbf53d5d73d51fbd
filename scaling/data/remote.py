"""Token shards in a bucket (``gs://``, ``s3://`` or any file system of fsspec), read by parts.

The small files (manifest, offsets, digests) are fetched whole. Tokens are read in blocks, each fetched when a
row first needs it and kept in the cache folder, a file a block, under a name that holds the remote file's own
version: a run reads what it trains on once, and a second run reads it from disk. A shard's range is asked for
through fsspec, whose packages for gs:// and s3:// etils.epath uses too.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import uuid
from pathlib import Path

import numpy as np

from scaling.config import ConfigError
from scaling.data.cache import cache_root

BLOCK_BYTES = 4 * 2**20
_OPEN_BLOCKS = 256  # mapped at once, of each shard


def is_remote(path: str) -> bool:
    """Whether a path names a file system, as in ``gs://bucket/shards``."""
    return "://" in str(path)


class RemoteFolder:
    """A folder of shards elsewhere, with the few operations of ``pathlib.Path`` that opening shards needs."""

    def __init__(self, url: str):
        """Connects.

        Raises:
          ConfigError: no such kind of file system, or its package is not installed.
        """
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"data.path is {url!r}, which cannot be opened ({error}); it must be a folder, or a URL "
                "whose package is installed: pip install 'scaling[cloud]' has those of gs:// and s3://"
            ) from error

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        """A file's bytes, or those of a range.

        Raises:
          ConfigError: it cannot be read, or is shorter than the range.
        """
        try:
            data = self.fs.cat_file(f"{self.root}/{name}", start=begin, end=end)
        except Exception as error:  # each file system has errors of its own
            raise ConfigError(
                f"data.path: {self / name} cannot be read ({type(error).__name__}: {error}); it must "
                "be there, and readable with this machine's credentials"
            ) from error
        if begin is not None and len(data) != end - begin:
            raise ConfigError(
                f"{self / name} has {len(data)} bytes from {begin} on; {end - begin} were expected"
            )
        return data

    def stat(self, name: str) -> tuple[int, str]:
        """(bytes, version) of a file; the version changes when its content does.

        Raises:
          ConfigError: it is missing.
        """
        try:
            info = self.fs.info(f"{self.root}/{name}")
        except Exception as error:
            raise ConfigError(
                f"data.path: the file {self / name} that manifest.json names cannot be read "
                f"({type(error).__name__}: {error}); it must stay where it is"
            ) from error
        keys = ("etag", "ETag", "generation", "md5Hash", "crc32c", "mtime", "LastModified", "created")
        return int(info["size"]), str(next((info[key] for key in keys if info.get(key)), ""))

    def array(self, name: str) -> np.ndarray:
        """A whole ``.npy`` file.

        Raises:
          ConfigError: it is not one.
        """
        try:
            return np.load(io.BytesIO(self.read(name)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ConfigError(f"{self / name} is not a whole .npy file ({error}); write it again") from error

    def tokens(self, name: str, dtype: np.dtype, block_bytes: int = BLOCK_BYTES) -> RemoteTokens:
        """A shard's tokens, fetched block by block.

        Raises:
          ConfigError: another dtype or more dimensions in the header, or a size that is not whole tokens.
        """
        size, version = self.stat(name)
        begin = 0
        if name.endswith(".npy"):
            header = io.BytesIO(self.read(name, 0, min(size, 4096)))
            try:
                parts = np.lib.format.read_magic(header)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }
                shape, _, found = read[parts](header)
            except (ValueError, KeyError) as error:
                raise ConfigError(f"{self / name} is not a .npy file ({error}); write it again") from error
            begin = header.tell()
            if found != dtype or len(shape) != 1 or size - begin != shape[0] * dtype.itemsize:
                raise ConfigError(
                    f"{self / name} holds {found} {shape} in {size} bytes; it must hold {dtype.name} in one "
                    "dimension, whole"
                )
        if size == begin or (size - begin) % dtype.itemsize:
            raise ConfigError(f"{self / name} has {size} bytes; it must hold whole {dtype.name} tokens")
        key = hashlib.sha256(f"{self / name}\0{size}\0{version}\0{block_bytes}".encode()).hexdigest()[:32]
        return RemoteTokens(self, name, dtype, begin, size, cache_root() / "remote" / key, block_bytes)


class RemoteTokens:
    """A 1-D array of tokens fetched as it is read; indexed with slices of step 1 and integer arrays."""

    ndim = 1

    def __init__(self, folder, name, dtype, begin, end, cache, block_bytes):
        self.folder, self.name, self.dtype = folder, name, dtype
        self.begin, self.end, self.cache, self.block_bytes = begin, end, Path(cache), block_bytes
        self.size = (end - begin) // dtype.itemsize
        self.shape = (self.size,)
        self.per_block = block_bytes // dtype.itemsize
        self._block = functools.lru_cache(_OPEN_BLOCKS)(self._read_block)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index) -> np.ndarray:
        if isinstance(index, slice):
            begin, end, step = index.indices(self.size)
            if step != 1:
                raise IndexError("a slice of remote tokens must have step 1")
            blocks = range(begin // self.per_block, -(-end // self.per_block)) if end > begin else ()
            parts = [self._block(b) for b in blocks]
            whole = np.concatenate(parts) if parts else np.zeros(0, self.dtype)
            offset = blocks[0] * self.per_block if parts else 0
            return whole[begin - offset : max(end, begin) - offset]
        index = np.asarray(index)
        out = np.empty(index.shape, self.dtype)
        block = index // self.per_block
        for b in np.unique(block).tolist():
            here = block == b
            out[here] = self._block(b)[index[here] - b * self.per_block]
        return out

    def _read_block(self, b: int) -> np.ndarray:
        path = self.cache / f"{b:08d}"
        begin = self.begin + b * self.block_bytes
        size = min(self.block_bytes, self.end - begin)
        if not path.exists() or path.stat().st_size != size:
            data = self.folder.read(self.name, begin, begin + size)
            self.cache.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            aside.write_bytes(data)
            os.replace(aside, path)  # whole or not at all; two readers write the same bytes
        return np.asarray(np.memmap(path, self.dtype, "r"))
