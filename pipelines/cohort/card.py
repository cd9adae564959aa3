"""The data card: what is in a cohort, what is not, and why. `cohort.json` holds the numbers, `cohort.html` shows them."""

import json
from typing import Any

from contracts.findings import FINDINGS, label_column
from contracts.pages import Page, bars
from contracts.schema import SPLITS
from contracts.storage import Place
from pipelines.cohort.sources import Found, Tables

CHART = (
    "age", "sex", "race", "transport", "chief_complaint", "acuity", "bmi", "height_cm", "weight_kg",
    "triage", "vitals", "medicines", "labs", "history",
)  # fmt: skip
TRIAGE = ("temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp", "pain")


def describe(tables: Tables, found: Found) -> dict[str, Any]:
    """All numbers of the card, from `cohort` (where the lists of a chart are their lengths) and the ledger of what was dropped."""

    def rows(sql: str) -> list[tuple]:
        return tables.con.execute(sql).fetchall()

    def one(sql: str) -> tuple:
        return rows(sql)[0]

    def counts(sql: str) -> dict[str, int]:
        return {str(k): n for k, n in rows(sql)}

    def of_finding(finding: str) -> dict[str, dict[str, int]]:
        c = label_column(finding)
        states = ", ".join(f"count(*) FILTER ({c} {is_})" for is_ in ("= 1", "= 0", "= -1", "IS NULL"))
        sql = f"SELECT split, {states} FROM cohort GROUP BY split"
        return {s: {"positive": p, "negative": n, "uncertain": u, "blank": b} for s, p, n, u, b in rows(sql)}

    linked, coverage = one("SELECT count(stay_id), count(stay_id) / count(*) FROM cohort")
    quantiles = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    offsets = one(f"SELECT quantile_cont(stay_offset_hours, {list(quantiles)}) FROM cohort")[0]
    missing = {name: f"chart_{name} IS NULL" for name in CHART}
    missing |= {f"triage.{name}": f"chart_triage.{name} IS NULL" for name in TRIAGE}
    sizes = {name: f"coalesce(sum(chart_{name}), 0)::BIGINT" for name in ("vitals", "medicines", "labs", "history")}
    dispensed = "(SELECT count(*) FROM medicines_known WHERE kind = 'dispensed')"
    targets = ("icu", "death", "hospitalised")
    return {
        "sources": found.named(),
        "absent": found.absent,
        "images": {
            "in_table": one("SELECT count(*) FROM images")[0],
            "rows": one("SELECT count(*) FROM cohort")[0],
            "dropped": counts("SELECT reason, count(*) FROM dropped GROUP BY reason ORDER BY reason"),
        },
        "studies": one("SELECT count(DISTINCT study_id) FROM cohort")[0],
        "patients": one("SELECT count(DISTINCT group_id) FROM cohort")[0],
        "splits": {
            s: {"images": i, "studies": t, "patients": p}
            for s, i, t, p in rows("SELECT split, count(*), count(DISTINCT study_id), count(DISTINCT group_id) FROM cohort GROUP BY split")
        },
        "findings": {finding: of_finding(finding) for finding in FINDINGS},
        "without_label_row": one("SELECT count(*) FILTER (NOT label_row) FROM cohort")[0],
        "views": {
            "in_table": counts("SELECT view, count(*) FROM images GROUP BY view ORDER BY view"),
            "rows": counts("SELECT view, count(*) FROM cohort GROUP BY view ORDER BY view"),
        },
        "reports": {"present": 0, "short": 0, "absent": 0} | counts("SELECT report_status, count(*) FROM cohort GROUP BY report_status"),
        "ed": {
            "linked": linked,
            "coverage": coverage,
            "offset_hours": dict(zip(("min", "p5", "p25", "median", "p75", "p95", "max"), offsets or [None] * 7, strict=True)),
            "triage_known": one("SELECT count(chart_triage) FROM cohort")[0],
        },
        "missing": dict(
            zip(missing, one(f"SELECT {', '.join(f'count(*) FILTER ({w})' for w in missing.values())} FROM cohort"), strict=True)
        ),
        "chart": dict(
            zip((*sizes, "dispensed"), one(f"SELECT {', '.join(sizes.values())}, {dispensed} FROM cohort"), strict=True)
        ),
        "repairs": {
            state: counts(f"SELECT name, count(*) FROM (SELECT unnest(chart_{state}) AS name FROM cohort) GROUP BY name ORDER BY name")
            for state in ("repaired", "implausible", "unreadable")
        },
        "targets": {
            t: dict(zip(("yes", "no", "unknown"), one(
                f"SELECT count(*) FILTER (target_{t}), count(*) FILTER (NOT target_{t}), count(*) FILTER (target_{t} IS NULL) FROM cohort"
            ), strict=True))
            for t in targets
        },
        "audit": {
            "patients_in_two_splits": one(
                "SELECT count(*) FROM (SELECT group_id FROM cohort GROUP BY group_id HAVING count(DISTINCT split) > 1)"
            )[0],
            "ids_twice": one("SELECT count(*) - count(DISTINCT row_id) FROM cohort")[0],
            "moved_from_official": one("SELECT count(*) FROM rows WHERE official IS NOT NULL AND official <> split")[0],
        },
    }  # fmt: skip


