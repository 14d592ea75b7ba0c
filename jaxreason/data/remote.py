"""Files that are elsewhere, through fsspec: object stores, web servers, the hub. They are read where they are, never copied."""

import contextlib
import dataclasses
import glob
import io
import itertools
import posixpath
import time
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from jaxreason.data import hub
from jaxreason.errors import UserError

if TYPE_CHECKING:
    import fsspec

# What pip installs for a protocol that fsspec has no code of its own for.
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
PACKAGES |= {"abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "oci": "ocifs", "oss": "ossfs", "sftp": "paramiko"}
_STAMPS = ("ETag", "etag", "md5Hash", "sha256", "blob_id", "Content-MD5", "generation", "Last-Modified", "LastModified",
           "last_modified", "mtime", "updated", "created")  # fmt: skip
_WAITS_S = (1.0, 5.0, 20.0)  # before a broken connection is opened again; a file that is gone stays gone


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file of an address; two that compare equal hold the same rows, as far as their server says."""

    url: str
    size: int | None  # bytes; None: the server does not say
    stamp: str  # its tag or checksum, else when it was changed; empty: the server says neither

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        return PurePosixPath(str(self)).name

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(str(self)).suffixes

    def open(self, in_order: bool = False) -> BinaryIO:
        """The file's bytes. ``in_order``: they are read once, from the first to the last. Raises OSError, of any failure."""
        return cast(BinaryIO, io.BufferedReader(_Stream(self, in_order), 1 << 20))


class _Stream(io.RawIOBase):
    """A file's bytes; a connection that breaks is opened again where it was, a few times."""

    def __init__(self, file: RemoteFile, in_order: bool):
        self._remote, self._in_order, self._at, self._file = file, in_order, 0, self._opened(file, in_order)

    @staticmethod
    def _opened(file: RemoteFile, in_order: bool) -> Any:
        with _as_os_errors():
            system, path = _filesystem(file.url)
            # A web server need not know ranges: what is read in order is then one answer of its, not a part for each block.
            plain = in_order and _protocol(file.url) in ("http", "https")
            return system.open(path, "rb", block_size=0) if plain else system.open(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._in_order

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        if self._in_order or (whence == 2 and self._remote.size is None):
            raise io.UnsupportedOperation(f"{self._remote} can only be read from its beginning")
        self._at = offset + (0, self._at, self._remote.size or 0)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        for wait in (*_WAITS_S, None):
            try:
                found = self._read(len(buffer))
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                self._close_file()
                if wait is None:
                    raise
                time.sleep(wait)
            else:
                break
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def _read(self, count: int) -> bytes:
        with _as_os_errors():
            if self._file is None:
                self._file = self._opened(self._remote, self._in_order)
                left = self._at if self._in_order else 0
                while left and (part := self._file.read(min(left, 1 << 20))):
                    left -= len(part)
            if not self._in_order:
                self._file.seek(self._at)
            found = self._file.read(count)
        if not found and count and self._remote.size is not None and self._at < self._remote.size:
            raise OSError(f"it ends after {self._at:,} of its {self._remote.size:,} bytes")
        return found

    def _close_file(self) -> None:
        with contextlib.suppress(Exception):  # a broken connection may fail again when it is closed
            if self._file is not None:
                self._file.close()
        self._file = None

    def close(self) -> None:
        self._close_file()
        super().close()


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Whatever a client library raises, as an OSError: each has classes of its own."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(hub.reason(error)) from None


def shown(url: str) -> str:
    """The address without its query, which may hold a signature."""
    return url.partition("?")[0] if _protocol(url) in ("http", "https") else url


def listing(source: str) -> tuple[str, list[tuple[str, RemoteFile]]]:
    """(``file``, ``directory`` or ``pattern``, the files with their paths below it). Raises UserError.

    Of a web server a directory is an address that ends with ``/`` and lists links.
    """
    try:
        with _as_os_errors():
            system, path = _filesystem(source)
            web = _protocol(source) in ("http", "https")
            if any(sign in path for sign in "*[") or (glob.has_magic(path) and not web):
                parts = itertools.takewhile(lambda part: not glob.has_magic(part), path.split("/"))
                return "pattern", _files(system, "/".join(parts), system.glob(path, detail=True))
            info = {"type": "directory"} if web and path.endswith("/") else system.info(path)
            if info["type"] == "directory":
                return "directory", _files(system, path, system.find(path, detail=True))
            return "file", [(posixpath.basename(path), _file(system, path, info))]
    except FileNotFoundError:
        raise UserError(f"data.source {shown(source)}: there is no such file or directory") from None
    except PermissionError as error:
        raise UserError(
            f"data.source {shown(source)}: it may not be read ({hub.reason(error)}); log in with its own program (aws configure, "
            "gcloud auth application-default login, hf auth login), or check the address"
        ) from None
    except OSError as error:
        raise UserError(f"data.source {shown(source)}: it cannot be reached: {hub.reason(error)}") from None


def _files(system: "fsspec.AbstractFileSystem", root: str, found: dict[str, dict]) -> list[tuple[str, RemoteFile]]:
    """The files among ``found``, and those below its directories, without hidden ones, in the order of their names."""
    paths: dict[str, dict] = {}
    for path, info in found.items():
        paths |= system.find(path, detail=True) if info["type"] == "directory" else {path: info}
    below = [(posixpath.relpath(path, root or "."), path) for path in paths]
    return [
        (relative, _file(system, path, paths[path])) for relative, path in sorted(below)
        if not any(part.startswith(".") and part != ".." for part in relative.split("/"))
    ]  # fmt: skip


def _file(system: "fsspec.AbstractFileSystem", path: str, info: dict[str, Any]) -> RemoteFile:
    if info.get("size") is None:
        info = system.info(path)
    stamp = next((f"{name} {info[name]}" for name in _STAMPS if info.get(name)), "")
    return RemoteFile(system.unstrip_protocol(path), info.get("size"), stamp)


def _protocol(url: str) -> str:
    return url.partition("://")[0].lower()


def _filesystem(url: str) -> tuple["fsspec.AbstractFileSystem", str]:
    """The file system of an address, and the path in it. Raises UserError for a protocol that is not there."""
    import fsspec

    protocol = _protocol(url)
    if "::" in url:
        raise UserError(f"data.source {shown(url)}: several protocols in one address are not read; give that of the files")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else hub.reason(error)
        raise UserError(f"data.source {shown(url)}: {protocol}:// needs a package that is not installed: {fix}") from None
    except ValueError:
        raise UserError(
            f"data.source {shown(url)}: no protocol {protocol}://; known ones are s3://, gs://, az://, hf:// and https://"
        ) from None
    if protocol == "hf" and hub.offline():
        raise UserError(f"data.source {url}: the hub cannot be reached; {hub.HELP}")
    return fsspec.core.url_to_fs(url)
