"""Transfers of public Vaults from a server of this machine: resumed, checked, unpacked safely."""

import hashlib
import http.server
import io
import threading
import zipfile

import pytest

import datasets
import download


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


class Host:
    """A server of this machine that has one archive, and the requests it got."""

    def __init__(self, content: bytes):
        self.content, self.ranges, self.sends, self.tag = content, [], None, None
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def redirected(self):
                """As Hugging Face does: the linked file's size and hash are told on the way."""
                if self.path.startswith("/elsewhere"):
                    return False
                tag = host.tag or hashlib.sha256(host.content).hexdigest()
                self.send_response(302)
                self.send_header("Location", f"/elsewhere{self.path}")
                self.send_header("X-Linked-ETag", f'"{tag}"')
                self.send_header("X-Linked-Size", str(len(host.content)))
                self.end_headers()
                return True

            def do_HEAD(self):
                if not self.redirected():
                    self.send_response(200)
                    self.send_header("ETag", '"of no use"')
                    self.end_headers()

            def do_GET(self):
                if self.redirected():
                    return
                host.ranges.append(self.headers.get("Range"))
                start = int(self.headers["Range"].split("=")[1].rstrip("-"))
                self.send_response(206)
                self.send_header("Content-Length", str(len(host.content) - start))
                whole = f"bytes {start}-{len(host.content) - 1}/{len(host.content)}"
                self.send_header("Content-Range", whole)
                self.end_headers()
                self.wfile.write(host.content[start : host.sends])  # perhaps not all of it

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


def archive(members: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as z:
        for name, content in members.items():
            z.writestr(name, content)
    return memory.getvalue()


@pytest.fixture
def host(monkeypatch):
    members = {f"2s3z.vlt/{q}/manifest.ocdbt": q.encode() * 999 for q in ("Medium", "Expert")}
    host = Host(archive(members))
    monkeypatch.setattr(download, "HOST", host.url)
    yield host
    host.server.shutdown()
    host.server.server_close()


def test_a_transfer_that_stopped_goes_on_where_it_stopped(tmp_path, host):
    host.sends = 4000
    with pytest.raises(OSError, match="stopped at 0.0 of .* MB .*the same download again goes on"):
        download.download("cfcql/2s3z", tmp_path)
    assert (tmp_path / "cfcql" / "2s3z.zip.part").read_bytes() == host.content[:4000]
    assert not (tmp_path / "cfcql" / "2s3z.vlt").exists()
    with pytest.raises(ValueError, match="half-finished download"):
        datasets.recognise(tmp_path / "cfcql" / "2s3z.zip")
    host.sends = None
    target = download.download("cfcql/2s3z", tmp_path)
    assert host.ranges == ["bytes=0-", "bytes=4000-"]
    assert (target / "Expert" / "manifest.ocdbt").read_bytes() == b"Expert" * 999
    assert [p.name for p in (tmp_path / "cfcql").iterdir()] == ["2s3z.vlt"]
    with pytest.raises(ValueError, match="is there already"):
        download.download("cfcql/2s3z", tmp_path)


def test_what_is_not_what_was_announced_is_removed(tmp_path, host):
    host.tag = "0" * 64
    with pytest.raises(ValueError, match="is not what was announced .*sha256 0000"):
        download.download("cfcql/2s3z", tmp_path)
    assert not list((tmp_path / "cfcql").iterdir())


@pytest.mark.parametrize(
    "member", ["../evil", "2s3z.vlt/../../evil", "/evil", "C:\\evil", "..\\evil"]
)
def test_an_archive_that_reaches_outside_is_refused_unopened(tmp_path, host, member):
    host.content = archive({"2s3z.vlt/Medium/x": b"x", member: b"evil"})
    with pytest.raises(ValueError, match="reaches outside"):
        download.download("cfcql/2s3z", tmp_path / "in")
    assert not [p for p in tmp_path.rglob("*") if p.name in ("evil", "2s3z.vlt", "x")]


def test_a_link_in_an_archive_is_refused(tmp_path, host):
    link = zipfile.ZipInfo("2s3z.vlt/link")
    link.external_attr = 0o120777 << 16
    host.content = archive({link: b"/etc"})
    with pytest.raises(ValueError, match="link' reaches outside"):
        download.download("cfcql/2s3z", tmp_path)


def test_no_network_no_room_and_no_such_file_are_told_in_one_sentence(tmp_path, host, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda p: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="MB are needed, 0.0 are free"):
        download.download("cfcql/2s3z", tmp_path)
    monkeypatch.setattr(download, "HOST", "http://127.0.0.1:1")
    with pytest.raises(OSError, match="127.0.0.1:1 cannot be reached .*is there a network"):
        download.download("cfcql/2s3z", tmp_path)
    with pytest.raises(ValueError, match="no dataset is named 'cfcql/9z'.*omiga/3hopper"):
        download.download("cfcql/9z", tmp_path)
    listing = download.listing()
    assert "omiga/3hopper" in listing and "599 MB" in listing and "by hand" in listing
