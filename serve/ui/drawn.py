"""What the page draws itself, as HTML with every value escaped: bars, pictures, evidence, answers. Nothing is told by colour alone."""

from collections.abc import Sequence
from typing import Any

import jinja2

from contracts.findings import NEGATIVE, POSITIVE, UNCERTAIN
from contracts.pages import NOT_FOR_DIAGNOSIS
from serve.messages import Classified, Evidence, Finding, Match

LABEL = {POSITIVE: "stated", NEGATIVE: "denied", UNCERTAIN: "uncertain"}
SAME = "= the same"  # as far as two digits show

STYLE = """<style>
 [data-testid="stCaptionContainer"] { opacity: 1; } [data-testid="stCaptionContainer"] p { opacity: .85; }
 .cx { container-type: inline-size; --full: #c2541a; --rest: #6b7f92; --line: color-mix(in srgb, currentColor 22%, transparent); }
 .cx ul { list-style: none; margin: 0; padding: 0; }
 .cx li { margin: 0; padding: .35rem 0; border-bottom: 1px solid var(--line); }
 .cx .row { display: grid; grid-template-columns: minmax(9rem, 1fr) 2fr 11.5rem; gap: .1rem .9rem; align-items: center; }
 .cx .pair { display: grid; grid-template-columns: minmax(9rem, 1fr) 1.5fr 1.5fr 11rem; gap: .1rem .9rem; align-items: center; }
 .cx .name { font-weight: 600; } .cx .on .name::before { content: "\\25B2\\00a0"; color: var(--full); }
 .cx .number { font-variant-numeric: tabular-nums; } .cx .small { font-size: .875rem; }
 .cx .bar { position: relative; height: 1rem; border: 1px solid var(--line); border-radius: 2px; margin: .3rem 0; }
 .cx .fill { position: absolute; inset: 0 auto 0 0; background: repeating-linear-gradient(135deg, var(--rest) 0 3px, transparent 3px 6px); }
 .cx .on .fill, .cx .share .fill { background: var(--full); } .cx .share .fill { background: var(--rest); }
 .cx .tick { position: absolute; top: -.3rem; bottom: -.3rem; width: 0; border-left: 3px solid currentColor; margin-left: -1.5px; }
 .cx .share { display: grid; grid-template-columns: 4rem 6rem 1fr; gap: .1rem .8rem; align-items: start; }
 .cx .share .bar { height: .8rem; }
 .cx p { margin: 0 0 .2rem; } .cx p.next { margin-top: 1rem; } .cx .said { white-space: pre-wrap; overflow-wrap: anywhere; }
 .cx .pictures, .cx .grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
 .cx .pictures.one { grid-template-columns: minmax(0, 34rem); }
 .cx figure { margin: 0; min-width: 0; } .cx img { display: block; width: 100%; }
 .cx .layers { position: relative; background: #000; } .cx .layers img + img { position: absolute; inset: 0; height: 100%; }
 .cx figcaption { padding: .3rem 0; overflow-wrap: anywhere; }
 .cx .none { display: grid; place-items: center; aspect-ratio: 1; border: 1px dashed var(--line); }
 .cx.notice { border-left: .3rem solid #b7791f; padding: .4rem .8rem; background: color-mix(in srgb, #b7791f 14%, transparent); }
 .cx.problem { border: 2px solid #c0392b; border-radius: .3rem; padding: .7rem 1rem; }
 .cx.truth { border: 2px dashed currentColor; padding: .8rem 1rem; }
 .cx .wide { overflow-x: auto; } .cx table { border-collapse: collapse; font-size: .875rem; }
 .cx th, .cx td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
 .cx td { overflow-wrap: break-word; } .cx caption { text-align: left; padding: .3rem 0; font-weight: 600; }
 @container (max-width: 36rem) {
  .cx .row { grid-template-columns: 1fr auto; } .cx .row .bar { grid-column: 1 / -1; grid-row: 2; }
  .cx .pair { grid-template-columns: 1fr auto; } .cx .pair .side { grid-column: 1 / -1; } .cx .pair .change { grid-row: 1; grid-column: 2; }
  .cx .share { grid-template-columns: 4rem 1fr; } .cx .share .what { grid-column: 1 / -1; }
 }
</style>"""

