"""Images that records name by URL, fetched from a server in a thread."""

from __future__ import annotations

import functools
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.memory import measure
from vembed_ds.config.loading import parse_config
from vembed_ds.data import image_urls, images, processors
from vembed_ds.data.image_urls import ImageUrl, fetch_image
from vembed_ds.data.images import first_missing_image, open_image
from vembed_ds.data.processors import content_key
from vembed_ds.data.records import Item, RecordReader
from vembed_ds.errors import DataError
from vembed_ds.training.data_setup import build_reader, dataset_entries
from vembed_ds.training.run_saving import export_settings


def png() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by the path; notes what was asked."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        kind, _, rest = self.path[1:].partition("?")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif kind == "endless":  # no length is announced
            self.send_response(200)
            self.end_headers()
            block = b"x" * 2**20
            while True:  # ends when the client goes away
                self.wfile.write(block)
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif kind == "short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        elif kind.endswith(".png"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())
        else:
            self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


class Server(ThreadingHTTPServer):
    """Clients that go away are what is tested here."""

    def handle_error(self, *_: Any) -> None:
        """Nothing on standard error."""


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of a server of this machine."""
    handler = type("Handler", (Handler,), {"seen": []})
    with Server(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening images may reach this machine."""
    allowed = functools.partial(fetch_image, allow_private=True)
    monkeypatch.setattr(images, "fetch_image", allowed)
    monkeypatch.setattr(processors, "fetch_image", allowed)


def fetched(url: str, **options: Any) -> bytes:
    return fetch_image(url, place="a.jsonl, record 3: image", allow_private=True, **options)


def reader(**options: Any) -> RecordReader:
    return RecordReader(
        ["query", "image"],
        retrieval_mode="t2i",
        column_mapping={},
        image_root="/data",
        origin="a.jsonl",
        **options,
    )


def test_an_image_is_fetched_where_it_is_allowed(server: str, reachable: None) -> None:
    for url in (f"{server}/a.png", f"{server}/to?/to?/a.png", f"{server}/ä b.png".upper()):
        url = url.replace(".PNG", ".png")
        record = reader(allow_image_urls=True).read({"query": "a", "image": url}, 3)
        assert record.positive.image == url
        assert first_missing_image([record]) is None
        source = pickle.loads(pickle.dumps(record)).positive.image
        picture = open_image(source, origin="a.jsonl, record 3")
        assert np.asarray(picture).shape == (2, 3, 3)


def test_it_is_refused_where_it_is_not(server: str, reachable: None) -> None:
    with pytest.raises(
        DataError,
        match=r"a.jsonl, record 3, column 'image': image 'http://.*a.png' is a http: URL, and nothing is "
        "fetched while training; download it first, or set allow_image_urls: true when you trust",
    ):
        reader().read({"query": "a", "image": f"{server}/a.png"}, 3)
    with pytest.raises(DataError, match="is a http: URL, and nothing is fetched"):
        open_image(f"{server}/a.png", origin="a")  # a plain text is the name of a file
    for url in ("ftp://a/b.png", "file:/etc/passwd", "data:image/png,x"):
        with pytest.raises(DataError, match="URL, and nothing is fetched while training; downl"):
            reader(allow_image_urls=True).read({"query": "a", "image": url}, 3)


def test_only_entries_that_allow_it_have_it(tmp_path: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"query": "a", "image": "b"}\n')
    entry = {"data_path": str(tmp_path / "a.jsonl")}
    names = {"name": "one"}, {"name": "two", "allow_image_urls": True}
    config = parse_config({"model_name": "m", "datasets": [entry | name for name in names]})
    found = [
        build_reader(["query", "image"], own, paths=["a"]).allow_image_urls
        for own in dataset_entries(config.data).values()
    ]
    assert found == [False, True]


def test_the_permission_is_not_exported(tmp_path: Any) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    values = {"model_name": "m", "data_path": str(tmp_path / "a.jsonl"), "allow_image_urls": True}
    config = parse_config(values)
    assert dataset_entries(config.data)[""].allow_image_urls is True
    assert "allow_image_urls" not in str(export_settings(config))


