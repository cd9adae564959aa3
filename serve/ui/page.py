"""The script that Streamlit runs for every visitor, anew at each of their clicks."""

import os
from functools import partial

import streamlit as st

from serve.ui import drawn
from serve.ui.client import Api, ApiProblem
from serve.ui.views import compare, models, search, study

VIEWS = {"Study": study, "Compare": compare, "Search": search, "Models": models}

st.set_page_config(page_title="cxray", layout="wide")
st.html(drawn.STYLE)

with st.sidebar:
    st.markdown("**Service**")
    address = os.environ.get("CXRAY_API", "http://127.0.0.1:8000")
    st.caption(f"`{address}`, as CXRAY_API says")
    typed = st.text_input("Key", type="password", key="key", persist_state="session", autocomplete="off", help="One that `cxray key` made.")
    if not typed and os.environ.get("CXRAY_API_KEY"):
        st.caption("Without one here, that of CXRAY_API_KEY is used.")

api = Api(address, typed.strip() or os.environ.get("CXRAY_API_KEY"))
pages = [st.Page(partial(view.show, api), title=title, url_path=title.lower(), default=view is study) for title, view in VIEWS.items()]
page = st.navigation(pages, position="top")
st.title(page.title, anchor=False)
st.html(drawn.notice())
try:
    page.run()
except ApiProblem as problem:
    st.html(drawn.problem(problem.title, problem.detail, problem.request_id))
    if problem.status == 401:
        st.markdown("Type a key into the field beside (on a narrow screen behind the button **»** at the top), then try again.")