_PARTS = """
{% macro bar(f) %}<div class="bar" role="img" aria-label="{{ f.name }}: {{ '%.2f'|format(f.probability) }} of 1, threshold
 {{ '%.2f'|format(f.threshold) }}"><div class="fill" style="width:{{ '%.1f'|format(100 * f.probability) }}%"></div>
 <div class="tick" style="left:{{ '%.1f'|format(100 * f.threshold) }}%"></div></div>{% endmacro %}
{% macro share(of) %}<span class="number">{{ '%.1f'|format(100 * of) }} %</span>
 <div class="bar" aria-hidden="true"><div class="fill" style="width:{{ '%.1f'|format(100 * of) }}%"></div></div>{% endmacro %}
{% macro labels(of) %}{% for name, value in of.items() %}{{ name }}: {{ label[value] }}{{ '' if loop.last else ', ' }}
 {%- else %}no labels{% endfor %}{% endmacro %}
"""

_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def _template(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(_PARTS + text, globals={"label": LABEL, "same": SAME})


_NOTICE = _template('<div class="cx notice" role="note">{% if name %}<strong>{{ name }}</strong> {% endif %}{{ notice }}</div>')
_PROBLEM = _template("""<div class="cx problem" role="alert"><p><strong>&#9888; {{ title }}</strong></p><p class="said">{{ detail }}</p>
{% if request_id %}<p class="small">Request {{ request_id }}</p>{% endif %}</div>""")
_FINDINGS = _template("""<div class="cx findings"><ul aria-label="Findings">{% for f in findings %}
<li class="row {{ 'on' if f.positive }}"><span class="name">{{ f.name }}</span>{{ bar(f) }}
<span class="number small"><strong>{{ '%.2f'|format(f.probability) }}</strong> {{ 'positive' if f.positive else 'not positive' }},
 from {{ '%.2f'|format(f.threshold) }}</span></li>{% endfor %}</ul></div>""")
_COMPARED = _template("""<div class="cx compared"><ul aria-label="Findings, compared">{% for a, b, by, sign, change in rows %}
<li class="pair"><span class="name">{{ a.name }}</span>{% for f, side in ((a, 'A'), (b, 'B')) %}
<div class="side {{ 'on' if f.positive }}"><span class="number small">{{ side }} {{ '%.2f'|format(f.probability) }}
 {{ '&#9650; positive'|safe if f.positive }}</span>{{ bar(f) }}</div>{% endfor %}
<span class="number small change"><strong>{{ sign }}{% if sign != same %} {{ '%+.2f'|format(by) }}{% endif %}</strong>
 {% if change %}<br>{{ change }}{% endif %}</span></li>
{% endfor %}</ul></div>""")
_PICTURES = _template("""<div class="cx"><div class="pictures {{ 'one' if pictures|length == 1 }}">{% for seen, drawn in pictures %}<figure>
<div class="layers">{% if seen %}<img alt="Image {{ loop.index }} as the model saw it" src="data:image/jpeg;base64,{{ seen }}">{% endif %}
{% if drawn %}<img alt="Where the text looked on image {{ loop.index }}, over it"
 style="opacity:{{ '%.2f'|format(opacity if seen else 1) }}" src="data:image/png;base64,{{ drawn }}">{% endif %}
{% if not seen and not drawn %}<div class="none">no picture came back</div>{% endif %}</div>
<figcaption class="small">Image {{ loop.index }} of {{ pictures|length }}</figcaption></figure>{% endfor %}</div></div>""")
_NOTE = _template("""<div class="cx evidence"><ul aria-label="The note">{% for s in note %}
<li class="share">{{ share(s.share) }}<div class="what"><p class="said">{{ s.text }}</p><p class="small">{{ s.name }}</p></div></li>
{% endfor %}</ul></div>""")
_PASSAGES = _template("""<div class="cx evidence"><ul aria-label="Passages">{% for p in passages %}
<li class="share">{{ share(p.share) }}<div class="what"><p class="said">{{ p.text }}</p>
<p class="small">{{ p.topic ~ ' · ' if p.topic }}Source: {{ p.source or 'not said' }} · passage {{ p.id }} ·
 fetched by {{ p.asked_by }}, fit {{ '%.2f'|format(p.score) }}</p></div></li>{% endfor %}</ul></div>""")
_TRUTH = _template("""<div class="cx truth"><p><strong>Labels of the report</strong>
 <span class="small">(a finding that it does not mention has none)</span></p>
<div class="wide"><table><thead><tr><th scope="col">Finding</th><th scope="col">Report</th><th scope="col">Model</th></tr></thead><tbody>
{% for name, value, model in rows %}<tr><th scope="row">{{ name }}</th><td>{{ label[value] }}</td><td>{{ model }}</td></tr>
{% else %}<tr><td colspan="3">no labels</td></tr>{% endfor %}</tbody></table></div>

{% if report %}<p class="next"><strong>Report</strong></p><p class="said">{{ report }}</p>
{% else %}<p>No report is known.</p>{% endif %}</div>""")
_MATCHES = _template("""<div class="cx"><div class="grid matches">{% for m in matches %}<figure>
{% set view = m.view or 'view unknown' %}{% if m.picture %}
<img alt="Chest X-ray of study {{ m.study_id }}, {{ view }}" src="data:image/jpeg;base64,{{ m.picture }}">
{% else %}<div class="none">no picture</div>{% endif %}
<figcaption class="small"><p><strong>{{ loop.index }}. Study {{ m.study_id }}</strong>,
 {{ view }}, {{ m.split }}, score {{ '%.3f'|format(m.score) }}</p><p>{{ labels(m.labels) }}</p>
<p class="said">{{ m.impression or 'no impression' }}</p></figcaption></figure>{% endfor %}</div></div>""")
_TABLE = _template("""<div class="cx"><div class="wide"><table>{% if caption %}<caption>{{ caption }}</caption>{% endif %}
{% if header %}<thead><tr>{% for cell in header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>{% endif %}
<tbody>{% for row in rows %}<tr>
{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}<td>{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}</tbody></table></div></div>""")


def notice(text: str = "", name: str = NOT_FOR_DIAGNOSIS) -> str:
    return _NOTICE.render(name=name, notice=text)


def problem(title: str, detail: str, request_id: str | None) -> str:
    return _PROBLEM.render(title=title, detail=detail[:1].upper() + detail[1:], request_id=request_id)


def findings(said: Classified) -> str:
    """Positive ones first, then by probability."""
    return _FINDINGS.render(findings=sorted(said.findings, key=lambda f: (-f.positive, -f.probability)))


def compared(a: Classified, b: Classified) -> str:
    """The largest difference first."""
    other = {f.name: f for f in b.findings}
    rows = [_row(f, other[f.name]) for f in a.findings if f.name in other]
    return _COMPARED.render(rows=sorted(rows, key=lambda row: -abs(row[2])))


def _row(a: Finding, b: Finding) -> tuple[Finding, Finding, float, str, str]:
    by = b.probability - a.probability
    sign = SAME if abs(by) < 0.005 else "▲" if by > 0 else "▼"
    change = "" if a.positive == b.positive else "becomes positive" if b.positive else "no longer positive"
    return a, b, by, sign, change


def pictures(seen: Sequence[str | None], drawn: Sequence[str | None], opacity: float) -> str:
    """By image the JPEG and the PNG drawn over it, base64. opacity: of the one over the other, 0 to 1."""
    return _PICTURES.render(pictures=list(zip(seen, drawn, strict=True)), opacity=opacity)


def note(evidence: Evidence) -> str:
    """In the note's order."""
    return _NOTE.render(note=evidence.note)


def passages(evidence: Evidence) -> str:
    """The one looked at most first."""
    return _PASSAGES.render(passages=sorted(evidence.passages, key=lambda p: -p.share))


def truth(report: str | None, labels: dict[str, int], said: Classified) -> str:
    model = {f.name: "positive" if f.positive else "not positive" for f in said.findings}
    return _TRUTH.render(report=report, rows=[(name, value, model.get(name, "not asked")) for name, value in labels.items()])


def matches(found: Sequence[Match]) -> str:
    return _MATCHES.render(matches=found)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), caption: str = "") -> str:
    return _TABLE.render(rows=rows, header=header, caption=caption)
