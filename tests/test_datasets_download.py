"""Downloads of public Vaults from a local server: continued, checked, unpacked safely.

The server answers as Hugging Face does for a large file: a redirection that announces size and
SHA-256, to another host that sends the content and knows ranges.
"""

import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

from datasets import download
from datasets.load import recognise

ROOT = Path(__file__).resolve().parents[1]


class Host:
    """A local server with one archive, and a record of the requests it got."""

    def __init__(self, content: bytes):
        self.content, self.ranges, self.asked = content, [], set()
        self.sends = None  # how much of the content can be had before the connection closes
        self.etag = None  # announced instead of the true hash
        self.knows_ranges = True
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def redirected(self) -> bool:
                if self.path.startswith("/cdn"):
                    return False
                host.asked |= {self.path} if self.path.startswith("/datasets") else set()
                etag = host.etag or hashlib.sha256(host.content).hexdigest()
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{host.port}/cdn{self.path}")
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("X-Linked-ETag", f'"{etag}"')
                self.send_header("X-Linked-Size", str(len(host.content)))
                self.end_headers()
                return True

            def do_HEAD(self):
                self.redirected()

            def do_GET(self):
                if self.redirected():
                    return
                asked = self.headers.get("Range")
                host.ranges.append(asked)
                start = int(asked.split("=")[1].rstrip("-")) if asked and host.knows_ranges else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(host.content) - start))
                if start:
                    whole = f"bytes {start}-{len(host.content) - 1}/{len(host.content)}"
                    self.send_header("Content-Range", whole)
                self.end_headers()
                self.wfile.write(host.content[start : host.sends])

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


