"""Fetch Tiny ImageNet from its official address: checked, and unpacked all or nothing."""

import contextlib
import os
import sys
import zipfile
from http.client import HTTPException
from pathlib import Path

from fastprune.errors import InputError
from fastprune.loaders.layout import TINY_IMAGENET, scan
from fastprune.loaders.preparation import unfinished, writing

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"  # as published; it guards against broken transfers, not against an attacker


def fetch_tiny_imagenet(folder: Path, url: str = URL, md5: str = MD5) -> None:
    """Put the data set into `folder`/tiny-imagenet-200, unless a data set is there.

    The archive stays until it is unpacked, so that a call that is killed meanwhile does not fetch it again.  InputError
    where the address cannot be reached, the archive is not the published one, or the disk does not take it.
    """
    from torchvision.datasets.utils import download_url, extract_archive

    if any((root / "train").is_dir() for root in (folder, folder / TINY_IMAGENET)):
        scan(folder)
        return
    archive = folder / f"{TINY_IMAGENET}.zip"
    with writing(folder):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                download_url(url, str(folder), archive.name, md5)
        except (HTTPException, OSError, RuntimeError) as error:
            archive.unlink(missing_ok=True)
            why = getattr(error, "reason", None) or error
            raise InputError(
                f"cannot fetch {url} ({why}): try again, or unpack the archive yourself and give its folder as --source"
            ) from None
        try:
            with unfinished(folder) as part:
                extract_archive(str(archive), str(part))
                scan(part)
                os.replace(part / TINY_IMAGENET, folder / TINY_IMAGENET)
        except (zipfile.BadZipFile, InputError) as error:
            raise InputError(f"{archive} is damaged ({error}): remove it and run the same command again") from None
        archive.unlink()
