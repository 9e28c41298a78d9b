"""Fetch Tiny ImageNet from its official address: resumed where it broke off, checked, and unpacked all or nothing."""

import hashlib
import os
import shutil
import stat
import sys
import urllib.error
import urllib.request
import zipfile
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from fastprune.errors import InputError
from fastprune.loaders.layout import FOLDER_NAME, scan
from fastprune.loaders.publish import writing

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"  # as published; it guards against broken transfers, not against an attacker
BLOCK = 1 << 20  # bytes
MOST_BYTES = 2 << 30  # unpacked; the data set has 0.5 GiB
TIMEOUT = 30  # seconds without an answer


def fetch_tiny_imagenet(folder: Path, url: str = URL, md5: str = MD5) -> None:
    """Put the data set into `folder`/tiny-imagenet-200, unless a data set is there.

    InputError where the address cannot be reached, the archive is not the published one, or the disk does not take it.
    """
    if any((root / "train").is_dir() for root in (folder, folder / FOLDER_NAME)):
        scan(folder)
        return
    with writing(folder):
        archive = folder / "tiny-imagenet-200.zip"
        if not archive.exists():
            part = archive.with_name(f"{archive.name}.part")
            _download(url, part)
            if (found := _md5(part)) != md5:
                part.unlink()
                raise InputError(f"{url} gave an archive with MD5 {found}, not {md5}: try again, or fetch it by hand")
            os.replace(part, archive)
        _unpack(archive, folder)
        archive.unlink()


def _download(url: str, part: Path) -> None:
    """Append to `part` what is missing of `url`."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            _append(answer, part, done if answer.status == 206 else 0)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing
            return
        raise InputError(f"{url} answered {error.code} {error.reason}: {_BY_HAND}") from None
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"cannot fetch {url} ({reason}): the same command goes on later, or {_BY_HAND}") from None


_BY_HAND = "unpack the archive yourself and name its folder with --source"


def _append(answer: HTTPResponse, part: Path, done: int) -> None:
    length = answer.headers.get("Content-Length")
    total = done + int(length) if length else None
    with (
        open(part, "ab" if done else "wb") as file,
        tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="fetching", file=sys.stderr) as bar,
    ):
        while block := answer.read(BLOCK):
            file.write(block)
            bar.update(len(block))
        done = file.tell()
    if total is not None and done < total:
        raise ConnectionError(f"the connection broke after {done} of {total} bytes")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack into a hidden folder and rename that, so that a killed call leaves no half data set."""
    part = folder / ".unpacking"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            entries = content.infolist()
            _refuse_odd(entries, archive)
            for entry in tqdm(entries, desc="unpacking", unit=" files", unit_scale=True):
                content.extract(entry, part)
        scan(part)
        os.replace(part / FOLDER_NAME, folder / FOLDER_NAME)
    except zipfile.BadZipFile as error:
        raise InputError(f"{archive} is damaged ({error}): remove it and run the same command again") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _refuse_odd(entries: list[zipfile.ZipInfo], archive: Path) -> None:
    """InputError where an entry would land outside the folder, is a link, or all of them are too large together."""
    for entry in entries:
        path = PurePosixPath(entry.filename)
        link = stat.S_ISLNK(entry.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or path.parts[:1] != (FOLDER_NAME,) or link:
            raise InputError(f"{archive} is not Tiny ImageNet: it holds {entry.filename!r}")
    if sum(entry.file_size for entry in entries) > MOST_BYTES:
        raise InputError(f"{archive} is not Tiny ImageNet: it unpacks to more than {MOST_BYTES} bytes")
