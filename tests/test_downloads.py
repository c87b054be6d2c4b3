"""Downloads from servers that break off, cheat or sleep: whole or not at all, and said."""

import contextlib
import hashlib
import socket
import threading
import warnings

import numpy as np
import pytest
import tqdm
from mirrors import nobody, refuses, sends, serving

from karat_lite import downloads
from karat_lite.downloads import DownloadError, fetch

FILE = np.random.default_rng(0).bytes(200_000)
MD5 = hashlib.md5(FILE).hexdigest()
OTHER = bytes(reversed(FILE))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "file.bin"


def got(path, *urls, **options):
    """Fetch from these addresses, and see that the file is there, whole, and alone in its folder."""
    assert fetch(urls, path, md5=MD5, **options) == path
    assert path.read_bytes() == FILE
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def failed(path, *urls, **options) -> str:
    """Fetch in vain; what the error says."""
    with pytest.raises(DownloadError) as error:
        fetch(urls, path, md5=MD5, **options)
    assert not path.exists()
    return str(error.value)


def part_of(path, content: bytes):
    path.parent.mkdir(exist_ok=True)
    part = path.with_name("file.bin.part")
    part.write_bytes(content)
    return part


# ---- what goes well -------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_whole(path):
    with serving(FILE) as mirror:
        got(path, mirror.url)
    assert mirror.asked == [None]


def test_a_bar_shows_what_has_arrived(path, capsys, monkeypatch):
    class Bar(tqdm.tqdm):
        def close(self):
            if not self.disable:  # neither silenced nor closed before
                bars.append((self.initial, self.n, self.total))
            super().close()

    bars = []
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with serving(FILE, sends(70_000), sends()) as mirror:
        got(path, mirror.url)
        assert bars == [(0, 70_000, 200_000), (70_000, 200_000, 200_000)]
        assert "file.bin from 127.0.0.1" in capsys.readouterr().err
        path.unlink()
        got(path, mirror.url, progress=False)
    assert capsys.readouterr().err == ""


def test_a_redirection_is_followed_and_takes_the_range_along(path):
    part_of(path, FILE[:1000])
    with serving(FILE) as mirror, serving(b"", refuses(302, to=mirror.url)) as door:
        got(path, door.url)
    assert mirror.asked == ["bytes=1000-"]


def test_a_whole_file_is_left_alone(path):
    path.parent.mkdir()
    path.write_bytes(FILE)
    with serving(FILE) as mirror, warnings.catch_warnings():
        warnings.simplefilter("error")
        got(path, mirror.url)
    assert mirror.asked == []


def test_a_damaged_file_is_said_and_fetched_again(path):
    path.parent.mkdir()
    path.write_bytes(FILE[:-1])
    with serving(FILE) as mirror, pytest.warns(UserWarning, match=f"file.bin is damaged .*{MD5}.*again"):
        got(path, mirror.url)
    assert mirror.asked == [None]


# ---- going on where it broke off ------------------------------------------------------------------------------------


def test_a_dropped_connection_is_continued(path):
    with serving(FILE, sends(70_000), sends()) as mirror:
        got(path, mirror.url)
    assert mirror.asked == [None, "bytes=70000-"]


def test_as_long_as_bytes_come_no_mirror_is_given_up(path):
    with serving(FILE, sends(20_000)) as mirror:
        got(path, mirror.url)
    assert mirror.asked == [None, *(f"bytes={start}-" for start in range(20_000, 200_000, 20_000))]


def test_an_earlier_call_is_continued_from_another_mirror(path):
    with serving(FILE, sends(50_000), refuses(404)) as first:
        failed(path, first.url)
    assert path.with_name("file.bin.part").read_bytes() == FILE[:50_000]
    with serving(FILE) as second:
        got(path, second.url)
    assert second.asked == ["bytes=50000-"]


def test_an_interruption_keeps_what_has_arrived(path, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads.time, "sleep", interrupted)
    with serving(FILE, sends(50_000), sends()) as mirror:
        with pytest.raises(KeyboardInterrupt):
            fetch([mirror.url], path, md5=MD5)
        got(path, mirror.url)
    assert mirror.asked == [None, "bytes=50000-"]


def test_a_server_without_ranges_begins_anew(path):
    with serving(FILE, sends(70_000), sends(ranges=False)) as mirror:
        got(path, mirror.url)
    assert mirror.asked == [None, "bytes=70000-"]


def test_a_part_longer_than_the_file_is_dropped(path):
    part_of(path, FILE + b"more")
    with serving(FILE) as mirror:
        got(path, mirror.url)
    assert mirror.asked == ["bytes=200004-", None]


