"""Bytes from somewhere onto disk, whole or not at all: a file from the first mirror that gives it, an archive unpacked.

A download stands under its name only when its digest is right. Until then it grows in NAME.part beside it, which
survives an interruption: the next call goes on where the last one stopped, from whichever mirror. A mirror that cannot
go on from there begins anew in NAME.part.new: what is here is given up only if its bytes turn out wrong.
"""

import contextlib
import gzip
import hashlib
import http.client
import lzma
import os
import re
import socket
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there, one process at a time is the caller's business
    fcntl = None

TRIES = 3  # connections in a row that bring nothing new, before a mirror is given up
PAUSE = 1.0  # seconds before the next connection, doubled each time that nothing new came
CHUNK = 1 << 18  # bytes


class DownloadError(OSError):
    """No mirror gave the whole file: the message says what went wrong at each, and how to go on without them."""


class _Broken(Exception):
    """The connection failed: it may do better next time."""

    unknown = False  # whether the server never said how long its file is: this may have been all of it


class _Useless(Exception):
    """This mirror will not do."""


def fetch(urls: Iterable[str], path: str | Path, *, md5: str, timeout: float = 30.0, progress: bool = True) -> Path:
    """Return `path`, holding the file with that MD5: as it is there, else from the first of `urls` that gives it.

    A connection that breaks off, or is silent for `timeout` seconds, is opened anew for the bytes that lack. A mirror
    is given up after three connections in a row that brought nothing new, or when its file has another digest. Several
    processes may ask for one file at the same time: one of them fetches it, the others wait.

    MD5 is what torchvision publishes. Nobody knows how to make other bytes with a given MD5, so mirrors need no trust.

    Raises `DownloadError` if no mirror gives the file. What arrived stays in the .part file.
    """
    path, urls = Path(path), list(urls)
    if _is_whole(path, md5):
        return path
    if path.is_file():
        warnings.warn(f"{path} is damaged (its MD5 is not {md5}): fetching it again.", stacklevel=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    failures = []
    with _alone(path.with_name(f"{path.name}.lock")):
        if _is_whole(path, md5):  # another process fetched it while this one waited
            return path
        for whole in (part, _anew(part)):
            if _is_whole(whole, md5):  # stopped between the last byte and the new name
                whole.replace(path)
                part.unlink(missing_ok=True)
                return path
        for url in urls:
            try:
                _complete(part, url, md5, timeout, progress)
                return part.replace(path)
            except _Useless as error:
                failures.append(f"\n  {url}: {error}")
        if part.is_file() and not part.stat().st_size:
            part.unlink()
    raise DownloadError(
        f"cannot download {path.name}:{''.join(failures)}\n"
        f"Try again later: what has arrived is kept. Or put the file at {path.absolute()} by hand (MD5 {md5}). "
        'Or go on without a network: the datasets "digits" and "shapes" need none.'
    )


def md5_of(path: Path) -> str:
    """The file's MD5 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def unpack(archive: str | Path, folder: str | Path) -> Path:
    """Unpack a tar archive (compressed or not) that holds a folder of that name; it appears as `folder`, whole.

    A `folder` that is there already is left as it is. Raises `ValueError` for an archive that is damaged, that would
    write outside its folder, or that holds no folder of that name; nothing is left of it then.
    """
    from tqdm import tqdm

    archive, folder = Path(archive), Path(folder)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent) as temporary:
        size, name = archive.stat().st_size, f"unpacking {archive.name}"
        bar = dict(total=size, desc=name, unit="B", unit_scale=True, leave=False)
        try:
            with archive.open("rb") as file, tqdm.wrapattr(file, "read", **bar) as counted:
                with tarfile.open(fileobj=counted) as opened:
                    opened.extractall(temporary, filter="data")  # refuses what would land outside
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
            why = str(error).partition("\n")[0].rstrip(":")  # tarfile goes on with a line for every compression
            raise ValueError(f"cannot unpack {archive} ({why}): remove it and fetch it again.") from error
        unpacked = Path(temporary) / folder.name
        if not unpacked.is_dir():
            raise ValueError(f"{archive} holds no folder {folder.name}: it is another archive than its name says.")
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its copy is as good
                raise
    return folder


def _is_whole(path: Path, md5: str) -> bool:
    return path.is_file() and md5_of(path) == md5


@contextlib.contextmanager
def _alone(lock: Path):
    """Hold the file `lock` while the block runs; whoever wants it meanwhile waits. The system frees a dead holder's."""
    if fcntl is None:
        yield
        return
    while True:
        with lock.open("w") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks: better unlocked than never
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    continue
            except FileNotFoundError:  # the one before removed it while this one waited
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _complete(part: Path, url: str, md5: str, timeout: float, progress: bool) -> None:
    """Bring `part` from what it holds to the file with that digest. Raises `_Useless` if this mirror cannot; what an
    earlier mirror or call brought is then still there, unless this one's answers speak against it."""
    anew = _anew(part)
    anew.unlink(missing_ok=True)
    most = inherited = _size(part)
    futile, refuted = 0, False
    try:
        while True:
            try:
                file = _receive(part, url, md5, timeout, progress)
            except _Broken as error:
                file = anew if anew.is_file() else part
                futile = 0 if _size(file) > most else futile + 1
                most = max(most, _size(file))
                if futile == TRIES:
                    if error.unknown and (file == anew or not inherited):
                        file.unlink(missing_ok=True)  # three times as long, and never right
                    raise _Useless(str(error)) from error
                time.sleep(PAUSE * 2 ** max(0, futile - 1))
                continue
            found = md5_of(file)
            if found == md5:
                file.replace(part)
                return
            if file == anew or not inherited:
                with file.open("rb") as opened:
                    page = opened.read(100).lstrip().startswith(b"<")
                file.unlink()
                like = ", it looks like a web page" if page else ""
                raise _Useless(f"these are other bytes (MD5 {found}, expected {md5}{like})")
            os.truncate(part, inherited)
            anew.touch()  # bytes from an earlier call or mirror may be to blame: once more from the start
            most, refuted = 0, True
    finally:
        if _size(anew) and (refuted or not inherited and _size(anew) > _size(part)):
            anew.replace(part)
        anew.unlink(missing_ok=True)


def _anew(part: Path) -> Path:
    return part.with_name(f"{part.name}.new")


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _receive(part: Path, url: str, md5: str, timeout: float, progress: bool) -> Path:
    """One connection: append what lacks to what there is, or begin anew beside it where the server cannot go on from
    there. Returns the file that is now at least as long as the server's."""
    from tqdm import tqdm

    anew = _anew(part)
    file = anew if anew.is_file() else part
    start = _size(file)
    request = urllib.request.Request(url, headers={"User-Agent": "karat-lite"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with _network(timeout):
            response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return file
        kind = _Broken if error.code >= 500 or error.code in (408, 429) else _Useless
        raise kind(f"HTTP {error.code} {error.reason}") from error
    except ValueError as error:  # it sends on to an address that is none
        raise _Useless(f"{error}") from error
    with response:
        length, total = response.headers.get("Content-Length"), None
        span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if start and response.status == 206 and not (span and int(span[1]) == start):
            if file == anew:
                raise _Useless("it answers with other bytes than it is asked for")
            anew.touch()
            return _receive(part, url, md5, timeout, progress)
        if response.status != 206 and start:
            file, start = anew, 0
        if response.status == 206 and span and span[2] != "*":
            total = int(span[2])  # of the whole file: an answer may bring less than was asked
        elif length is not None and length.strip().isdecimal():
            total = start + int(length)
        bar = tqdm(
            total=total,
            initial=start,
            desc=f"{part.stem} from {urllib.parse.urlsplit(url).hostname}",
            unit="B",
            unit_scale=True,
            mininterval=0.5,
            leave=False,
            disable=not progress,
        )
        with file.open("ab" if start else "wb") as opened, bar:
            while True:
                with _network(timeout):
                    chunk = response.read1(CHUNK)
                if not chunk:
                    break
                bar.update(opened.write(chunk))
    if total is not None and _size(file) < total:
        raise _Broken(f"the connection closed after {_size(file):,} of {total:,} bytes")
    if total is None and not response.chunked and md5_of(file) != md5:  # the end of a chunked answer is said
        broken = _Broken(f"the connection closed after {_size(file):,} bytes, MD5 {md5_of(file)}, expected {md5}")
        broken.unknown = True
        raise broken
    return file


@contextlib.contextmanager
def _network(timeout: float):
    """Turn what a network fails with into `_Broken` or `_Useless`; a server's own refusal (HTTPError) stays itself."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # urllib wraps what fails before the answer
        if isinstance(reason, socket.gaierror):
            raise _Useless(f"no such host, or no network ({reason})") from error
        silent = isinstance(reason, TimeoutError)
        raise _Broken(f"silent for {timeout:g} s" if silent else str(reason) or type(reason).__name__) from error
