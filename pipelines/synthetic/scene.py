"""What the generator has in mind: patients, their visits, their studies and pictures. All tables and the truth are told from it.

Times are naive datetimes of whole seconds, shifted per patient as MIMIC's are. Cells of charts are kept as the text that the
table will show, each with what the generator did to it.
"""

from dataclasses import dataclass, field
from datetime import date, datetime

from pipelines.synthetic.lexicon import CoinedMedicine
from pipelines.synthetic.phantom import Body

MEASURES = ("temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp", "pain")
Code = tuple[str, int]  # an ICD code and its version


@dataclass
class Case:
    """What is wrong with the patient at one study, and where that can be seen."""

    states: dict[str, int]  # finding -> 1 stated, 0 denied, -1 doubted; a finding that is not mentioned is absent
    clue: str  # 'picture' | 'both' | 'chart' (the picture is ambiguous) | 'name' (and the chart tells by a coined name only)
    severity: float  # about 0 (well) to 4 (dying)
    drug: CoinedMedicine | None = None

    @property
    def present(self) -> list[str]:
        return [f for f, state in self.states.items() if state == 1 and f != "No Finding"]

    @property
    def doubted(self) -> list[str]:
        return [f for f, state in self.states.items() if state == -1]


@dataclass
class Vitals:
    """One row of triage or vitalsign: the cells' text, and per cell 'missing', 'ok', 'repaired', 'implausible', 'unreadable'."""

    time: datetime
    cells: dict[str, str]
    status: dict[str, str]
    rhythm: str = ""


@dataclass
class Medicine:
    time: datetime
    name: str
    group: str  # the class of medicines, blank where the pharmacy knows none


@dataclass
class Lab:
    charttime: datetime
    storetime: datetime
    itemid: int
    value: float
    specimen: int


@dataclass
class Stay:
    """A stay in the emergency department."""

    stay_id: int
    intime: datetime
    outtime: datetime
    hadm_id: int | None = None
    disposition: str = "HOME"
    complaint: str = ""
    acuity: str = ""
    triage: Vitals | None = None
    vitals: list[Vitals] = field(default_factory=list)
    reconciled: list[Medicine] = field(default_factory=list)
    dispensed: list[Medicine] = field(default_factory=list)
    diagnoses: list[Code] = field(default_factory=list)


@dataclass
class Admission:
    hadm_id: int
    admittime: datetime
    dischtime: datetime
    stay: Stay | None = None  # the emergency stay that led to it
    death: datetime | None = None
    icu: tuple[int, datetime, datetime] | None = None  # stay_id, intime, outtime
    codes: list[Code] = field(default_factory=list)


@dataclass
class Image:
    dicom_id: str
    view: str  # as drawn
    listed_view: str  # as the table says: '' where it says nothing
    time: datetime | None  # None: the table has no StudyTime
    date: date
    fraction: float  # of a second, which StudyTime carries
    size: tuple[int, int]  # columns, rows
    seed: int
    split: str | None
    file: str = "ok"
    bare: bool = False  # its DICOM lacks the TransferSyntaxUID
    body: Body | None = None
    signs: dict[str, float] = field(default_factory=dict)


@dataclass
class Study:
    study_id: int
    time: datetime
    case: Case
    linked: Stay | None
    report: str = "full"  # 'full' | 'impression' | 'wet' | 'short' | 'absent'
    labelled: bool = True
    images: list[Image] = field(default_factory=list)


@dataclass
class Episode:
    """A few days of a patient's life around one study or two."""

    kind: str
    stays: list[Stay]
    studies: list[Study]
    admission: Admission | None = None


@dataclass
class Patient:
    subject_id: int
    split: str
    sex: str
    age: int
    anchor_year: int
    anchor_group: str
    race: str
    body: Body
    conditions: list[str]
    episodes: list[Episode] = field(default_factory=list)
    earlier: list[Admission] = field(default_factory=list)
    labs: list[Lab] = field(default_factory=list)
    dod: date | None = None

    @property
    def admissions(self) -> list[Admission]:
        return [*self.earlier, *(e.admission for e in self.episodes if e.admission)]

    @property
    def stays(self) -> list[Stay]:
        return [s for e in self.episodes for s in e.stays]

    @property
    def studies(self) -> list[Study]:
        return [s for e in self.episodes for s in e.studies]

    def icd_version(self, when: datetime) -> int:
        """9 until October 2015, 10 after: MIMIC's years are shifted, the anchor year's group says by how much."""
        middle = int(self.anchor_group[:4]) + 1
        return 9 if middle + (when.year - self.anchor_year) <= 2015 else 10
