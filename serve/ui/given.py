"""What is asked about: a study, of the demo or one's own, and its chart as a form. The same for every view that asks the model."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from contracts.chart import CELSIUS, PLAUSIBLE, VITALS, Chart
from serve.messages import Example
from serve.ui import drawn
from serve.ui.client import Api

DEMO, OWN = "A demo study", "Your own images"
KEPT: dict[str, Any] = {"persist_state": "session"}  # one fills a chart in once, not on every view

# Field -> (what it is called, its unit, its step). Ranges are the cohort's.
NUMBERS = {
    "age": ("Age", "years", 1.0),
    "acuity": ("Triage acuity", "1 most urgent", 1.0),
    "height_cm": ("Height", "cm", 1.0),
    "weight_kg": ("Weight", "kg", 1.0),
    "bmi": ("Body mass index", "kg/m²", 0.1),
    "temperature": ("Temperature", "°F", 0.1),
    "heartrate": ("Heart rate", "a minute", 1.0),
    "resprate": ("Breathing rate", "a minute", 1.0),
    "o2sat": ("Oxygen saturation", "%", 1.0),
    "sbp": ("Systolic pressure", "mmHg", 1.0),
    "dbp": ("Diastolic pressure", "mmHg", 1.0),
    "pain": ("Pain", "of 10", 1.0),
}
PATIENT = [name for name in NUMBERS if name not in VITALS]
ON_FORM = {*PATIENT, "sex", "chief_complaint", "triage", "medicines"}
NOTES = {"repaired", "implausible", "unreadable"}  # what a chart says of itself


@dataclass(frozen=True, eq=False)
class Given:
    """A study as it goes to the service. truth: of a demo study, what stays here."""

    title: str
    images: list[bytes]
    chart: dict[str, Any] | None
    knowledge: bool
    truth: Example | None


def choose(api: Api, button: str, options: bool) -> Given | None:
    """Draws the choice of a study and its chart -> the study, when the button is pressed. options: of what the model may read."""
    st.header("The study", anchor=False)
    demo = api.examples().examples
    source = st.radio("Take", [DEMO, OWN] if demo else [OWN], horizontal=True, key="source", **KEPT)
    if source == DEMO:
        titles = {head.id: head.title for head in demo}
        name = st.selectbox("Demo study", list(titles), format_func=lambda i: f"{i}: {titles[i]}", key="example", **KEPT)
        example = _example(api, name)
        images, base, title = [base64.b64decode(image) for image in example.images], dict(example.chart or {}), f"demo study {example.id}"
        shown, form = st.columns([1, 2], gap="large")
        with shown:
            st.html(drawn.pictures(example.images, [None] * len(images), 1))
    else:
        example, images, base, title, form = None, _uploaded(), {}, "your study", st.container()
    _fill(title, base)
    with form, st.form("study"):
        chart = _form(base)
        use, knowledge = True, True
        if options:
            use = st.checkbox("Give the model the chart", value=True, key="use_chart", **KEPT)
            knowledge = st.checkbox("Let it read passages of the knowledge base", value=True, key="use_knowledge", **KEPT)
        asked = st.form_submit_button(button, type="primary")
    if not asked:
        return None
    chart = chart if use and chart else None
    if not images and chart is None:
        st.info("There is nothing to look at yet: add an image, or fill in the chart.")
        return None
    _mended(chart)
    return Given(title, images, chart, knowledge, example)


def _example(api: Api, name: str) -> Example:
    held = st.session_state.get("held")
    if held is None or held[0] != (api, name):
        held = st.session_state["held"] = ((api, name), api.example(name))
    return held[1]


def _uploaded() -> list[bytes]:
    """Uploads are held by the visitor's session, in memory, because the widget forgets them when another view is opened."""

    def take() -> None:
        state = st.session_state
        before, now = state.get("uploaded", []), [file.getvalue() for file in state["files"]]
        state["uploaded"] = now
        if now == before:
            return
        answered = [state.pop(name) for name in ("said", "pair") if name in state]
        if not more(before, now, bool(answered)):
            state.pop("filled", None)  # so that the form is emptied

    files = st.file_uploader(
        "Images of one study: JPEG, PNG or DICOM", accept_multiple_files=True, key="files", on_change=take, help="Kept in memory only."
    )
    images: list[bytes] = st.session_state.get("uploaded", [])
    if images and not files:
        st.caption(f"Still held: {len(images)} image{'s' if len(images) > 1 else ''} of before. Choose others to replace them.")
    return images


