"""Which files a record may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_ds.data.image_paths import resolve_image_path
from vembed_ds.data.records import RecordReader
from vembed_ds.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """``root`` with an image folder, a link to a file outside, one inside, and a loop."""
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "images" / "a.png").write_text("a")
    (tmp_path / "secret.png").write_text("s")
    (tmp_path / "root2").mkdir()
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "outer").symlink_to(tmp_path)
    (root / "in.png").symlink_to(root / "images" / "a.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    return root


def resolved(path: str, root: Path | str, *, allow_outside: bool = False) -> str:
    return resolve_image_path(
        path, image_root=str(root), place="a.jsonl, record 3", allow_outside=allow_outside
    )


@pytest.mark.parametrize("path", ["images/a.png", "in.png", "images/../images/a.png", "new.png"])
def test_paths_inside(root: Path, path: str) -> None:
    assert resolved(path, root) == str(root / path)


def test_an_absolute_path_inside(root: Path) -> None:
    assert resolved(str(root / "images" / "a.png"), root) == str(root / "images" / "a.png")


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "images/../../secret.png",
        "out.png",
        "outer/secret.png",
        "/etc/passwd",
        "../root2/a",
    ],
)
def test_paths_that_leave_it(root: Path, path: str) -> None:
    with pytest.raises(DataError) as caught:
        resolved(path, root)
    assert str(caught.value) == (
        f"a.jsonl, record 3: image {path!r} lies outside image_root={str(root)!r}; move it there, set "
        "image_root to a folder above all images, or allow_images_outside_root: true when you trust "
        "the data"
    )
    assert resolved(path, root, allow_outside=True) == str(root / path)
    assert resolved(path, "") == path


def test_a_root_that_is_a_link_itself(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert resolved("images/a.png", tmp_path / "link") == str(tmp_path / "link" / "images/a.png")


def test_a_loop_of_links(root: Path) -> None:
    with pytest.raises(
        DataError, match=r"image 'loop.png' cannot be looked at .*; correct the path"
    ):
        resolved("loop.png", root)


@pytest.mark.parametrize(
    "path",
    ["http://a/b.png", "HTTPS://a/b.png", "file:/etc/passwd", "s3://b/c", "data:image/png,x"],
)
def test_urls_are_refused_by_name_wherever(root: Path, path: str) -> None:
    kind = path.partition(":")[0].lower()
    for image_root in (root, ""):
        with pytest.raises(
            DataError, match=f"is a {kind}: URL, and nothing is fetched while train"
        ):
            resolved(path, image_root, allow_outside=True)


def test_a_nul_byte(root: Path) -> None:
    with pytest.raises(DataError, match=r"image 'a\\x00.png' holds a NUL byte"):
        resolved("a\0.png", root)


def test_every_role_of_a_record_is_checked(root: Path) -> None:
    columns = ["query_image", "positive_image", "negative_images"]
    reader = RecordReader(
        columns, retrieval_mode="i2i", column_mapping={}, image_root=str(root), origin="a.jsonl"
    )
    good = {"query_image": "in.png", "positive_image": "in.png", "negative_images": ["in.png"]}
    assert reader.read(good, 0).negatives[0].image == str(root / "in.png")
    for column in columns:
        bad = "out.png" if column != "negative_images" else ["in.png", "out.png"]
        with pytest.raises(DataError, match=f"a.jsonl, record 5, column '{column}'.*lies outside"):
            reader.read(good | {column: bad}, 5)
