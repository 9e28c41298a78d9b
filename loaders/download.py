"""Download Tiny ImageNet from its official address, verify and unpack it."""

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
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"  # as published; detects broken transfers, gives no security


def fetch_tiny_imagenet(folder: Path, url: str = URL, md5: str = MD5) -> None:
    """Download the data set into `folder`/tiny-imagenet-200, unless `folder` already holds a data set.

    InputError if the address cannot be reached, the archive is not the published one, or writing fails.
    """
    from torchvision.datasets.utils import download_url, extract_archive

    if any((root / "train").is_dir() for root in (folder, folder / TINY_IMAGENET)):
        scan(folder)
        return
    archive = folder / f"{TINY_IMAGENET}.zip"
    with writing(folder):
        try:
            # torchvision prints its progress to stdout, which belongs to the results of a command.
            with contextlib.redirect_stdout(sys.stderr):
                download_url(url, str(folder), archive.name, md5)
        except (HTTPException, OSError, RuntimeError) as error:
            archive.unlink(missing_ok=True)
            why = getattr(error, "reason", None) or error
            raise InputError(
                f"cannot fetch {url} ({why}): try again, or unpack the archive yourself and give its folder as --source"
            ) from None
        try:
            # Unpacked aside, checked and renamed: a killed call leaves no partial data set.
            with unfinished(folder) as part:
                extract_archive(str(archive), str(part))
                scan(part)
                os.replace(part / TINY_IMAGENET, folder / TINY_IMAGENET)
        except (zipfile.BadZipFile, InputError) as error:
            raise InputError(f"{archive} is damaged ({error}): remove it and run the same command again") from None
        # Removed only now: a call killed while unpacking does not download again.
        archive.unlink()