def test_a_whole_part_needs_no_request(path):
    part_of(path, FILE)
    with serving(FILE) as mirror:
        got(path, mirror.url)
    assert mirror.asked == []


def test_a_part_of_other_bytes_is_not_held_against_the_mirror(path):
    part_of(path, OTHER[:1000])
    with serving(FILE) as mirror:
        got(path, mirror.url)
    assert mirror.asked == ["bytes=1000-", None]


def test_a_silent_connection_is_continued(path):
    with serving(FILE, sends(70_000, stall=True), sends()) as mirror:
        got(path, mirror.url, timeout=0.5)
    assert mirror.asked == [None, "bytes=70000-"]


def test_an_answer_that_brings_less_than_asked_is_continued(path):
    with serving(FILE, sends(capped=50_000)) as mirror:
        got(path, mirror.url)
    assert mirror.asked == [None, "bytes=50000-", "bytes=100000-", "bytes=150000-"]


def test_without_a_length_the_digest_says_whether_it_is_all(path):
    with serving(FILE, sends(70_000, length=False), sends(length=False)) as mirror:
        got(path, mirror.url)
    assert mirror.asked == [None, "bytes=70000-"]


PART = FILE[:190_000]


@pytest.mark.parametrize(
    "act, said",
    [
        (sends(ranges=False, other=b"<p>Log in first</p>"), "these are other bytes (MD5"),
        (sends(other=FILE[:100_000]), "these are other bytes"),
        (sends(ranges=False, other=OTHER), "these are other bytes"),
        (sends(10_000, ranges=False), "the connection closed after 10,000 of 200,000 bytes"),
        (sends(195_000, ranges=False, other=OTHER), "the connection closed after 195,000 of 200,000 bytes"),
        (sends(ranges=False, other=OTHER + OTHER, length=False), "the connection closed after 400,000 bytes, MD5"),
        (sends(chunked=True, ranges=False, other=OTHER), "these are other bytes"),
    ],
    ids=["login", "cut file", "other file", "breaks off", "breaks off late", "no length", "chunks"],
)
def test_a_bad_mirror_takes_nothing_away(path, act, said):
    part = part_of(path, PART)
    with serving(FILE, act) as bad, serving(FILE) as good:
        assert said in failed(path, bad.url)
        assert part.read_bytes() == PART and [file.name for file in part.parent.iterdir()] == [part.name]
        got(path, bad.url, good.url)
    assert good.asked == ["bytes=190000-"]


def test_a_file_begun_anew_and_whole_needs_no_request(path):
    part_of(path, FILE[:1000]).with_name("file.bin.part.new").write_bytes(FILE)
    with serving(FILE) as mirror:
        got(path, mirror.url)
    assert mirror.asked == []


def test_what_is_begun_anew_is_kept_once_the_part_has_turned_out_wrong(path):
    """A slow line, a call after the other: each brings 60,000 bytes and breaks off."""
    part = part_of(path, OTHER[:190_000])
    breaks = [sends(60_000), refuses(404)]
    with serving(FILE, sends(), *breaks, *breaks, *breaks, sends()) as mirror:
        for _ in range(3):
            failed(path, mirror.url)
        assert part.read_bytes() == FILE[:180_000]
        got(path, mirror.url)
    assert mirror.asked[:2] == ["bytes=190000-", None]


def test_a_login_page_is_recognised(path):
    with serving(b" <!doctype html><p>Log in first</p>") as bad:
        assert "it looks like a web page" in failed(path, bad.url)


def test_an_unlabelled_part_is_not_taken_for_the_beginning(path):
    part_of(path, FILE[:1000])
    with serving(FILE, sends(label=False), sends()) as mirror:
        got(path, mirror.url)
    assert mirror.asked == ["bytes=1000-", None]


# ---- servers that will not do ---------------------------------------------------------------------------------------


def test_one_that_always_truncates_is_given_up(path):
    with serving(FILE, sends(70_000, ranges=False)) as bad, serving(FILE) as good:
        said = failed(path, bad.url)
        assert f"{bad.url}: the connection closed after 70,000 of 200,000 bytes" in said
        assert len(bad.asked) == 1 + downloads.TRIES
        got(path, bad.url, good.url)
    assert len(bad.asked) == 1 + 2 * downloads.TRIES  # this time nothing was new from the start
    assert good.asked == ["bytes=70000-"]


def test_less_than_before_is_nothing_new(path):
    longer, shorter = sends(70_000, ranges=False), sends(30_000, ranges=False)
    with serving(FILE, longer, shorter, longer, shorter, longer) as mirror:
        failed(path, mirror.url)
    assert len(mirror.asked) == 1 + downloads.TRIES


