"""Remote files of a corpus: downloaded once, resumed, checked, and read like local ones; from a web server and from S3."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.config.data_options import Data, Source
from shoal.data.corpus.documents import Document
from shoal.data.corpus.downloads import Downloads, name_of
from shoal.data.corpus.sources import open_corpus
from shoal.data.prepare import prepare
from shoal.errors import DataError
from shoal.system.secrets import secret_in, without_secrets
from tests.data.web import Web, running_web


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


MANY = [f"document {n} " + "word " * 40 for n in range(400)]


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr("shoal.data.corpus.downloads.PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with running_web() as web:
        web.files = {"/a/one.jsonl": lines(*MANY), "/two.jsonl.gz": gzip.compress(lines("two"), mtime=0)}
        web.etags = {"/a/one.jsonl": '"one-1"'}
        yield web


def texts(downloads: Downloads, *paths: str) -> list[str]:
    corpus = open_corpus(Source(corpus="jsonl", paths=paths), downloads)
    return [item.text for item in corpus.read() if isinstance(item, Document)]


def refused(pattern: str, downloads: Downloads, *paths: str) -> str:
    with pytest.raises(DataError) as caught:
        texts(downloads, *paths)
    assert re.search(pattern, str(caught.value)), str(caught.value)
    return str(caught.value)


@pytest.fixture
def downloads(tmp_path: Path) -> Downloads:
    return Downloads(tmp_path / "downloads")


def test_remote_and_local_files_are_one_corpus_and_remote_ones_keep_their_url(
    web: Web, downloads: Downloads, tmp_path: Path
) -> None:
    (tmp_path / "three.jsonl").write_bytes(lines("three"))
    paths = (f"{web.url}/two.jsonl.gz?download=true", str(tmp_path / "three.jsonl"), f"{web.url}/a/one.jsonl")
    assert texts(downloads, *paths) == ["two", "three", *MANY]
    corpus = open_corpus(Source(corpus="jsonl", paths=paths), downloads)
    assert [entry.name for entry in corpus.listing()] == [f"{web.url}/two.jsonl.gz", *paths[1:]]
    assert len(web.asked) == 2  # each once


def test_with_a_full_cache_no_server_is_needed(web: Web, downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{web.url}/a/one.jsonl"
    texts(downloads, url)
    web.status = 500
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert texts(downloads, url) == MANY
    message = refused("HF_HUB_OFFLINE is set; without a network, put it at", downloads, f"{web.url}/new.jsonl")
    by_hand = Path(message.rpartition("put it at ")[2])
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(lines("by hand"))
    assert texts(downloads, f"{web.url}/new.jsonl") == ["by hand"]


@pytest.mark.parametrize("tag", ['"one-1"', 'W/"weak"', ""])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_gone_on_with_or_begun_again(
    web: Web, downloads: Downloads, tag: str, ranges: bool
) -> None:
    web.ranges, web.cut_after = ranges, 60_000
    web.etags["/a/one.jsonl"] = tag
    size = len(web.files["/a/one.jsonl"])
    assert size > web.cut_after
    if ranges and tag == '"one-1"':
        assert texts(downloads, f"{web.url}/a/one.jsonl") == MANY
        assert web.asked[1] == "/a/one.jsonl from 60000"
    else:
        refused(
            "cannot read .*the same command resumes; without a network, put it at", downloads, f"{web.url}/a/one.jsonl"
        )
        web.cut_after = None
        assert texts(downloads, f"{web.url}/a/one.jsonl") == MANY


def test_a_file_that_changed_between_two_tries_is_begun_again(web: Web, downloads: Downloads) -> None:
    web.cut_after = 30_000
    web.on_body = lambda path: setattr(web, "cut_after", 0)
    refused("cannot read", downloads, f"{web.url}/a/one.jsonl")
    web.files["/a/one.jsonl"], web.etags["/a/one.jsonl"] = lines(*reversed(MANY)), '"one-2"'
    web.cut_after, web.on_body = None, lambda path: None
    assert texts(downloads, f"{web.url}/a/one.jsonl") == list(reversed(MANY))


def test_a_refresh_downloads_what_has_changed_and_only_that(web: Web, downloads: Downloads) -> None:
    paths = (f"{web.url}/a/one.jsonl", f"{web.url}/two.jsonl.gz")
    web.etags["/two.jsonl.gz"] = '"two-1"'
    texts(downloads, *paths)
    record = next(downloads.folder.glob("*/one.jsonl")).with_name("download.json")
    assert json.loads(record.read_bytes()) == {
        "url": paths[0], "bytes": len(web.files["/a/one.jsonl"]), "etag": '"one-1"', "modified": ""
    }  # fmt: skip
    web.files["/a/one.jsonl"], web.etags["/a/one.jsonl"] = lines("new"), '"one-2"'
    before = next(downloads.folder.glob("*/two.jsonl.gz")).stat().st_ino
    assert texts(downloads, *paths)[0] == MANY[0]
    assert texts(Downloads(downloads.folder, refresh=True), *paths) == ["new", "two"]
    assert next(downloads.folder.glob("*/two.jsonl.gz")).stat().st_ino == before


def test_a_damaged_copy_comes_again(web: Web, downloads: Downloads) -> None:
    url = f"{web.url}/a/one.jsonl"
    texts(downloads, url)
    copy = next(downloads.folder.glob("*/one.jsonl"))
    copy.write_bytes(copy.read_bytes()[:-10])
    assert texts(downloads, url) == MANY


def test_of_two_at_once_one_downloads(web: Web, downloads: Downloads) -> None:
    waits, found = threading.Event(), list[list[str]]()
    said: list[str] = []

    def progress(phase: str, done: int, total: int) -> None:
        said.append(phase)
        waits.set()

    url = f"{web.url}/a/one.jsonl"
    second = threading.Thread(target=lambda: found.append(texts(Downloads(downloads.folder, progress=progress), url)))

    def start_second(path: str) -> None:
        second.start()
        assert waits.wait(60)
        assert not list(downloads.folder.glob("*/one.jsonl"))  # never half seen

    web.on_body = start_second
    found.append(texts(downloads, url))
    second.join(60)
    assert found == [MANY, MANY]
    assert set(said) == {"waiting for another process, which downloads one.jsonl"}
    assert len(web.asked) == 1


def test_a_disk_too_small(web: Web, downloads: Downloads) -> None:
    web.stated_bytes = 10**16
    refused("needs 10,000,000.0 GB more, but the disk of .* set data.folder", downloads, f"{web.url}/a/one.jsonl")
    web.stated_bytes = None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refused("cannot read or write .*set data.folder to a larger disk", downloads, f"{web.url}/a/one.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert texts(downloads, f"{web.url}/a/one.jsonl") == MANY


@pytest.mark.parametrize(
    ("status", "pattern"), [(404, "does not exist"), (403, "access .* denied"), (500, "status 500")]
)
def test_answers_that_are_no_file(web: Web, downloads: Downloads, status: int, pattern: str) -> None:
    web.status = status
    refused(pattern, downloads, f"{web.url}/a/one.jsonl")
    assert not list(downloads.folder.glob("*/one.jsonl"))


def test_a_web_page_and_an_unasked_compression(web: Web, downloads: Downloads) -> None:
    web.headers = {"Content-Type": "text/html; charset=utf-8"}
    refused("is a web page", downloads, f"{web.url}/a/one.jsonl")
    web.headers = {"Content-Encoding": "gzip"}
    refused("sends .* compressed \\(gzip\\)", downloads, f"{web.url}/a/one.jsonl")
    assert texts(downloads, f"{web.url}/two.jsonl.gz") == ["two"]  # stored unchanged


def test_no_server_and_no_such_scheme(downloads: Downloads, web: Web) -> None:
    refused("cannot read http://127.0.0.1:9/a.jsonl \\(ConnectError\\)", downloads, "http://127.0.0.1:9/a.jsonl")
    refused("ftp:// is unknown; use https://, s3://", downloads, "ftp://host/a.jsonl")
    refused("is a pattern, which https has none of", downloads, f"{web.url}/*.jsonl")
    refused("not a valid URL|cannot read", downloads, "https://host:port/a.jsonl")


def test_a_name_that_leads_out_of_the_folder(web: Web, downloads: Downloads, tmp_path: Path) -> None:
    web.files["/..%2f..%2fevil.jsonl"] = lines("evil")
    assert texts(downloads, f"{web.url}/..%2f..%2fevil.jsonl") == ["evil"]
    assert {p.parent.parent for p in tmp_path.rglob("*evil*")} == {downloads.folder}


SIGNED = "https://user:secret@host/d/a.jsonl?X-Amz-Signature=abcdef&X-Amz-Expires=60&part=1"


def test_no_credential_is_in_a_name_a_file_or_a_message(web: Web, downloads: Downloads) -> None:
    assert without_secrets(SIGNED) == "https://host/d/a.jsonl?part=1"
    assert name_of(SIGNED) == "https://host/d/a.jsonl"
    signed = web.url.replace("http://", "http://user:hunter2@") + "/a/one.jsonl?sig=hunter2&token=hunter2"
    corpus = open_corpus(Source(corpus="jsonl", paths=(signed,)), downloads)
    assert corpus.listing()[0].name == f"{web.url}/a/one.jsonl"
    kept = [p for p in downloads.folder.rglob("*") if p.is_file()]
    assert not [p for p in kept if b"hunter2" in p.read_bytes() or "hunter2" in str(p)]
    web.moved["/b.jsonl"] = "http://user:hunter2@127.0.0.1:9/x?sig=hunter2"
    for status, path in ((200, "/b.jsonl"), (403, "/c.jsonl"), (500, "/c.jsonl"), (404, "/c.jsonl")):
        web.status = status
        message = refused("", downloads, signed.replace("/a/one.jsonl", path))
        assert "hunter2" not in message
        assert "user" not in message


@pytest.mark.parametrize("url", [SIGNED.replace("user:secret@", ""), "s3://b/a?sig=x", "https://h/a?b=c&token=d"])
def test_a_signed_url_is_not_stored_with_a_run(url: str) -> None:
    assert "signed URL" in secret_in(url)
    assert not secret_in("https://host/a.jsonl?download=true&signal=x")


# --- S3 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """Run moto's S3 on loopback; yield boto3's client. It has a bucket with three files of a corpus, and others."""
    from moto.server import ThreadedMotoServer

    credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "not-to-be-shown", "AWS_MAX_ATTEMPTS": "1"}
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in (credentials | address).items():
            patch.setenv(name, value)
        import boto3

        client = boto3.client("s3")
        client.create_bucket(Bucket="corpus")
        for number in range(3):
            put(client, f"d/{number}.jsonl", lines(*MANY[number::3]))
        for key in ("d/README.md", "d/.hidden.jsonl", "other/4.jsonl"):
            put(client, key, lines("other"))
        yield client
    server.stop()


def put(client: Any, key: str, content: bytes) -> None:
    client.put_object(Bucket="corpus", Key=key, Body=content)


THREE = [text for number in range(3) for text in MANY[number::3]]


def test_a_pattern_and_a_folder_of_an_object_store(s3: Any, web: Web, downloads: Downloads) -> None:
    for path in ("s3://corpus/d/*.jsonl", "s3://corpus/d", "s3://corpus/d/", "s3://corpus/d/**"):
        corpus = open_corpus(Source(corpus="jsonl", paths=(path,)), downloads)
        assert [e.name for e in corpus.listing()] == [f"s3://corpus/d/{n}.jsonl" for n in range(3)]
        assert texts(downloads, path) == THREE
    assert texts(downloads, "s3://corpus/other/4.jsonl") == ["other"]
    kept = [p.name for p in downloads.folder.rglob("*") if p.suffix == ".jsonl"]
    assert sorted(kept) == ["0.jsonl", "1.jsonl", "2.jsonl", "4.jsonl"]  # each once


def test_an_object_store_is_asked_again_only_for_a_refresh(s3: Any, web: Web, downloads: Downloads) -> None:
    path = "s3://corpus/new/*.jsonl"
    put(s3, "new/a.jsonl", lines("a"))
    assert texts(downloads, path) == ["a"]
    put(s3, "new/a.jsonl", lines("A"))
    put(s3, "new/b.jsonl", lines("b"))
    assert texts(downloads, path) == ["a"]
    assert texts(Downloads(downloads.folder, refresh=True), path) == ["A", "b"]


def test_an_object_that_is_cut_off_is_gone_on_with(
    s3: Any, web: Web, downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut the first download by a limit on file sizes, and mark what it wrote: the second one appends to that."""
    monkeypatch.setattr("shoal.data.corpus.remote_body.CHUNK_BYTES", 10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refused("cannot read or write", downloads, "s3://corpus/d/0.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    [part] = downloads.folder.glob("*/.0.jsonl.part")
    assert part.stat().st_size == 20_000
    part.write_bytes(part.read_bytes().replace(b"document 0 ", b"DOCUMENT 0 "))
    assert texts(downloads, "s3://corpus/d/0.jsonl") == ["DOCUMENT 0 " + "word " * 40, *MANY[3::3]]


def test_what_an_object_store_refuses(s3: Any, web: Web, downloads: Downloads) -> None:
    refused("s3://corpus/none, or it has no .jsonl.* files", downloads, "s3://corpus/none")
    refused("there is no s3://nobucket/a/\\*.jsonl|does not exist", downloads, "s3://nobucket/a/*.jsonl")
    refused("there is no s3://corpus/d/x\\*.jsonl", downloads, "s3://corpus/d/x*.jsonl")
    answers_only_known_keys(s3, True)
    try:
        for path in ("s3://corpus/d", "s3://corpus/d/*.jsonl", "s3://corpus/d/0.jsonl"):
            message = refused(f"access to {re.escape(path)} is denied; set AWS_ACCESS_KEY_ID", downloads, path)
            assert "not-to-be-shown" not in message
    finally:
        answers_only_known_keys(s3, False)


def answers_only_known_keys(client: Any, does: bool) -> None:
    """Make moto check the access key of each request; it knows none."""
    import urllib.request

    address = f"{client.meta.endpoint_url}/moto-api/reset-auth"
    kind = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(address, b"0" if does else b"inf", kind)).close()


def test_a_remote_corpus_is_prepared_like_its_local_copy_and_its_tokens_outlive_the_cache(
    s3: Any, web: Web, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    local.mkdir()
    for number in range(3):
        (local / f"{number}.jsonl").write_bytes(lines(*MANY[number::3]))
    options: dict[str, Any] = {"corpus": "jsonl", "tokenizer": "bytes", "seq_len": 32, "folder": str(tmp_path / "data")}
    remote = Data(paths=("s3://corpus/d",), **options)
    prepared = prepare(remote)
    assert prepared.data_id == prepare(Data(paths=(str(local),), **options)).data_id
    assert prepare(remote).notes == ()
    for path in (tmp_path / "data" / "downloads").glob("*/0.jsonl"):
        path.unlink()
    [note] = prepare(remote).notes
    assert "the corpus is gone" in note
    assert prepare(Data(paths=("s3://corpus/d",), rebuild=True, **options)).data_id == prepared.data_id
