"""Archives: unpacked whole or not at all, and never outside their folder."""

import io
import tarfile

import numpy as np
import pytest

from karat_lite.downloads import unpack

FILE = np.random.default_rng(0).bytes(200_000)


def archive(folder, *members, mode="w:gz"):
    """folder/a.tar.gz of these (name, content), or tarfile.TarInfo for what is no plain file."""
    with tarfile.open(folder / "a.tar.gz", mode) as opened:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                opened.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            opened.addfile(info, io.BytesIO(member[1]))
    return folder / "a.tar.gz"


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_an_archive_is_unpacked(tmp_path, mode, capsys):
    packed = archive(tmp_path, ("inner/one", b"1"), ("inner/deep/two", FILE), mode=mode)
    assert unpack(packed, tmp_path / "inner") == tmp_path / "inner"
    assert (tmp_path / "inner" / "deep" / "two").read_bytes() == FILE
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar.gz", "inner"]
    assert "unpacking a.tar.gz" in capsys.readouterr().err


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    "evil", [("../outside", b"x"), ("inner/../../outside", b"x"), link("inner/door", "../../outside")]
)
def test_an_archive_that_leaves_its_folder_is_refused(tmp_path, evil):
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(ValueError, match="cannot unpack .*a.tar.gz .*outside"):
        unpack(archive(home, ("inner/one", b"1"), evil), home / "inner")
    assert [file.name for file in home.iterdir()] == ["a.tar.gz"]
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("damage", [lambda whole: whole[:-5000], lambda whole: b"no archive", lambda whole: b""])
def test_a_damaged_archive_leaves_nothing(tmp_path, damage):
    packed = archive(tmp_path, ("inner/one", b"1"), ("inner/two", FILE))
    packed.write_bytes(damage(packed.read_bytes()))
    with pytest.raises(ValueError, match="cannot unpack .*fetch it again"):
        unpack(packed, tmp_path / "inner")
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar.gz"]


def test_an_archive_of_something_else_is_refused(tmp_path):
    for members in ([("other/one", b"1")], [("inner", b"a file")]):
        with pytest.raises(ValueError, match="holds no folder inner"):
            unpack(archive(tmp_path, *members), tmp_path / "inner")
        assert [file.name for file in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_folder_that_is_there_stays(tmp_path):
    """As when another process unpacked the same archive a moment earlier."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "mine").write_text("kept")
    unpack(archive(tmp_path, ("inner/one", b"1")), tmp_path / "inner")
    assert [file.name for file in (tmp_path / "inner").iterdir()] == ["mine"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        unpack(archive(tmp_path, ("file/one", b"1")), tmp_path / "file")
