"""Pictures from every form of data, in every mode and size, and what is said of those that are wrong."""

import io
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from pica.errors import ConfigError, DataError
from pica.tasks import Source, has_split, location_problem
from pica.tasks.base import Split, Target
from pica.tasks.decoding import decode
from pica.tasks.vtab import GROUPS, ImagesTask, VtabTask, group_means

IMAGES, VTAB = ImagesTask(), VtabTask()
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets keeps a copy of parquet files, which must not be in the user's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def png(colour: tuple[int, int, int], size: tuple[int, int] = (3, 2)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(root: Path, **pictures: bytes) -> str:
    """Files named class__name."""
    for path, data in pictures.items():
        target = root / (path.replace("__", "/") + ".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return str(root)


def loaded(location: str | Path, split: Split = "train", **options) -> list[tuple]:
    found = IMAGES.load(split, Source(str(location), **options))
    return [(example.label, decode(example.read()).getpixel((0, 0))) for example in found]


EXPECTED = [("cat", BLUE), ("dog", RED)]


def test_class_folders_with_and_without_splits(tmp_path: Path):
    folder_of(tmp_path / "a", cat__1=png(BLUE), dog__deep__1=png(RED))
    (tmp_path / "a" / "dog" / "notes.txt").write_text("no picture by its ending")
    (tmp_path / "a" / ".hidden").mkdir()
    assert loaded(tmp_path / "a") == EXPECTED
    folder_of(
        tmp_path / "b", train__cat__1=png(BLUE), train__dog__1=png(RED), val__cat__1=png(RED), test__dog__1=png(BLUE)
    )
    assert loaded(tmp_path / "b") == EXPECTED
    assert loaded(tmp_path / "b", "validation") == [("cat", RED)]
    assert loaded(tmp_path / "b", "test") == [("dog", BLUE)]
    assert [has_split(IMAGES, str(tmp_path / name), "test") for name in ("a", "b")] == [False, True]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.csv", "file_name,label\np/one 1.png,cat\np/2.png,dog\n"),
        ("train.tsv", "p/one 1.png\tcat\np/2.png\tdog\n"),
        ("train.jsonl", '{"label": "cat", "path": "p/one 1.png"}\n{"label": "dog", "path": "p/2.png"}\n'),
        ("train800.txt", "p/one 1.png cat\n\np/2.png dog\n"),
        ("train/metadata.csv", "file_name,label\n../p/one 1.png,cat\n../p/2.png,dog\n"),
    ],
)
def test_lists_name_pictures_relative_to_themselves(tmp_path: Path, name: str, text: str):
    folder_of(tmp_path, **{"p__one 1": png(BLUE), "p__2": png(RED)})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert loaded(tmp_path) == EXPECTED
    if "/" not in name:
        assert loaded(tmp_path / name) == EXPECTED
        assert location_problem(IMAGES, str(tmp_path / name)) is None


@pytest.mark.parametrize("typed", [True, False], ids=["hub's features", "plain columns"])
@pytest.mark.parametrize("form", ["parquet", "parts", "arrow"])
def test_parquet_and_arrow(tmp_path: Path, form: str, typed: bool):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    rows = {"image": [{"bytes": png(BLUE), "path": None}, {"bytes": png(RED), "path": None}], "label": [0, 1]}
    if not typed:
        rows = {"image": [png(BLUE), png(RED)], "label": ["cat", "dog"]}
    made = datasets.Dataset.from_dict(rows, datasets.Features(features) if typed else None)
    if form == "arrow":
        made.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / "train.arrow")
    elif form == "parts":
        for part in range(2):
            made.select([part]).to_parquet(str(tmp_path / f"train-{part:05d}-of-00002.parquet"))
    else:
        made.to_parquet(str(tmp_path / "train.parquet"))
    assert loaded(tmp_path) == EXPECTED
    if typed and form == "parquet":
        with pytest.raises(DataError, match="label 'cat' .* is none of '0', '1'"):
            IMAGES.load("train", Source(str(tmp_path), target=Target(("0", "1"))))
        # VTAB's classes are numbers whatever they are called
        found = VTAB.load("train", Source(str(tmp_path), subset="patch_camelyon"))
        assert [example.label for example in found] == ["0", "1"]


def test_columns_and_names_of_files_in_a_table(tmp_path: Path):
    folder_of(tmp_path, p__1=png(BLUE))
    made = datasets.Dataset.from_dict({"shot": ["p/1.png"], "kind": ["cat"]})
    made.to_parquet(str(tmp_path / "a.parquet"))
    columns = {"image": "shot", "label": "kind"}
    assert loaded(tmp_path / "a.parquet", columns=columns) == EXPECTED[:1]
    with pytest.raises(DataError, match=r"no column 'image' .*it has shot, kind.*data.columns"):
        loaded(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="'text' is no field of this task; it has image, label"):
        loaded(tmp_path / "a.parquet", columns={"text": "shot"})


