"""What answers here: each model, the data it was made from, how good it is, and its card."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import streamlit as st

from serve.messages import Loaded
from serve.ui import drawn
from serve.ui.client import Api

Table = dict[str, dict[str, str]]  # row -> column -> cell
NAMES = {"auroc": "AUROC", "auprc": "AUPRC", "ppv": "PPV", "ece": "ECE", "f1": "F1", "n_pos": "Positive", "n_neg": "Negative"}
LEFT_OUT = {"brier_before", "ece_before"}  # of probabilities that nobody is told; the evaluation's own page has them


def show(api: Api) -> None:
    st.markdown("What answers here, made from which data, and how good it is.")
    loaded = api.models().models
    if not loaded:
        st.info("The service runs, with no model in it.")
    for model in loaded:
        _model(model)


def _model(model: Loaded) -> None:
    st.header(model.name, anchor=False)
    facts = [("Task", model.task), ("Asked at", model.route), ("Fingerprint", model.fingerprint[:16])]
    st.html(drawn.table([*facts, *((_named(name), _fact(value)) for name, value in model.data.items())]))
    for warning in model.metrics.get("warnings") or []:
        st.html(drawn.notice(str(warning), "Warning."))
    if model.metrics:
        st.subheader("How good it is", anchor=False)
        plain = {name: value for name, value in model.metrics.items() if name != "warnings" and not isinstance(value, Mapping)}
        st.html(drawn.table([(_named(name), _cell(value) or _fact(value)) for name, value in plain.items()]))
        st.caption("In parentheses, where there is one, the 95 % interval over patients.")
    tables = _tables({name: value for name, value in model.metrics.items() if isinstance(value, Mapping)}, ())
    for caption, rows in tables:
        columns = [column for column in dict.fromkeys(column for cells in rows.values() for column in cells) if column not in LEFT_OUT]
        body = [[_named(row), *(cells.get(column, "") for column in columns)] for row, cells in rows.items()]
        st.html(drawn.table(body, ("Of", *map(_named, columns)), caption))
    if model.card:
        with st.expander(f"Model card of {model.name}"):
            st.markdown(_below(model.card))


def _tables(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Table]]:
    """(caption, table) of the numbers in nested metrics: mappings of numbers that stand beside each other are the rows of one table."""
    caption = ", ".join(map(_named, path))
    if own := _cells(values):
        yield caption, {"all": own}
    rows = {name: cells for name, of in values.items() if isinstance(of, Mapping) and not _interval(of) and (cells := _cells(of))}
    if rows:
        yield caption, rows
    for name, of in values.items():
        if isinstance(of, Mapping) and not _interval(of) and name not in rows:
            yield from _tables(of, (*path, name))


def _named(name: str) -> str:
    """A metric's or a group's name for a person: 'auroc' -> 'AUROC', 'macro' -> 'Macro'."""
    return NAMES.get(name) or name[:1].upper() + name[1:].replace("_", " ")


def _cells(of: Mapping[str, Any]) -> dict[str, str]:
    return {name: cell for name, value in of.items() if (cell := _cell(value)) is not None}


def _interval(of: Any) -> bool:
    return isinstance(of, Mapping) and {"value", "low", "high"} <= of.keys()


def _cell(value: Any) -> str | None:
    """A number, or one with its interval, in words; None for anything else."""
    if _interval(value):
        if value["value"] is None:
            return "not defined"
        return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} ({_fact(of)})" if isinstance(of, Mapping) else f"{name} {_fact(of)}" for name, of in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _below(card: str) -> str:
    """A card's headings two steps down, below the page's own; and no picture of it, which a browser would fetch from anywhere."""
    return re.sub(r"(?m)^(#{1,4}) ", r"##\1 ", card).replace("![", "[")
