"""One study: what the model says of it, what it looked at and read, and, of a demo study, the truth beside it."""

import base64

import streamlit as st

from serve.messages import Classified
from serve.ui import drawn
from serve.ui.client import Api
from serve.ui.given import Given, choose


def show(api: Api) -> None:
    st.markdown("What a trained model says of a chest X-ray and a chart, and what it said that from.")
    given = choose(api, "Classify", options=True)
    if given is not None:
        st.session_state.pop("said", None)
        with st.spinner("Asking the model"):
            st.session_state["said"] = (given, *api.classify(given.images, given.chart, knowledge=given.knowledge))
    if "said" in st.session_state:
        _answer(*st.session_state["said"])


def _answer(given: Given, said: Classified, seconds: float) -> None:
    st.header(f"Findings: {given.title}", anchor=False)
    calibrated = "calibrated on the validate split" if said.calibrated else "not calibrated"
    st.caption(
        f"Model {said.model}, probabilities {calibrated}. It was shown: {' and '.join(said.read)}"
        f"{f' ({said.images} images, averaged)' if said.images > 1 else ''}. Answered in {1000 * seconds:.0f} ms. "
        "The upright line is the finding's threshold; ▲ and a full bar: positive, at or above it; a hatched bar: below it."
    )
    left, right = st.columns([3, 2], gap="large") if said.overlays else (st.container(), None)
    with left:
        st.html(drawn.findings(said))
    if right is not None:
        with right:
            st.subheader("Where the text looked", anchor=False)
            _overlays(given, said)
    _evidence(said)
    if given.truth is not None:
        st.header("Truth, not shown to the model", anchor=False)
        st.html(drawn.truth(given.truth.report, given.truth.labels, said))


@st.fragment
def _overlays(given: Given, said: Classified) -> None:
    over = said.overlays or []
    seen = said.pictures or [None] * len(over)
    if said.pictures is None and given.truth is not None:
        seen = [base64.b64encode(image).decode() for image in given.images]  # a demo study's pictures are stored ones already
    opacity = 100
    if any(seen) and any(over):
        opacity = st.slider("Opacity of the overlay", 0, 100, 70, 5, format="%d %%", key="opacity", persist_state="session")
    st.html(drawn.pictures(seen, over, opacity / 100))
    st.caption(
        "From bare (little of the text's attention) over violet and green to yellow (much); the white frame is around the part with most. "
        "Attention shows where a network looks, not why it says what it says."
    )


def _evidence(said: Classified) -> None:
    if said.evidence is None:
        return
    st.header("Evidence", anchor=False)
    st.caption("What the model read. The share is that of the image's attention over all that could be read: together 100 %.")
    st.subheader("The note made of the chart", anchor=False)
    st.html(drawn.note(said.evidence)) if said.evidence.note else st.markdown("The chart holds nothing that the model reads.")
    st.subheader("Passages that the note fetched", anchor=False)
    st.html(drawn.passages(said.evidence)) if said.evidence.passages else st.markdown("None.")