def test_wrong_bytes_are_refused(path):
    with serving(OTHER) as bad, serving(FILE) as good:
        said = failed(path, bad.url)
        assert f"{bad.url}: these are other bytes" in said and hashlib.md5(OTHER).hexdigest() in said
        assert list(path.parent.iterdir()) == []  # nothing of them stays
        got(path, bad.url, good.url)
        assert bad.asked == [None, None] and good.asked == [None]
        path.unlink()
        part_of(path, OTHER[:1000])
        failed(path, bad.url)
    assert bad.asked[2:] == ["bytes=1000-", None]


def test_a_missing_file_is_not_asked_for_twice(path):
    with serving(FILE, refuses(404)) as bad, serving(FILE) as good:
        got(path, bad.url, good.url)
        assert "HTTP 404 Not Found" in failed(path.with_name("other"), bad.url)
    assert len(bad.asked) == 2 and good.asked == [None]


@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_server_is_asked_again(path, code):
    with serving(FILE, refuses(code), sends()) as mirror:
        got(path, mirror.url)
    assert mirror.asked == [None, None]


def test_one_that_is_always_silent_is_given_up(path):
    with serving(FILE, sends(0, stall=True)) as mirror:
        assert f"{mirror.url}: silent for 0.2 s" in failed(path, mirror.url, timeout=0.2)
    assert len(mirror.asked) == downloads.TRIES
    assert list(path.parent.iterdir()) == []


def test_pauses_grow_between_tries(path, monkeypatch):
    slept = []
    monkeypatch.setattr(downloads, "PAUSE", 1.0)
    monkeypatch.setattr(downloads.time, "sleep", slept.append)
    with serving(FILE, refuses(500)) as mirror:
        failed(path, mirror.url)
    assert slept == [1.0, 2.0]


def test_nothing_reachable_lists_every_mirror_and_the_way_on(path):
    first, second = nobody(), nobody()
    said = failed(path, first, second)
    assert "cannot download file.bin" in said
    assert all(f"\n  {url}: [Errno" in said and "refused" in said for url in (first, second))
    assert f"put the file at {path} by hand (MD5 {MD5})" in said
    assert '"digits" and "shapes"' in said
    assert isinstance(DownloadError(), OSError)


def test_without_a_network_nobody_waits(path, monkeypatch):
    def unknown(*args, **kwargs):
        asked.append(args)
        raise socket.gaierror(-2, "Name or service not known")

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "http://example.org/file.bin: no such host, or no network" in failed(path, "http://example.org/file.bin")
    assert len(asked) == 1


# ---- two at a time --------------------------------------------------------------------------------------------------


class Waits:
    """An act that says when it has begun and goes on when it may."""

    def __init__(self, act):
        self.began, self.may, self.act = threading.Event(), threading.Event(), act

    def __call__(self, *request):
        self.began.set()
        self.may.wait(10)
        self.act(*request)


def start(path, url):
    def quietly():
        with contextlib.suppress(DownloadError):
            fetch([url], path, md5=MD5)

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    return thread


def test_two_at_the_same_time_fetch_once(path):
    act = Waits(sends())
    with serving(FILE, act) as mirror:
        first = start(path, mirror.url)
        assert act.began.wait(10)
        second = start(path, mirror.url)
        second.join(0.3)
        assert second.is_alive() and mirror.asked == [None]
        act.may.set()
        for thread in (first, second):
            thread.join(10)
        got(path, mirror.url)
    assert mirror.asked == [None]


def test_the_second_tries_where_the_first_failed_and_a_third_waits(path):
    fails, works = Waits(refuses(404)), Waits(sends())
    with serving(FILE, fails, works) as mirror:
        first = start(path, mirror.url)
        assert fails.began.wait(10)
        second = start(path, mirror.url)
        second.join(0.2)
        fails.may.set()
        first.join(10)
        assert works.began.wait(10)
        third = start(path, mirror.url)
        third.join(0.2)
        assert third.is_alive() and mirror.asked == [None, None]
        works.may.set()
        for thread in (second, third):
            thread.join(10)
        got(path, mirror.url)
    assert mirror.asked == [None, None]


def test_without_locks_it_works_as_well(path, monkeypatch):
    class NoLocks:
        LOCK_EX = 2

        def flock(self, *args):
            raise OSError(37, "No locks available")

    for fcntl in (NoLocks(), None):  # some network file systems; Windows
        monkeypatch.setattr(downloads, "fcntl", fcntl)
        path.unlink(missing_ok=True)
        with serving(FILE) as mirror:
            got(path, mirror.url)
