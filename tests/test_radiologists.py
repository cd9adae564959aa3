"""The radiologists' labels of test: their file is read as it is, and no other is taken for it."""

from pathlib import Path

import numpy as np
import pytest

from contracts.errors import CxrayError
from contracts.storage import place
from evaluation.studies import radiologists


def labelled(folder: Path, text: str) -> str:
    (folder / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text(text)
    return str(folder / "mimic-cxr-2.1.0-test-set-labeled.csv")


def test_airspace_opacity_is_lung_opacity(tmp_path):
    file = labelled(tmp_path, "study_id,Airspace Opacity\n50000001,1.0\n50000003,\n")
    labels = radiologists(place(file), np.array(["50000001", "50000002", "50000003"]), ("Lung Opacity", "Edema"))
    np.testing.assert_array_equal(labels, [[1, np.nan], [np.nan, np.nan], [0, np.nan]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study,Edema\n1,1\n", "no study_id"),
        ("study_id,Other\n1,1\n", "none of the findings"),
        ("study_id,Edema\n1,1\n1,0\n", "twice"),
        ("study_id,Edema\n2,1\n", "none of the studies"),
        ("study_id,Edema\n1,5\n", "values other than"),
        ("study_id,Edema\n1,maybe\n", "not a CSV"),
    ],
)
def test_another_file_than_the_radiologists_is_refused(tmp_path, text, message):
    with pytest.raises(CxrayError, match=message):
        radiologists(place(labelled(tmp_path, text)), np.array(["1"]), ("Edema",))