def test_every_mode_becomes_what_one_sees(tmp_path: Path):
    def decoded(picture: Image.Image, form: str = "PNG", **options) -> tuple:
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        made = decode(buffer.getvalue())
        assert made.mode == "RGB"
        return made.size, made.getpixel((0, 0))

    assert decoded(Image.new("L", (3, 2), 7)) == ((3, 2), (7, 7, 7))
    assert decoded(Image.new("1", (3, 2), 1)) == ((3, 2), (255, 255, 255))
    assert decoded(Image.new("LA", (3, 2), (7, 255))) == ((3, 2), (7, 7, 7))
    assert decoded(Image.new("RGBA", (3, 2), (9, 9, 9, 0))) == ((3, 2), (255, 255, 255)), "clear is white, not 9"
    assert decoded(Image.new("RGB", (3, 2), RED).convert("P")) == ((3, 2), RED)
    deep = Image.fromarray(np.full((2, 3), 128 * 256, dtype=np.uint16))
    assert decoded(deep) == ((3, 2), (128, 128, 128)), "half as bright as can be, not cut off"
    assert decoded(Image.new("CMYK", (3, 2), (0, 0, 0, 255)), "TIFF") == ((3, 2), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    assert decoded(Image.new("RGB", (16, 8), (0, 0, 0)), "JPEG", exif=exif)[0] == (8, 16)


def test_a_limit_samples_all_classes_and_twins_have_one_identity(tmp_path: Path):
    for number in range(20):
        folder_of(tmp_path, **{f"{'cat' if number < 10 else 'dog'}__{number:02d}": png((number, 0, 0))})
    folder_of(tmp_path, dog__twin=png((3, 0, 0)))
    found = IMAGES.load("train", Source(str(tmp_path)))
    assert len({example.identity for example in found}) == 20 < len(found)
    one, other = (loaded(tmp_path, limit=8, seed=seed) for seed in (0, 1))
    assert {label for label, _ in one} == {"cat", "dog"}
    assert one != other
    assert one == loaded(tmp_path, limit=8)


def test_decoding_shows_a_bar(tmp_path: Path):
    seen: list[tuple[str, int]] = []

    @contextmanager
    def bar(label: str, total: int):
        steps: list[int] = []
        yield lambda: steps.append(1)
        seen.append((label, total))
        assert len(steps) == total

    IMAGES.load("train", Source(folder_of(tmp_path, cat__one=png(RED), dog__two=png(BLUE)), bar=bar))
    assert seen == [("Decoding pictures", 2)]


def test_what_is_wrong_is_named(tmp_path: Path):
    root = folder_of(tmp_path / "a", cat__1=png(BLUE))
    (tmp_path / "a" / "dog").mkdir()
    with pytest.raises(DataError, match=r"Class folder '.*/a/dog' holds no pictures; put some in, or remove it"):
        loaded(root)
    (tmp_path / "b" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no class folders"):
        loaded(tmp_path / "b")
    with pytest.raises(DataError, match="folder without a test folder, list"):
        loaded(tmp_path / "b", "test")
    for text, message in (
        ("p/1.png 0\nno.png 1\n", "c.txt, line 2: there is no picture '.*no.png'"),
        ("p.png\n", "line 1: expected the name of a picture, a space and its label"),
        ("\n", "the file holds no rows"),
    ):
        folder_of(tmp_path, p__1=png(RED))
        (tmp_path / "c.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            loaded(tmp_path / "c.txt")
    (tmp_path / "d.parquet").write_text("no such thing")
    with pytest.raises(DataError, match="d.parquet: not a readable .parquet file"):
        loaded(tmp_path / "d.parquet")
    assert "has an unknown ending" in (location_problem(IMAGES, str(tmp_path / "p" / "1.png")) or "")
    assert "does not exist" in (location_problem(IMAGES, str(tmp_path / "nowhere")) or "")
    with pytest.raises(DataError, match="no embedded pictures"):
        loaded("embedded")


def test_vtab_takes_lists_and_class_folders(tmp_path: Path):
    folder_of(tmp_path, images__1=png(RED), images__2=png(BLUE))
    (tmp_path / "train800.txt").write_text("images/1.png 3\nimages/2.png 9\n")
    source = Source(str(tmp_path), subset="svhn")
    assert [example.label for example in VTAB.load("train", source)] == ["3", "9"]
    assert VTAB.target("svhn").labels == tuple("0123456789"), "also those that 800 pictures may lack"
    (tmp_path / "test.txt").write_text("images/1.png 10\n")
    with pytest.raises(DataError, match="label '10' of the test data is none of '0'"):
        VTAB.load("test", source)
    (tmp_path / "test.txt").write_text("images/1.png -1\n")
    with pytest.raises(DataError, match="label -1 marks rows whose label is kept secret"):
        VTAB.load("test", source)
    names = {f"val200__{name}__1": png(RED) for name in ("tumour", "none")}
    folder_of(tmp_path, **names)
    camelyon = Source(str(tmp_path), subset="patch_camelyon")
    assert [example.label for example in VTAB.load("validation", camelyon)] == ["0", "1"]
    with pytest.raises(DataError, match="holds 2 class folders where this task has 10 classes"):
        VTAB.load("validation", source)
    with pytest.raises(ConfigError, match="nineteen sets; choose one of caltech101"):
        VTAB.target("imagenet")


def test_group_means_are_of_whole_groups_only():
    scores = {name: 0.5 for group in GROUPS.values() for name in group}
    assert [len(group) for group in GROUPS.values()] == [7, 4, 8]
    scores |= dict.fromkeys(GROUPS["specialised"], 1.0)
    found = group_means(scores)
    assert found["natural"] == found["structured"] == 0.5
    assert found["specialised"] == 1.0
    assert found["all sets"] == pytest.approx((15 * 0.5 + 4 * 1.0) / 19)
    assert found["all groups"] == pytest.approx(2 / 3)
    del scores["dtd"]
    assert group_means(scores) == {
        "natural": None,
        "specialised": 1.0,
        "structured": 0.5,
        "all sets": None,
        "all groups": None,
    }
