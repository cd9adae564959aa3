"""The Parquet columns of each data set. A version goes up when a column changes its meaning.

Column families of the cohort say what may use them: `chart_*` was known before the study and may become an input; `label_*`,
`report_*` and `target_*` never do.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import pyarrow as pa

from contracts.findings import FINDINGS, label_column

KEYS = [
    pa.field("row_id", pa.string(), False),
    pa.field("group_id", pa.string(), False),
    pa.field("split", pa.string(), False),
]
SPLITS = ("train", "validate", "test")  # MIMIC-CXR's own names

_TIME = pa.timestamp("us")
_VITALS = pa.struct([(n, pa.float64()) for n in ("hours", "temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp", "pain")])
_MEDICINE = pa.struct([("name", pa.string()), ("kind", pa.string()), ("hours", pa.float64())])
_LAB = pa.struct(
    [
        ("name", pa.string()),
        ("value", pa.float64()),
        ("unit", pa.string()),
        ("abnormal", pa.bool_()),
        ("hours", pa.float64()),
    ]
)
_DIAGNOSIS = pa.struct([("code", pa.string()), ("version", pa.int8()), ("title", pa.string()), ("hours", pa.float64())])
_CODE = pa.struct([("code", pa.string()), ("version", pa.int8())])

Section = Literal["examination", "indication", "technique", "comparison", "findings", "impression"]
SECTIONS: tuple[Section, ...] = get_args(Section)


VERSIONS = {"cohort": 1, "images": 1, "features": 1, "texts": 2, "predictions": 1}


@dataclass(frozen=True)
class Schema:
    """A data set's name, the version of its columns, and the columns."""

    name: str
    version: int
    columns: pa.Schema


COHORT = Schema(
    "cohort",
    VERSIONS["cohort"],
    pa.schema(
        [
            *KEYS,
            ("study_id", pa.string()),
            ("study_time", _TIME),
            ("view", pa.string()),
            ("frontal", pa.bool_()),
            ("image_uri", pa.string()),
            ("image_pixels", pa.int64()),  # as the metadata table states them
            ("stay_id", pa.string()),  # the emergency visit, and the hospital admission, that the study belongs to
            ("hadm_id", pa.string()),
            ("stay_offset_hours", pa.float64()),  # study time less arrival
            ("chart_age", pa.float64()),
            ("chart_sex", pa.string()),
            ("chart_race", pa.string()),
            ("chart_transport", pa.string()),
            ("chart_chief_complaint", pa.string()),
            ("chart_acuity", pa.float64()),
            ("chart_bmi", pa.float64()),
            ("chart_height_cm", pa.float64()),
            ("chart_weight_kg", pa.float64()),
            ("chart_triage", _VITALS),
            ("chart_vitals", pa.list_(_VITALS)),
            ("chart_medicines", pa.list_(_MEDICINE)),
            ("chart_labs", pa.list_(_LAB)),
            ("chart_history", pa.list_(_DIAGNOSIS)),
            ("chart_repaired", pa.list_(pa.string())),
            ("chart_implausible", pa.list_(pa.string())),
            ("chart_unreadable", pa.list_(pa.string())),
            ("label_row", pa.bool_()),  # the label table has a row for the study; a finding in it may still be blank
            *[(label_column(f), pa.int8()) for f in FINDINGS],
            ("report_status", pa.string()),  # present, short, absent
            ("report_text", pa.string()),
            *[(f"report_{s}", pa.string()) for s in SECTIONS],
            ("target_icd", pa.list_(_CODE)),
            ("target_icu", pa.bool_()),
            ("target_icu_hours", pa.float64()),  # from the study to it; so are the two below
            ("target_death", pa.bool_()),
            ("target_death_hours", pa.float64()),
            ("target_hospitalised", pa.bool_()),
            ("target_hospitalised_hours", pa.float64()),
            ("target_disposition", pa.string()),
        ]
    ),
)

# What every job that makes rows adds: `outcome` is the partition (row or reject), and a reject has nothing but its reason.
REJECTION = [pa.field("reason", pa.string()), pa.field("lasting", pa.bool_())]

IMAGES = Schema(
    "images",
    VERSIONS["images"],
    pa.schema(
        [
            *KEYS,
            ("image", pa.binary()),  # JPEG q90, grey, 518 x 518: what every encoder sees
            ("width", pa.int32()),  # of the original
            ("height", pa.int32()),
            ("scale", pa.float32()),  # x_stored = x * scale + pad_x
            ("pad_x", pa.int32()),
            ("pad_y", pa.int32()),
            ("source", pa.string()),  # jpeg, png, dicom
            ("source_bytes", pa.int64()),
            ("source_hash", pa.string()),  # sha256 of the file as it was
            ("content_hash", pa.string()),  # sha256 of the stored picture
            ("flags", pa.list_(pa.string())),
            ("edges", pa.binary()),  # n x n edge densities (uint8), where asked for
        ]
    ),
)


def features_schema(dim: int, grid: int, token_dim: int) -> Schema:
    """An image encoder's output: `embedding` [dim]; `tokens` int8 [grid * grid, token_dim] with one `token_scales` a token."""
    tokens = [("tokens", pa.binary(grid * grid * token_dim)), ("token_scales", pa.binary(grid * grid * 2))] if grid else []
    return Schema("features", VERSIONS["features"], pa.schema([*KEYS, ("embedding", pa.list_(pa.float32(), dim)), *tokens]))


def texts_schema(dim: int) -> Schema:
    """A text encoder's output: note segments and passages (`segments`), and the report's embedding where there is a report.

    Kinds of segments: `raw`, the complaint and triage as charted, unfiltered; `note`, the filtered narrative; `passage`, retrieved
    knowledge, whose words and vector stand once, in the knowledge folder.
    """
    vector = pa.list_(pa.float32(), dim)
    segment = pa.struct(
        [
            ("kind", pa.string()),
            ("name", pa.string()),  # of a raw or note segment: triage, presentation, vitals, ...
            ("text", pa.string()),
            ("embedding", vector),
            ("id", pa.string()),  # of a passage, as are the two below
            ("asked_by", pa.string()),  # the segment that fetched it
            ("score", pa.float32()),
        ]
    )
    removed = pa.struct([("rule", pa.string()), ("count", pa.int32())])
    columns = [
        *KEYS,
        ("study_id", pa.string()),
        ("segments", pa.list_(segment)),
        ("note_tokens", pa.int32()),  # of the narrative as it stands here
        ("note_cut", pa.int32()),  # tokens that did not fit
        ("removed", pa.list_(removed)),  # what the leakage filter took out: how often, never what
        ("report_embedding", vector),
        ("report_tokens", pa.int32()),
        ("report_truncated", pa.bool_()),
    ]
    return Schema("texts", VERSIONS["texts"], pa.schema(columns))


def predictions_schema(targets: int) -> Schema:
    """What a model said of each image: `scores` [targets] probabilities, `labels` [targets] 1, 0, or null where nothing is known.

    dataset.json names the `model`, the `targets` in their order, and the `policy` that turned label states into labels.
    """
    columns = [*KEYS, ("study_id", pa.string()), ("scores", pa.list_(pa.float64(), targets)), ("labels", pa.list_(pa.int8(), targets))]
    return Schema("predictions", VERSIONS["predictions"], pa.schema(columns))
