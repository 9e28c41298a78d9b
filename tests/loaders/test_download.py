"""Fetching the archive: resumed, checked, unpacked all or nothing, and one line for what goes wrong."""

import hashlib
import http.server
import io
import threading
import zipfile

import pytest

from fastprune.cli.prepare_data import main
from fastprune.errors import InputError
from fastprune.loaders import download
from fastprune.loaders.download import fetch_tiny_imagenet
from fastprune.loaders.layout import scan


@pytest.fixture(scope="module")
def archive(raw_master) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for path in sorted(raw_master.rglob("*")):
            content.write(path, f"tiny-imagenet-200/{path.relative_to(raw_master)}")
    return buffer.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, from where it is asked to, and cuts the first `cuts` answers in half."""

    content = b""
    cuts = 0
    ranges = True

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/tiny-imagenet-200.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if asked and start >= len(server.content):
            self.send_error(416)
            return
        rest = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

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
    for _ in range(2):
        fetch_tiny_imagenet(tmp_path / "raw", server.url, md5(archive))
    assert server.asked == [None]
    assert names(tmp_path / "raw") == {"tiny-imagenet-200"}
    assert scan(tmp_path / "raw").files == scan(raw_master).files


@pytest.mark.parametrize("ranges", [True, False], ids=["resumed", "started again"])
def test_a_broken_connection_goes_on(ranges, server, archive, tmp_path):
    server.cuts, server.ranges = 1, ranges
    with pytest.raises(InputError, match=r"cannot fetch .*the same command goes on later") as caught:
        fetch_tiny_imagenet(tmp_path / "raw", server.url, md5(archive))
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "raw") == {"tiny-imagenet-200.zip.part"}
    fetch_tiny_imagenet(tmp_path / "raw", server.url, md5(archive))
    assert server.asked == [None, f"bytes={len(archive) // 2}-"]
    assert names(tmp_path / "raw") == {"tiny-imagenet-200"}


def test_killed_between_the_last_byte_and_the_check(server, archive, tmp_path):
    (tmp_path / "tiny-imagenet-200.zip.part").write_bytes(archive)
    fetch_tiny_imagenet(tmp_path, server.url, md5(archive))
    assert names(tmp_path) == {"tiny-imagenet-200"}


def test_another_archive_is_refused_and_not_kept(server, archive, tmp_path):
    with pytest.raises(InputError, match=f"MD5 {md5(archive)}, not {'0' * 32}"):
        fetch_tiny_imagenet(tmp_path / "raw", server.url, "0" * 32)
    assert names(tmp_path / "raw") == set()


def test_nobody_answers(server, tmp_path, capsys, monkeypatch):
    server.server_close()
    server.socket.close()
    monkeypatch.setattr(fetch_tiny_imagenet, "__defaults__", ("http://127.0.0.1:9/x.zip", download.MD5))
    assert main(["--download", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot fetch http://127.0.0.1:9/x.zip" in error
    assert "--source" in error
    assert names(tmp_path) == set()


def test_the_answer_is_no_archive(server, tmp_path):
    server.content = b"<html>moved</html>"
    with pytest.raises(InputError, match="MD5"):
        fetch_tiny_imagenet(tmp_path, server.url)
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="is damaged"):
        fetch_tiny_imagenet(tmp_path, server.url)
    assert names(tmp_path) == {"tiny-imagenet-200.zip"}


def odd(name: str, mode: int = 0o100644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        content.writestr(entry, "/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        odd("../outside"),
        odd("tiny-imagenet-200/../../outside"),
        odd("/tmp/outside"),
        odd("other/file"),
        odd("tiny-imagenet-200/train/link", 0o120777),
    ],
    ids=["above", "above by a detour", "absolute", "another folder", "link"],
)
def test_entries_that_leave_the_folder_are_refused(content, server, tmp_path):
    server.content = content
    with pytest.raises(InputError, match="is not Tiny ImageNet: it holds"):
        fetch_tiny_imagenet(tmp_path / "raw", server.url, md5(content))
    assert names(tmp_path) == {"raw"}
    assert names(tmp_path / "raw") == {"tiny-imagenet-200.zip"}


def test_too_much_is_refused(server, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="more than 1000 bytes"):
        fetch_tiny_imagenet(tmp_path, server.url, md5(archive))


def test_a_folder_that_is_there_is_not_fetched(raw_master, tmp_path):
    fetch_tiny_imagenet(raw_master, "http://nowhere.invalid/", "")
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        fetch_tiny_imagenet(tmp_path, "http://nowhere.invalid/", "")