def more(before: list[bytes], now: list[bytes], answered: bool) -> bool:
    """Whether these are further images of the same study, whose chart stays; with another study's it would be a stranger's.

    Where there were none, a chart with which nothing was asked yet is taken for theirs.
    """
    return all(image in now for image in before) if before else not answered


def _fill(title: str, base: Mapping[str, Any]) -> None:
    """Once a study is chosen, the form shows its chart."""
    if st.session_state.get("filled") == title:
        return
    known = Chart.model_validate(base)
    for name in NUMBERS:
        st.session_state[f"chart_{name}"] = getattr(known.triage if name in VITALS else known, name, None)
    st.session_state["chart_sex"] = known.sex or ""
    st.session_state["chart_chief_complaint"] = known.chief_complaint or ""
    st.session_state["chart_medicines"] = "\n".join(medicine.name for medicine in known.medicines)
    st.session_state["filled"] = title


def _form(base: Mapping[str, Any]) -> dict[str, Any]:
    """Draws the form -> the chart: what the form does not show stays as it was in `base`."""
    st.subheader("Chart", anchor=False)
    st.caption("What was known before the study. Leave blank what is not known.")
    complaint = st.text_input("Chief complaint", max_chars=200, key="chart_chief_complaint", **KEPT)
    typed: dict[str, Any] = {"chief_complaint": (complaint or "").strip()}
    cells = iter([*st.columns(3), *st.columns(3)])
    with next(cells):
        words = {"": "not known", "F": "female", "M": "male"}
        typed["sex"] = st.selectbox("Sex", list(words), format_func=words.__getitem__, key="chart_sex", **KEPT)
    typed |= {name: _number(name, cell) for name, cell in zip(PATIENT, cells)}
    st.markdown("**Vital signs at triage**")
    cells = iter([*st.columns(4), *st.columns(4)])
    vitals = {name: _number(name, cell) for name, cell in zip(VITALS, cells)}
    lines = (st.text_area("Medicines, one a line", key="chart_medicines", height=80, **KEPT) or "").splitlines()
    known = {medicine["name"]: medicine for medicine in base.get("medicines") or []}
    typed["medicines"] = [known.get(line.strip(), {"name": line.strip()}) for line in lines if line.strip()]
    typed["triage"] = {name: value for name, value in {**(base.get("triage") or {}), **vitals}.items() if value is not None}
    if not typed["triage"].keys() - {"hours"}:
        typed["triage"] = None
    rest = {name: value for name, value in base.items() if name not in ON_FORM | NOTES and value}
    if rest:
        with st.expander("Also in this chart, and sent with it"):
            st.html(drawn.table([(name.replace("_", " "), _words(value)) for name, value in rest.items()]))
    return rest | {name: value for name, value in typed.items() if value}


def _number(name: str, cell: Any) -> float | None:
    label, unit, step = NUMBERS[name]
    low, high = PLAUSIBLE[name]
    hint = f"{CELSIUS[0]:g} to {CELSIUS[1]:g} is read as Celsius." if name == "temperature" else None
    return cell.number_input(
        f"{label} ({unit}, {low:g} to {high:g})",
        min_value=CELSIUS[0] if name == "temperature" else low,
        max_value=high,
        value=None,
        step=step,
        format="%.4g",
        help=hint,
        key=f"chart_{name}",
        **KEPT,
    )


def _words(value: Any) -> str:
    """A part of a chart, for a person."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(of)}" for name, of in value.items() if of is not None)
    if isinstance(value, list):
        return "; ".join(_words(one) for one in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mended(chart: dict[str, Any] | None) -> None:
    """Says what the service will mend or leave out of the chart, by the same code."""
    known = Chart.model_validate(chart or {})
    if known.repaired:
        st.caption(f"Mended: {', '.join(known.repaired)}.")
    if known.implausible:
        st.caption(f"Out of range, and left out: {', '.join(known.implausible)}.")
