"""Picture files: the JPEGs that people get, the DICOMs they came from, and the spoilt ones. Runs in worker processes.

In: the images of one study. Out: files under a folder, and the rows of the regions table.
"""

from pathlib import Path

import cv2
import numpy as np

from pipelines.synthetic.lesions import HAZE, picture
from pipelines.synthetic.lexicon import HARD_PAIR
from pipelines.synthetic.phantom import LEVELS, official_grey
from pipelines.synthetic.scene import Image
from pipelines.synthetic.tables import CXR, JPG, Row

Drawing = tuple[str, list[str], list[Image], bool]  # study folder, findings of its case, images, DICOM too


def draw_study(root: Path, drawing: Drawing) -> list[Row]:
    """Draws and writes a study's images; returns regions: dicom_id, finding, x0, y0, x1, y1 in pixels of the image."""
    folder, findings, images, dicom = drawing
    regions: list[Row] = []
    for image in images:
        assert image.body is not None
        pixels, boxes = picture(image.body, image.view, image.size, image.seed, image.signs)
        for sign, box in boxes.items():
            named = [f for f in HARD_PAIR if f in findings] if sign == HAZE else [sign]
            regions += [[image.dicom_id, name, *box] for name in named]
        if image.file == "missing":
            continue
        jpg = root / JPG / folder / f"{image.dicom_id}.jpg"
        jpg.parent.mkdir(parents=True, exist_ok=True)
        jpg.write_bytes(_spoil(image.file, pixels))
        if dicom:
            path = root / CXR / folder / f"{image.dicom_id}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_dicom(path, image, pixels)
            if image.file in ("empty", "truncated"):
                data = path.read_bytes()
                path.write_bytes(data[: len(data) // 3] if image.file == "truncated" else b"")
    return regions


def _encode(kind: str, pixels: np.ndarray) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if kind == ".jpg" else []
    return cv2.imencode(kind, pixels, options)[1].tobytes()


def _spoil(state: str, pixels: np.ndarray) -> bytes:
    """The bytes of the file named .jpg: what it should be, or one of the things it should not be."""
    grey = official_grey(pixels)
    if state == "empty":
        return b""
    if state == "truncated":
        data = _encode(".jpg", grey)
        return data[: len(data) * 2 // 5]
    if state == "png":
        return _encode(".png", grey)
    if state == "png16":
        return _encode(".png", (pixels.astype(np.uint32) * 65535 // LEVELS).astype(np.uint16))
    if state == "rgb":  # a film photographed under yellowish light
        return _encode(".jpg", (grey[..., None] * np.array([0.80, 0.95, 1.0])).astype(np.uint8))
    return _encode(".jpg", grey)


def write_dicom(path: Path, image: Image, pixels: np.ndarray) -> None:
    """12 bits stored in 16. The image's seed decides: one in seven MONOCHROME1, one in ten RLE, one in three with a window."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

    inverse, rle, window = image.seed % 7 == 0, image.seed % 10 == 0, image.seed % 3 == 0
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[image.dicom_id])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "CR", "CHEST", image.listed_view
    ds.StudyDate = f"{image.date:%Y%m%d}"
    ds.StudyTime = f"{image.time:%H%M%S}.{round(image.fraction * 1000):03d}" if image.time else ""
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.Columns, ds.Rows = image.size
    ds.PhotometricInterpretation = "MONOCHROME1" if inverse else "MONOCHROME2"
    stored = LEVELS - pixels if inverse else pixels
    if window:
        low, high = np.percentile(stored, (2, 99))
        ds.WindowCenter, ds.WindowWidth = round(float(low + high) / 2), max(2, round(float(high - low)))
    ds.PixelData = stored.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    if image.bare:
        del meta.TransferSyntaxUID
        ds.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=False)
        return
    if rle:
        ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
