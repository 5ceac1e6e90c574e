"""Any file that Pillow reads comes out as upright RGB; one that it does not read is named by its row (B62)."""

import io

import numpy as np
import pytest
from images import folders, parquet, picture
from PIL import Image
from samples import refused

from lorafactory.tasks import pictures
from lorafactory.tasks.pictures import Picture, to_rgb


def pixel(image, at=(0, 0)):
    made = to_rgb(image)
    assert made.mode == "RGB"
    return made.getpixel(at)


def through(image, kind, **options):
    """Saved and opened again, as a source holds it."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return Image.open(io.BytesIO(data.getvalue()))


def test_grey_and_two_valued():
    assert pixel(Image.new("L", (2, 2), 77)) == (77, 77, 77)
    assert pixel(through(Image.new("1", (2, 2), 1), "PNG")) == (255, 255, 255)
    assert pixel(through(Image.new("1", (2, 2), 0), "PNG")) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_cut(kind):
    grey = np.array([[0, 257 * 100, 65535], [128, 129, 300]], np.uint16)
    made = np.asarray(to_rgb(through(Image.fromarray(grey), kind)))
    assert made[..., 0].tolist() == [[0, 100, 255], [0, 1, 1]] and (made == made[..., :1]).all()


def test_grey_of_32_bits_is_read_as_16_or_refused():
    assert pixel(Image.fromarray(np.full((2, 2), 257 * 9, np.int32))) == (9, 9, 9)
    with pytest.raises(ValueError, match="70000"):
        to_rgb(Image.fromarray(np.full((2, 2), 70000, np.int32)))
    with pytest.raises(ValueError, match="8 or 16"):
        to_rgb(Image.fromarray(np.full((2, 2), 0.5, np.float32)))


def test_cmyk():
    assert pixel(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == (255, 0, 0)
    red, green, blue = pixel(through(Image.new("CMYK", (16, 16), (255, 0, 255, 0)), "JPEG"))
    assert green > 200 and red < 60 and blue < 60


def test_palette():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    for again in (image, through(image, "PNG"), through(image, "GIF")):
        assert pixel(again) == (200, 100, 50)


def test_alpha_lies_over_white():
    assert pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (2, 2), (200, 0, 0, 255))) == (200, 0, 0)
    assert pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))[0] == pytest.approx(127, abs=1)
    assert pixel(Image.new("LA", (2, 2), (10, 0))) == (255, 255, 255)
    image = Image.new("P", (2, 2), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    assert pixel(through(image, "PNG", transparency=1)) == (255, 255, 255)
    assert pixel(through(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == (255, 255, 255)


@pytest.mark.parametrize("orientation, at", [(1, (0, 0)), (3, (3, 1)), (6, (1, 0)), (8, (0, 3))])
def test_exif_turns_it_upright(orientation, at):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    made = to_rgb(through(image, "PNG", exif=exif))
    assert made.size == ((4, 2) if orientation in (1, 3) else (2, 4))
    assert np.argwhere(np.asarray(made)[..., 0] == 255).tolist() == [[at[1], at[0]]]


def png(seed=0):
    data = io.BytesIO()
    picture("red", seed).save(data, "PNG")
    return data.getvalue()


BROKEN = {"cut": png()[:-40], "empty": b"", "text": b"not a picture"}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_one_is_named(how):
    refused(Picture([png(), BROKEN[how]], 1, "train row 7").rgb, "train row 7", "no picture")


def test_equal_files_are_equal_pictures():
    files = [png(), png(), png(1)]
    one, same, other = (Picture(files, i, "") for i in range(3))
    assert one == same and hash(one) == hash(same) and one != other and one != "one"


def test_a_missing_cell_and_a_missing_file_are_named(tmp_path):
    parquet(tmp_path / "hub", "train", [(png(), 0), (None, 1)])
    found = pictures.read(str(tmp_path / "hub"), "", None, "image", "label")["train"].inputs
    assert found[0].rgb().size == (10, 12)
    refused(lambda: found[1].digest, "train row 1", "no picture")
    source = folders(tmp_path / "files", count=6)
    (tmp_path / "files" / "red" / "000.png").unlink()
    place = pictures.read(source, "", None, "image", "label")["train"].inputs
    (tmp_path / "files" / "red" / "003.png").unlink()
    refused(lambda: [p.digest for p in place], "train row 4", "003.png")


def test_wrong_columns_are_told_the_right_ones(tmp_path):
    source = parquet(tmp_path, "train", [(picture("red", 0), 0)], image="img", label="fine_label")
    refused(lambda: pictures.read(source, "", None, "image", "fine_label"), "task.image", "'image'", "img")
    refused(lambda: pictures.read(source, "", None, "img", "label"), "task.label", "fine_label")
    refused(lambda: pictures.read(source, "", None, "fine_label", "fine_label"), "holds no pictures", "img")
    refused(lambda: pictures.read(str(tmp_path / "none"), "", None, "image", "label"), "task.source", "parquet")