def archive(members: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as z:
        for name, content in members.items():
            z.writestr(name, content)
    return memory.getvalue()


def use_endpoint(monkeypatch, endpoint: str) -> None:
    """As HF_ENDPOINT does, which huggingface_hub reads when it is imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = template.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def host(monkeypatch):
    members = {f"2s3z.vlt/{q}/manifest.ocdbt": q.encode() * 999 for q in ("Medium", "Expert")}
    host = Host(archive(members))
    monkeypatch.setenv("no_proxy", "*")
    use_endpoint(monkeypatch, f"http://127.0.0.1:{host.port}")
    # huggingface_hub writes 10 MB at a time and waits a second before it connects again.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    yield host
    host.server.shutdown()
    host.server.server_close()


def test_interrupted_transfer_is_continued(tmp_path, host):
    host.sends = 4000
    with pytest.raises(OSError, match="stopped at 0.0 of .* MB .*the same download again continu"):
        download.download("cfcql/2s3z", tmp_path)
    assert (tmp_path / "cfcql" / "2s3z.zip.part").read_bytes() == host.content[:4000]
    assert not (tmp_path / "cfcql" / "2s3z.vlt").exists()
    with pytest.raises(ValueError, match="half-finished download"):
        recognise(tmp_path / "cfcql" / "2s3z.zip")
    host.sends, host.ranges = None, []
    target = download.download("cfcql/2s3z", tmp_path)
    assert host.ranges == ["bytes=4000-"]
    assert host.asked == {
        f"/datasets/{download.REPOSITORY}/resolve/main/prior_work/cfcql/smac_v1/2s3z.zip"
    }
    assert (target / "Expert" / "manifest.ocdbt").read_bytes() == b"Expert" * 999
    assert [p.name for p in (tmp_path / "cfcql").iterdir()] == ["2s3z.vlt"]
    with pytest.raises(ValueError, match="is there already"):
        download.download("cfcql/2s3z", tmp_path)


def test_closed_connection_is_opened_again(tmp_path, host, monkeypatch):
    def wait(seconds):
        host.sends = None  # from the second connection on, everything is sent

    host.sends = 4000
    monkeypatch.setattr(file_download.time, "sleep", wait)
    assert download.download("cfcql/2s3z", tmp_path).is_dir()
    assert host.ranges == [None, "bytes=4000-"]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_part_of_another_version_is_replaced_or_refused(tmp_path, host, extra):
    part = tmp_path / "cfcql" / "2s3z.zip.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * (len(host.content) + extra))
    if extra <= 0:  # its size could be that of an interrupted transfer, only the hash tells
        with pytest.raises(ValueError, match="is not what was announced"):
            download.download("cfcql/2s3z", tmp_path)
        assert not part.exists()
    assert download.download("cfcql/2s3z", tmp_path).is_dir()


def test_host_without_ranges_sends_the_whole_file(tmp_path, host):
    host.knows_ranges = False
    part = tmp_path / "cfcql" / "2s3z.zip.part"
    part.parent.mkdir()
    part.write_bytes(host.content[:4000])
    assert download.download("cfcql/2s3z", tmp_path).is_dir()
    assert host.ranges == ["bytes=4000-"]


def test_file_with_another_hash_is_removed(tmp_path, host):
    host.etag = "0" * 64
    with pytest.raises(ValueError, match="is not what was announced .*sha256 0000"):
        download.download("cfcql/2s3z", tmp_path)
    assert not list((tmp_path / "cfcql").iterdir())


@pytest.mark.parametrize(
    "member", ["../evil", "2s3z.vlt/../../evil", "/evil", "C:\\evil", "..\\evil"]
)
def test_archive_that_reaches_outside_is_refused(tmp_path, host, member):
    host.content = archive({"2s3z.vlt/Medium/x": b"x", member: b"evil"})
    with pytest.raises(ValueError, match="reaches outside"):
        download.download("cfcql/2s3z", tmp_path / "in")
    assert not [p for p in tmp_path.rglob("*") if p.name in ("evil", "2s3z.vlt", "x")]


def test_link_in_an_archive_is_refused(tmp_path, host):
    link = zipfile.ZipInfo("2s3z.vlt/link")
    link.external_attr = 0o120777 << 16
    host.content = archive({link: b"/etc"})
    with pytest.raises(ValueError, match="link' reaches outside"):
        download.download("cfcql/2s3z", tmp_path)


def test_damaged_archive_is_refused(tmp_path, host):
    host.content = host.content[:5000]
    with pytest.raises(ValueError, match="damaged archive"):
        download.download("cfcql/2s3z", tmp_path)
    assert [p.name for p in (tmp_path / "cfcql").iterdir()] == ["2s3z.zip.part"]


def test_too_little_room_is_told_before_the_transfer(tmp_path, host, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda p: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="MB are needed, 0.0 are free"):
        download.download("cfcql/2s3z", tmp_path)
    assert host.ranges == []


def test_unpacked_size_must_fit_on_the_disk(tmp_path, host, monkeypatch):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("2s3z.vlt/Medium/zeros", bytes(10**7))
    host.content = memory.getvalue()
    free = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda p: free)
    with pytest.raises(OSError, match="10.0 MB are needed, 1.0 are free"):
        download.download("cfcql/2s3z", tmp_path)
    assert len(host.content) < 10**5 and not (tmp_path / "cfcql" / "2s3z.vlt").exists()


def test_unknown_name_lists_the_catalogue(tmp_path):
    with pytest.raises(ValueError, match="no dataset is named 'cfcql/9z'.*omiga/3hopper"):
        download.download("cfcql/9z", tmp_path)
    listing = download.listing()
    assert "omiga/3hopper" in listing and "599 MB" in listing and "by hand" in listing


def test_command_downloads_from_hf_endpoint(tmp_path, host):
    """In a process of its own, because huggingface_hub reads HF_ENDPOINT when it is imported."""
    command = [sys.executable, "-m", "datasets", "download", "cfcql/2s3z", "--out", str(tmp_path)]
    environment = os.environ | {"no_proxy": "*", "HF_ENDPOINT": f"http://127.0.0.1:{host.port}"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"unpacked {tmp_path / 'cfcql' / '2s3z.vlt'}")


def test_missing_network_is_told_in_one_sentence(tmp_path, monkeypatch, program):
    monkeypatch.setenv("no_proxy", "*")
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    done = program("datasets", "download", "cfcql/2s3z", "--out", tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m datasets: http://127.0.0.1:1/datasets/InstaDeepAI/og-marl/")
    assert "cannot be reached" in line and line.endswith("is there a network?")
