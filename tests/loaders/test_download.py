"""Fetching the archive: checked, unpacked all or nothing, and one line for what goes wrong."""

import hashlib
import http.server
import io
import threading
import zipfile
from pathlib import Path

import pytest

from fastprune.cli.prepare import main
from fastprune.errors import InputError
from fastprune.loaders import download
from fastprune.loaders.download import fetch_tiny_imagenet
from fastprune.loaders.layout import scan

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for path in sorted(folder.rglob("*")):
            content.write(path, f"tiny-imagenet-200/{path.relative_to(folder)}")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archive(raw_master) -> bytes:
    return zipped(raw_master)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, of which the last `cut` bytes never arrive."""

    content = b""
    cut = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/tiny-imagenet-200.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: len(self.server.content) - self.server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(archive):
    with Server() as running:
        running.content = archive
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_fetched_once(server, archive, raw_master, tmp_path):
    fetch_tiny_imagenet(tmp_path / "raw", server.url, md5(archive))
    assert names(tmp_path / "raw") == {"tiny-imagenet-200"}
    assert scan(tmp_path / "raw").files == scan(raw_master).files
    fetch_tiny_imagenet(tmp_path / "raw", "http://nowhere.invalid/", "")


def test_killed_before_it_was_unpacked_it_is_not_fetched_again(archive, tmp_path):
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(archive)
    (tmp_path / ".unfinished" / "tiny-imagenet-200" / "train").mkdir(parents=True)
    fetch_tiny_imagenet(tmp_path, "http://nowhere.invalid/", md5(archive))
    assert names(tmp_path) == {"tiny-imagenet-200"}


@pytest.mark.parametrize("cut", [0, 1000], ids=["another archive", "a broken connection"])
def test_what_is_not_the_archive_is_refused_and_not_kept(cut, server, archive, tmp_path):
    server.cut = cut
    with pytest.raises(InputError, match=rf"cannot fetch {server.url} \(.*\): try again, or unpack") as caught:
        fetch_tiny_imagenet(tmp_path / "raw", server.url, md5(archive) if cut else "0" * 32)
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "raw") == set()


def test_nothing_answers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch_tiny_imagenet, "__defaults__", ("http://127.0.0.1:9/x.zip", download.MD5))
    assert main(["--download", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot fetch http://127.0.0.1:9/x.zip" in error
    assert "--source" in error
    assert names(tmp_path) == set()


def test_an_archive_of_something_else(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "note.txt").write_text("")
    content = zipped(tmp_path / "odd")
    for found in (content, content[:-30]):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / "tiny-imagenet-200.zip").write_bytes(found)
        with pytest.raises(InputError, match=r"tiny-imagenet-200\.zip is damaged \(.*\): remove it and run the same"):
            fetch_tiny_imagenet(tmp_path / "raw", "http://nowhere.invalid/", md5(found))
        assert names(tmp_path / "raw") == {"tiny-imagenet-200.zip"}


def test_a_folder_that_is_there_is_looked_into(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        fetch_tiny_imagenet(tmp_path, "http://nowhere.invalid/", "")
