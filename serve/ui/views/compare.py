"""The same study twice, with one thing changed: does the chart move the answer, do the passages, and what do they cost?"""

import streamlit as st

from serve.messages import Classified
from serve.ui import drawn
from serve.ui.client import Api
from serve.ui.given import choose

CHART, KNOWLEDGE = "Chart", "Knowledge"
SIDES = {
    CHART: ("without the chart (image alone)", "with the chart"),
    KNOWLEDGE: ("without passages of the knowledge base", "with passages"),
}


def show(api: Api) -> None:
    st.markdown("The same study twice, with one thing changed.")
    what = st.radio("What to switch off and on", [CHART, KNOWLEDGE], horizontal=True, key="switch", persist_state="session")
    given = choose(api, "Compare", options=False)
    if given is not None:
        st.session_state.pop("pair", None)
        if what == CHART and not (given.images and given.chart):
            st.info("To switch the chart off and on, a study needs an image and a chart.")
        elif what == KNOWLEDGE and not given.chart:
            st.info("Passages are fetched by what the chart says: fill it in.")
        else:
            with st.spinner("Asking the model"):
                api.classify(given.images, given.chart, reasons=False)  # what is new costs more the first time: that is neither side's
                a = api.classify(given.images, None if what == CHART else given.chart, knowledge=what == CHART, reasons=False)
                b = api.classify(given.images, given.chart, reasons=False)
            st.session_state["pair"] = (what, given.title, a, b)
    if "pair" in st.session_state:
        _answer(*st.session_state["pair"])


def _answer(what: str, title: str, a: tuple[Classified, float], b: tuple[Classified, float]) -> None:
    st.header(f"{what} off and on: {title}", anchor=False)
    (before, slow), (after, slower) = a, b
    times = [("A", SIDES[what][0], slow), ("B", SIDES[what][1], slower)]
    rows = [(side, words, f"{1000 * seconds:.0f} ms", _positive(said)) for (side, words, seconds), said in zip(times, (before, after))]
    st.html(drawn.table(rows, ("Side", "The model was shown the study", "Answered in", "Positive")))
    st.caption(
        f"B took {1000 * abs(slower - slow):.0f} ms {'more' if slower > slow else 'less'} than A, in one call of each, "
        "after one that does not count. "
        "The difference is B less A, the largest first: ▲ up, ▼ down, = the same. "
        "The upright line is the threshold; a full bar is positive, a hatched one is not."
    )
    st.html(drawn.compared(before, after))


def _positive(said: Classified) -> str:
    return ", ".join(f.name for f in said.findings if f.positive) or "none"
