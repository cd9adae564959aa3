"""Studies like words, or like an image."""

import base64
from typing import Any

import streamlit as st

from contracts.findings import FINDINGS, NEGATIVE, POSITIVE, UNCERTAIN
from serve.messages import SearchFilter, SearchRequest
from serve.ui import drawn
from serve.ui.client import Api

WORDS, IMAGE = "Words", "An image"
ANY = "any"
STATES = {"stated": POSITIVE, "denied": NEGATIVE, "uncertain": UNCERTAIN}


def show(api: Api) -> None:
    st.markdown("Studies whose report is like your words, or whose image is like yours.")
    by = st.radio("Search by", [WORDS, IMAGE], horizontal=True, key="search_by", persist_state="session")
    with st.form("search"):
        text = image = None
        if by == WORDS:
            text = st.text_input(
                "Words", key="search_text", persist_state="session", max_chars=4000, placeholder="large left pleural effusion"
            )
        else:
            image = st.file_uploader("Image", max_upload_size=20, help="JPEG, PNG or DICOM")
        wanted = _filter()
        k = st.slider("How many", 1, 48, 12, key="search_k", persist_state="session")
        asked = st.form_submit_button("Search", type="primary")
    if asked:
        st.session_state.pop("found", None)
        if not text and image is None:
            st.info("Write some words." if by == WORDS else "Choose an image.")
            return
        sent = base64.b64encode(image.getvalue()).decode() if image is not None else None
        found = api.search(SearchRequest(text=text or None, image=sent, via=None, filter=wanted, k=k, pictures=True))
        st.session_state["found"] = (f"“{text}”" if text else "your image", found)
    if "found" in st.session_state:
        what, found = st.session_state["found"]
        st.header(f"Studies like {what}", anchor=False)
        st.caption(f"{len(found.matches)} studies, the most alike first. Labels and impression are those of the reports.")
        st.html(drawn.matches(found.matches)) if found.matches else st.markdown("No study fits. Take a filter away.")


def _filter() -> SearchFilter | None:
    kept: dict[str, Any] = {"persist_state": "session"}
    with st.expander("Filters"):
        one, two, three, four = st.columns(4)
        split = one.multiselect("Split", ["train", "validate", "test"], key="search_split", **kept)
        view = two.multiselect("View", ["PA", "AP", "LATERAL", "LL"], accept_new_options=True, key="search_view", **kept)
        finding = three.selectbox("Finding", [ANY, *FINDINGS], key="search_finding", **kept)
        state = four.selectbox("is", list(STATES), key="search_state", help="What the report says of that finding.", **kept)
    wanted = {"split": split, "view": view, "findings": {finding: STATES[state]} if finding != ANY else {}}
    said = {name: value for name, value in wanted.items() if value}
    return SearchFilter.model_validate(said) if said else None