def draw(card: dict[str, Any], out: Place) -> None:
    """Write cohort.json and cohort.html."""
    (out / "cohort.json").write(json.dumps(card, indent=1, default=str).encode())
    (out / "cohort.html").write(page(card).html().encode())


def page(card: dict[str, Any]) -> Page:
    images, ed = card["images"], card["ed"]
    p = Page("Data card", f"{images['rows']:,} images of {card['studies']:,} studies of {card['patients']:,} patients.")
    p.table("Sources", ("source", "where"), list(card["sources"].items()), "An absent source leaves its columns empty.")
    order = [s for s in SPLITS if s in card["splits"]]
    p.table("Splits", ("split", "images", "studies", "patients"), [(s, *card["splits"][s].values()) for s in order])
    dropped = [(reason, n) for reason, n in images["dropped"].items()]
    p.table(
        "From the table to the cohort",
        ("", "images"),
        [("in the metadata table", images["in_table"]), *dropped, ("rows", images["rows"])],
        "Each dropped image is counted under the first reason that held.",
    )
    p.table(
        "Findings",
        ("finding", *(f"{s} {state}" for s in order for state in ("+", "-", "?", "blank"))),
        [(f, *(v for s in order for v in card["findings"][f].get(s, {}).values())) for f in FINDINGS],
        f"Positive, negative, uncertain and not mentioned, by image. {card['without_label_row']:,} rows have no label row at all.",
    )
    if "train" in order:
        positive = {f: card["findings"][f]["train"]["positive"] for f in FINDINGS}
        p.picture(bars(positive, "images positive in train"), "Findings are long-tailed: the rare ones decide what a macro average means.")
    p.table(
        "Views",
        ("view", "in the table", "rows"),
        [(v or "(blank)", n, card["views"]["rows"].get(v, 0)) for v, n in card["views"]["in_table"].items()],
    )
    p.table(
        "Emergency visits",
        ("", ""),
        [("rows with a visit", ed["linked"]), ("share", ed["coverage"]), ("rows with triage known by then", ed["triage_known"])]
        + [(f"hours from arrival to study, {k}", v) for k, v in ed["offset_hours"].items()],
    )
    p.table("Reports", ("status", "rows"), list(card["reports"].items()), "Short is under 30 characters; its text is left out.")
    p.table("In the charts", ("entries", "count"), list(card["chart"].items()))
    n = max(images["rows"], 1)
    p.table("Missing", ("chart field", "rows", "share"), [(k, v, v / n) for k, v in card["missing"].items()])
    p.picture(bars({k: v / n for k, v in card["missing"].items()}, "share of rows"), "Share of rows in which a field is missing.")
    names = sorted({name for group in card["repairs"].values() for name in group})
    p.table(
        "Repairs",
        ("quantity", *card["repairs"]),
        [(name, *(group.get(name, 0) for group in card["repairs"].values())) for name in names],
        "Repaired: Celsius or 'x/10' converted. Implausible and unreadable: now missing.",
    )
    p.table("Outcomes after the study", ("target", "yes", "no", "unknown"), [(t, *v.values()) for t, v in card["targets"].items()])
    p.table("Audit of the split", ("", ""), list(card["audit"].items()), "All of them should be 0 (moved: 0 for official splits).")
    return p