def test_a_url_counts_as_itself_unless_files_are_read(server: str, reachable: None) -> None:
    one, other = (Item(image=ImageUrl(f"{server}/{name}.png")) for name in "ab")
    path = Item(image=str(one.image))
    assert len({content_key(item) for item in (one, other, path)}) == 3
    assert content_key(one, read_files=True) == content_key(Item(image=png()))
    assert content_key(one, read_files=True) == content_key(other, read_files=True)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone", "is answered by 404 Not Found"),
        ("/short", "ends 990 bytes early|IncompleteRead"),
        ("/endless", "is larger than 64 MiB"),
        ("/to?" * 9 + "/a.png", "redirects more than 5 times"),
        ("/to?file:///etc/passwd", "leads to 'file:///etc/passwd', and only http and https are"),
        ("/to?ftp://a/b.png", "leads to 'ftp://a/b.png', and only http and https are fetched"),
    ],
)
def test_what_is_not_read(server: str, path: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        fetched(server + path)
    text = str(caught.value)
    assert text.startswith(f"a.jsonl, record 3: image {server}{path} ")
    assert any(part in text for part in message.split("|"))
    assert text.endswith("; correct the URL, download the image or remove the record")


def test_a_server_that_drips_is_left(server: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"/drip is not there after 0.5 s; correct"):
        fetched(f"{server}/drip", total_seconds=0.5)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_never_answers_is_left(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/a.png"
        with pytest.raises(DataError, match=r"is not there after 0.3 s"):
            fetched(url, total_seconds=0.3)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/a.png", "http://a:b/", "http://[::1/a.png"):
        with pytest.raises(
            DataError, match=r"record 3: image http.* cannot be fetched \(\w+Error: "
        ):
            fetched(url)


ADDRESSES = [
    "127.0.0.1",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.169.254",
    "224.0.0.1",
    "::1",
    "::",
    "::ffff:127.0.0.1",
    "fe80::1",
    "fe80::1%eth0",
    "fd00::1",
    "2002:7f00:1::",
    "64:ff9b::a01:203",
    "ff02::1",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_private_addresses_are_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Whatever the name is, and also when only one of its addresses is private."""
    entries = [(None, None, None, "", (name, 80)) for name in ("93.184.216.34", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    monkeypatch.setattr(socket, "create_connection", None)
    with pytest.raises(DataError, match=rf"innocent.example/a.png leads to {address}, an addr"):
        fetch_image("https://innocent.example/a.png", place="a")


def test_the_address_that_was_looked_at_is_connected_to(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that would mean another address the second time is asked for once."""
    look_up, asked = socket.getaddrinfo, []

    def resolve(host: str, *arguments: Any, **options: Any) -> Any:
        asked.append(host)
        return look_up("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(image_urls, "_is_public", lambda _: True)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = server.replace("127.0.0.1", "innocent.example")
    assert fetch_image(f"{url}/a.png", place="a") == png()
    assert asked.count("innocent.example") == 1


def test_a_redirect_to_this_machine_is_refused(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = iter([True, False])
    monkeypatch.setattr(image_urls, "_is_public", lambda _: next(public))
    with pytest.raises(DataError, match=r"/to\?/a.png leads to 127.0.0.1, an address of this mach"):
        fetch_image(f"{server}/to?/a.png", place="a")


def test_public_addresses_are_not_refused() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"):
        assert image_urls._is_public(address)


def test_a_large_answer_takes_bounded_memory(server: str) -> None:
    megabytes, outcome = measure(
        "from vembed_ds.data.image_urls import fetch_image\nfrom vembed_ds.errors import DataError",
        "try:\n    fetch_image(sys.argv[1], place='a', allow_private=True)\n"
        "except DataError as error:\n    outcome = error",
        f"{server}/endless",
    )
    assert "is larger than 64 MiB" in outcome
    assert megabytes < 150
