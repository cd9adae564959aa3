"""DICOM: what the two presets do to values, which files are read, and which are refused."""

import io
import os
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from pydicom import Dataset, uid
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset

from contracts.errors import RowError
from pipelines.images.decode import Limits, decode

SHARED = Path(os.environ.get("CXRAY_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = (np.arange(32 * 24).reshape(32, 24) * 5 + 100).astype(np.uint16)  # 100 to 3,935: within 12 bits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def dataset(pixels: np.ndarray = RAMP, bits: int = 12, syntax: uid.UID = uid.ExplicitVRLittleEndian, **more) -> Dataset:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    made.Rows, made.Columns = pixels.shape[:2]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit = 8 * pixels.itemsize, bits, bits - 1
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    for name, value in more.items():
        setattr(made, name, value)
    return made


def file(made: Dataset, whole: bool = True) -> bytes:
    out = io.BytesIO()
    made.save_as(out, enforce_file_format=whole)
    return out.getvalue()


def table(values: list[int], first: int, bits: int) -> list[Dataset]:
    lut = Dataset()
    lut.add_new("LUTDescriptor", "US", [len(values), first, bits])
    lut.add_new("LUTData", "US", values)
    return [lut]


def reason(data: bytes, **options) -> str:
    with pytest.raises(RowError) as caught:
        decode(data, **options)
    return caught.value.reason


def minmax(values: np.ndarray) -> np.ndarray:
    values = values.astype(float) - values.min()
    return values / values.max() * 255


def near(grey: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(grey.astype(float) - expected).max() <= 0.5 + 1e-6)


def test_mimic_jpg_scales_truncates_and_equalises():
    picture = decode(file(dataset()), "mimic_jpg")
    assert (picture.grey == cv2.equalizeHist(minmax(RAMP).astype(np.uint8))).all()
    assert (picture.kind, picture.width, picture.height, picture.notes) == ("dicom", 24, 32, ("16bit",))


def test_mimic_jpg_inverts_monochrome1_before_it_equalises():
    picture = decode(file(dataset(PhotometricInterpretation="MONOCHROME1")), "mimic_jpg")
    assert (picture.grey == cv2.equalizeHist(255 - minmax(RAMP).astype(np.uint8))).all()
    assert "monochrome1" in picture.notes


def test_mimic_jpg_knows_no_window_and_no_look_up_table():
    plain = decode(file(dataset())).grey
    lut = table([0, 4095], 0, 12)
    assert (decode(file(dataset(WindowCenter=500, WindowWidth=10, VOILUTSequence=lut))).grey == plain).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_clinical_without_a_window_goes_from_lowest_to_highest(bits):
    pixels = (RAMP >> 4).astype(np.uint8) if bits == 8 else RAMP << (bits - 12) if bits > 12 else RAMP >> (12 - bits)
    assert near(decode(file(dataset(pixels, bits)), "clinical").grey, minmax(pixels))


def linear(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1 to 0..255, by hand."""
    y = ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255
    return np.where(x <= centre - 0.5 - (width - 1) / 2, 0, np.where(x > centre - 0.5 + (width - 1) / 2, 255, y))


def test_clinical_window_is_the_formula_of_the_standard():
    grey = decode(file(dataset(WindowCenter=1500, WindowWidth=2001)), "clinical").grey
    assert near(grey, linear(RAMP.astype(float), 1500, 2001))
    assert grey.min() == 0 and grey.max() == 255


def test_clinical_takes_the_first_of_several_windows():
    grey = decode(file(dataset(WindowCenter=[1500, 20], WindowWidth=[2001, 4])), "clinical").grey
    assert near(grey, linear(RAMP.astype(float), 1500, 2001))


def test_clinical_knows_the_exact_and_the_sigmoid_window():
    exact = dataset(WindowCenter=1500, WindowWidth=2000, VOILUTFunction="LINEAR_EXACT")
    assert near(decode(file(exact), "clinical").grey, np.clip((RAMP - 1500.0) / 2000 + 0.5, 0, 1) * 255)
    sigmoid = dataset(WindowCenter=1500, WindowWidth=2000, VOILUTFunction="SIGMOID")
    assert near(decode(file(sigmoid), "clinical").grey, 255 / (1 + np.exp(-4 * (RAMP - 1500.0) / 2000)))


@pytest.mark.parametrize("slope", [2.5, -1.0])
def test_the_rescale_comes_before_the_window(slope):
    made = dataset(RescaleSlope=slope, RescaleIntercept=-1024, WindowCenter=1000, WindowWidth=3001)
    assert near(decode(file(made), "clinical").grey, linear(RAMP * slope - 1024, 1000, 3001))


def test_a_window_that_the_standard_forbids_is_no_window():
    assert near(decode(file(dataset(WindowCenter=500, WindowWidth=0)), "clinical").grey, minmax(RAMP))


def test_signed_pixels_keep_their_order():
    pixels = RAMP.astype(np.int16) - 2000
    assert near(decode(file(dataset(pixels)), "clinical").grey, minmax(pixels))
    assert (decode(file(dataset(pixels))).grey == decode(file(dataset())).grey).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_a_voi_look_up_table_wins_over_the_window(bits):
    top = 2**bits - 1
    curve = [round(top * (i / 4095) ** 2) for i in range(4096)]  # 8 bits an entry for 12 bits of input is allowed
    made = dataset(VOILUTSequence=table(curve, 0, bits), WindowCenter=10, WindowWidth=2)
    assert np.abs(decode(file(made), "clinical").grey - (RAMP / 4095.0) ** 2 * 255).max() <= 1


def test_values_outside_a_look_up_table_take_its_ends():
    made = dataset(VOILUTSequence=table([0, 100, 200, 255], 1000, 8), RescaleSlope=40, RescaleIntercept=0)
    grey = decode(file(made), "clinical").grey
    assert (grey == 255).all()  # 4,000 and up, which 16 bits would let wrap around to below 1,000


def test_a_broken_look_up_table_is_a_reason():
    short, empty, negative = (table([0, 100, 200, 255], 0, 16) for _ in range(3))
    short[0].LUTDescriptor = [4096, 0, 16]
    del empty[0].LUTData
    negative[0]["LUTData"].VR = "SS"
    negative[0].LUTData = [-1, 0, 1, 2]
    for lut in (short, empty, negative):
        assert reason(file(dataset(VOILUTSequence=lut)), preset="clinical") == "corrupt_dicom"
        assert reason(file(dataset(ModalityLUTSequence=lut)), preset="clinical") == "corrupt_dicom"


@pytest.mark.parametrize("bits", [12, 16])
def test_a_modality_look_up_table_is_applied(bits):
    made = dataset(ModalityLUTSequence=table([4095 - i for i in range(4096)], 0, bits))
    assert near(decode(file(made), "clinical").grey, 255 - minmax(RAMP))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("shape", ["", "IDENTITY", "INVERSE"])
def test_clinical_inverts_once(kind, shape):
    made = dataset(PhotometricInterpretation=kind, PresentationLUTShape=shape)
    inverted = kind == "MONOCHROME1" or shape == "INVERSE"
    assert near(decode(file(made), "clinical").grey, 255 - minmax(RAMP) if inverted else minmax(RAMP))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("limit", [None, 4095])
def test_padding_is_black_and_does_not_stretch_the_rest(kind, limit):
    pixels = RAMP.copy()
    pixels[:, :4] = 4000 if limit else 4095
    more = {} if limit is None else {"PixelPaddingRangeLimit": limit}
    made = dataset(pixels, PhotometricInterpretation=kind, PixelPaddingValue=4095 if limit is None else 4000, **more)
    picture = decode(file(made), "clinical")
    expected = minmax(RAMP[:, 4:].astype(float))
    assert "padding" in picture.notes and (picture.grey[:, :4] == 0).all()
    assert near(picture.grey[:, 4:], 255 - expected if kind == "MONOCHROME1" else expected)


@pytest.mark.parametrize("syntax", ["ImplicitVR", "ExplicitVR", "DeflatedExplicitVR"])
@pytest.mark.parametrize("preamble", [True, False])
def test_the_way_of_writing_does_not_change_the_picture(syntax, preamble):
    data = file(dataset(syntax=getattr(uid, f"{syntax}LittleEndian")))
    expected = decode(file(dataset())).grey
    if preamble:
        assert (decode(data).grey == expected).all()
    else:
        assert (decode(data[132:]).grey == expected).all()  # begins with the file meta information


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_a_missing_transfer_syntax_is_guessed(syntax):
    made = dataset(RAMP.byteswap() if syntax == uid.ExplicitVRBigEndian else RAMP, syntax=syntax)
    out = io.BytesIO()
    little, implicit = syntax.is_little_endian, syntax.is_implicit_VR
    del made.file_meta
    pydicom.dcmwrite(out, made, implicit_vr=implicit, little_endian=little, force_encoding=True)
    assert (decode(out.getvalue()).grey == decode(file(dataset())).grey).all()


@pytest.mark.parametrize("name", ["JPGExtended", "JPEG2000", "MR_small_jpeg_ls_lossless", "MR_small_RLE"])
def test_a_missing_transfer_syntax_of_compressed_pixels_is_guessed(name):
    path = str(get_testdata_file(f"{name}.dcm", download=False) or pytest.skip("not bundled with this pydicom"))
    made = pydicom.dcmread(path)
    expected = decode(Path(path).read_bytes()).grey
    del made.file_meta.TransferSyntaxUID
    out = io.BytesIO()
    pydicom.dcmwrite(out, made, implicit_vr=False, little_endian=True)
    assert (decode(out.getvalue()).grey == expected).all()


@pytest.mark.parametrize("name", ["_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_jpeg_ls_lossless"])
def test_lossless_transfer_syntaxes_give_equal_pictures(name):
    plain, other = BUNDLED / "MR_small.dcm", BUNDLED / f"MR_small{name}.dcm"
    if not (plain.exists() and other.exists()):
        pytest.skip("not bundled with this pydicom")
    for preset in ("mimic_jpg", "clinical"):
        assert (decode(plain.read_bytes(), preset).grey == decode(other.read_bytes(), preset).grey).all()


@pytest.mark.parametrize("name", ["JPGExtended", "SC_rgb_jpeg_gdcm", "693_J2KI", "image_dfl", "liver_1frame"])
def test_the_other_bundled_transfer_syntaxes_are_read(name):
    path = BUNDLED / f"{name}.dcm"
    if not path.exists():
        pytest.skip("not bundled with this pydicom")
    assert decode(path.read_bytes()).grey.std() > 5


def test_colour_becomes_luma():
    rgb = np.dstack([(RAMP >> 5), (RAMP >> 4), (RAMP >> 6)]).astype(np.uint8)
    made = dataset(rgb, 8, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    picture = decode(file(made), "clinical")
    assert picture.notes == ("rgb",)
    assert np.abs(picture.grey - minmax((rgb @ [0.299, 0.587, 0.114]).round())).max() < 4


def test_of_several_frames_the_first_is_taken():
    made = dataset(np.concatenate([RAMP, RAMP[::-1], RAMP[:, ::-1]]), NumberOfFrames=3, Rows=32)
    picture = decode(file(made))
    assert "multiframe" in picture.notes and (picture.grey == decode(file(dataset())).grey).all()


def test_what_cannot_be_read_has_its_reason():
    without = dataset()
    del without.PixelData
    assert reason(file(without)) == "no_pixels"
    assert reason(file(dataset(PixelData=b""))) == "no_pixels"
    assert reason(file(dataset(RAMP.astype(np.uint32), 32))) == "unsupported_bits"
    assert reason(file(dataset())[:-500]) == "corrupt_dicom"
    assert reason(file(dataset())[:160]) in ("no_pixels", "corrupt_dicom")
    video = dataset()
    video.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    video.PixelData = pydicom.encaps.encapsulate([b"\0\0\1\xb3" * 8])
    assert reason(file(video)) == "unsupported_transfer_syntax"
    assert reason(file(dataset(RAMP[:8]))) == "too_small"


def test_lies_about_size_are_found_before_anything_is_decoded():
    begun = time.perf_counter()
    assert reason(file(dataset(Rows=60_000, Columns=60_000))) == "too_many_pixels"
    assert reason(file(dataset(Rows=3000, Columns=3000))) == "corrupt_dicom"
    assert reason(file(dataset(NumberOfFrames=2_000_000_000))) == "corrupt_dicom"
    wrapped = dataset(syntax=uid.JPEGBaseline8Bit, bits=8, BitsAllocated=8)
    jpeg = cv2.imencode(".jpg", np.zeros((32, 24), np.uint8))[1].tobytes()
    at = jpeg.index(b"\xff\xc0") + 5
    wrapped.PixelData = pydicom.encaps.encapsulate([jpeg[:at] + struct.pack(">HH", 65_000, 65_000) + jpeg[at + 4 :]])
    assert reason(file(wrapped)) == "corrupt_dicom"
    assert time.perf_counter() - begun < 1


def test_a_jp2_box_without_a_length_stops_nothing():
    made = dataset(syntax=uid.JPEG2000)
    boxes = b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(4) + b"free" + bytes(64)
    made.PixelData = pydicom.encaps.encapsulate([boxes])
    assert reason(file(made)) == "corrupt_dicom"


def head(syntax: uid.UID) -> bytes:
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    return bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value


def test_a_deflate_bomb_is_not_inflated():
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(bytes(1 << 22)) for _ in range(16)) + packer.flush()
    assert reason(head(uid.DeflatedExplicitVRLittleEndian) + bomb, limits=Limits(max_bytes=1 << 20)) == "too_many_bytes"


@pytest.mark.parametrize("depth", [3_000, 300_000])
def test_nests_and_heaps_of_sequences_are_refused_quickly(depth):
    sequence = struct.pack("<HHI", 0x0028, 0x3010, 0xFFFFFFFF)
    item, empty = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF), struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    for body in ((sequence + item) * depth, sequence + empty * depth):
        begun = time.perf_counter()
        assert reason(head(uid.ImplicitVRLittleEndian) + body) in ("corrupt_dicom", "no_pixels")
        assert time.perf_counter() - begun < 2


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A cut, a hole, wild bytes, flipped bits near the end, or a length that lies."""
    out = bytearray(data)
    kind, at = rng.integers(5), int(rng.integers(132, min(len(out), 2500)))
    if kind == 0:
        return bytes(out[: rng.integers(1, len(out))])
    if kind == 1:
        first = int(rng.integers(len(out)))
        del out[first : first + int(rng.integers(1, 400))]
    elif kind == 2:
        out[at : at + 4] = [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xfe\xff\0\xe0"][rng.integers(4)]
    else:
        reach = len(out) if kind == 3 else min(len(out), 2500)
        for place in rng.integers(0, reach, int(rng.integers(1, 12))):
            out[place] = rng.integers(256)
    return bytes(out)


SEEDS = [
    *("MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_implicit", "MR_small_jp2klossless", "image_dfl"),
    *("MR_small_jpeg_ls_lossless", "JPGExtended", "JPEG2000", "SC_rgb_jpeg_gdcm", "SC_rgb_jpeg_dcmtk", "liver_1frame"),
]


def test_mutations_of_every_transfer_syntax_give_a_picture_or_a_reason_each_quickly():
    lut = dataset(VOILUTSequence=table(list(range(4096)), 0, 12), ModalityLUTSequence=table(list(range(4096)), 0, 16))
    window = dataset(WindowCenter=500, WindowWidth=100, RescaleSlope=2, RescaleIntercept=1, PixelPaddingValue=0)
    seeds = [file(lut), file(window)]
    seeds += [(BUNDLED / f"{name}.dcm").read_bytes() for name in SEEDS if (BUNDLED / f"{name}.dcm").exists()]
    outcomes = set()
    for number in range(30 * len(seeds)):
        data = mutated(seeds[number % len(seeds)], np.random.default_rng(number))
        begun = time.perf_counter()
        try:
            picture = decode(data, "clinical" if number % 2 else "mimic_jpg")
            assert picture.grey.dtype == np.uint8 and picture.grey.ndim == 2
            outcomes.add("picture")
        except RowError as error:
            outcomes.add(error.reason)
        assert time.perf_counter() - begun < 2, number
    assert {"picture", "corrupt_dicom", "no_pixels"} <= outcomes


@pytest.mark.parametrize("preset", ["mimic_jpg", "clinical"])
@pytest.mark.parametrize("name", ["nih_chest_8bit_implicit", "mlut_18", "vlut_04"])
def test_real_dicoms_are_read(name, preset):
    path = SHARED / "dicom" / f"{name}.dcm"
    if not path.exists():
        pytest.skip("the shared DICOMs are not on this machine")
    picture = decode(path.read_bytes(), preset)
    made = pydicom.dcmread(path)
    assert picture.grey.shape == (made.Rows, made.Columns) and picture.grey.min() == 0 and picture.grey.max() == 255
