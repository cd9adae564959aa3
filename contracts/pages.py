"""A page a person reads: one HTML file with its pictures inside, no script, nothing fetched."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

NOT_FOR_DIAGNOSIS = "For research, not for diagnosis."

_TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
 h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dbe3; }
 .lead { font-size: 1.1rem; } .notice { background: #fff4d6; border-left: 4px solid #b7791f; padding: .5rem 1rem; }
 table { border-collapse: collapse; margin: .5rem 0; font-size: .88rem; } .wide { overflow-x: auto; }
 th, td { text-align: left; padding: .2rem .7rem; border-bottom: 1px solid #e6eaef; vertical-align: top; }
 td.number { text-align: right; font-variant-numeric: tabular-nums; } th { background: #f3f5f8; }
 .note, figcaption { color: #57606c; font-size: .88rem; } pre { white-space: pre-wrap; background: #f3f5f8; padding: .7rem; }
 .grid { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: .5rem 0; max-width: 100%; } .grid figure { width: 12.5rem; }
 img { max-width: 100%; } footer { margin: 3rem 0; color: #57606c; }
</style></head><body>
<h1>{{ page.title }}</h1><p class="lead">{{ page.lead }}</p><p class="notice">{{ warning }}</p>
{% for part in page.parts %}
{% if part.heading %}<h2>{{ part.heading }}</h2>{% endif %}
{% if part.text %}<p>{{ part.text }}</p>{% endif %}
{% if part.verbatim %}<pre>{{ part.verbatim }}</pre>{% endif %}
{% if part.rows %}<div class="wide"><table>
<thead><tr>{% for cell in part.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in part.rows %}
<tr>{% for text, number in row %}<td{% if number %} class="number"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% if part.pictures %}<div class="{{ 'grid' if part.pictures|length > 1 }}">
{% for source, caption in part.pictures %}
<figure><img alt="{{ caption }}" src="{{ source }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>{% endif %}
{% if part.note %}<p class="note">{{ part.note }}</p>{% endif %}
{% endfor %}
<footer>{{ warning }}</footer></body></html>
""")


class Page:
    """Parts in the order they are added; `html()` makes the file."""

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.lead = title, lead
        self.parts: list[dict[str, Any]] = []

    def text(self, heading: str, text: str, verbatim: str = "") -> None:
        self.parts.append({"heading": heading, "text": text, "verbatim": verbatim})

    def table(self, heading: str, header: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        self.parts.append({"heading": heading, "header": header, "rows": [[_cell(c) for c in row] for row in rows], "note": note})

    def picture(self, png: bytes, caption: str) -> None:
        self.pictures("", [(png, caption)])

    def pictures(self, heading: str, pictures: Sequence[tuple[bytes, str]], note: str = "") -> None:
        """PNG or JPEG bytes with a caption each, side by side."""
        self.parts.append({"heading": heading, "pictures": [(_data_uri(p), caption) for p, caption in pictures], "note": note})

    def add(self, other: "Page", heading: str) -> None:
        """The parts of another page, under a heading."""
        self.parts.append({"heading": heading, "text": other.lead})
        self.parts.extend(other.parts)

    def html(self) -> str:
        return _TEMPLATE.render(page=self, warning=NOT_FOR_DIAGNOSIS)


def _cell(value: Any) -> tuple[str, bool]:
    if isinstance(value, bool) or value is None:
        return ("" if value is None else str(value)), False
    if isinstance(value, int):
        return f"{value:,}", True
    if isinstance(value, float):
        return f"{value:,.3f}", True
    return str(value), False


def _data_uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def bars(values: Mapping[str, float], axis: str) -> bytes:
    """Horizontal bars, largest first, as PNG."""
    from matplotlib.figure import Figure

    items = sorted(values.items(), key=lambda kv: kv[1])
    figure = Figure(figsize=(8, 0.32 * len(items) + 0.8), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([k for k, _ in items], [v for _, v in items], color="#33658a")
    axes.bar_label(drawn, fmt="{:,.3g}", padding=3, fontsize=8)
    axes.set_xlabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()
