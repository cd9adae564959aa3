"""A user's corpus is read whole or refused in a sentence that does not repeat it; its chunks lose nothing."""

import json
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from words import Words, jsonl

from contracts.errors import CxrayError
from contracts.storage import place
from pipelines.knowledge.corpus import TEXT_FIELDS, Chunker, Document, read_corpus

SECRET = "Mrs Example of Sampletown"


def read(where: Path) -> tuple[list[Document], Counter[str]]:
    left_out: Counter[str] = Counter()
    return list(read_corpus(place(where), TEXT_FIELDS, left_out)), left_out


def test_a_folder_of_every_kind_is_read_in_the_order_of_its_names(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"id": 7, "answer": "one", "topic": "T", "source": "book"}, {"passage": "two", "title": "Two"})
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c.md").write_text("before\n# Heart\n## Large ##\nbig\n```\n# no heading\n```\n# Lung\n")
    (tmp_path / "b/d.txt").write_text("\ufeffplain\r\ntext", encoding="utf-8")
    pq.write_table(pa.table({"contents": ["three", None, ""], "id": ["p", "q", "r"]}), tmp_path / "e.parquet")
    (tmp_path / "f.pdf").write_bytes(b"%PDF")
    found, left_out = read(tmp_path)
    assert [d.text.split()[0] for d in found] == ["one", "two", "before", "big", "plain", "three"]
    assert [(d.id, d.topic, d.title, d.source) for d in found[:4]] == [
        ("7", "T", "", "book"),
        ("a.jsonl:2", "Two", "Two", "a.jsonl"),
        ("b/c.md:1", "", "", "b/c.md"),
        ("b/c.md:3", "Heart > Large", "Heart > Large", "b/c.md"),
    ]
    assert "# no heading" in found[3].text and found[4].text == "plain\ntext" and found[5].id == "p"
    assert left_out == {"files of an unknown kind": 1, "records without a text field": 1, "empty texts": 1}


def _parquet(table: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    return sink.getvalue().to_pybytes()


BROKEN = {
    "not UTF-8": ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff' + SECRET.encode() + b'"}\n', "a.jsonl, line 2: not UTF-8"),
    "Latin-1 text": ("a.txt", b"\n\n" + SECRET.encode() + b" f\xfcr", "a.txt, line 3: not UTF-8"),
    "not JSON": ("a.jsonl", f'{{"text": "fine"}}\n{{"text": "{SECRET}'.encode(), "a.jsonl, line 2: not JSON"),
    "too deep": ("a.jsonl", b"[" * 200_000, "line 1: not JSON"),
    "a list": ("a.jsonl", json.dumps([SECRET]).encode(), "line 1: a record must be an object"),
    "empty texts": ("a.jsonl", b'{"text": " "}\n{"text": 5}\n{"words": "x"}\n', "has no text .1 empty texts, 1 records"),
    "empty file": ("a.txt", b"", "has no text .they are empty"),
    "another kind": ("a.pdf", SECRET.encode(), "1 files of an unknown kind"),
    "no text column": ("a.parquet", _parquet({"words": [SECRET]}), "no text column"),
    "not Parquet": ("a.parquet", SECRET.encode(), "not a readable Parquet"),
    "torn Parquet": ("a.parquet", _parquet({"text": [SECRET] * 99})[:-40], "not a readable Parquet"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_corpus_is_one_sentence_that_does_not_repeat_it(tmp_path, case):
    name, content, said = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    for where in (tmp_path, tmp_path / name):
        with pytest.raises(CxrayError, match=said) as error:
            read(where)
        assert SECRET not in str(error.value) and "\n" not in str(error.value)


def test_a_corpus_that_is_not_there_or_has_no_files_is_said(tmp_path):
    with pytest.raises(CxrayError, match="no corpus here"):
        read(tmp_path / "nowhere")
    with pytest.raises(CxrayError, match=r"has no text .no files"):
        read(tmp_path)


def test_a_line_of_10_mb_is_left_out_of_jsonl_and_read_in_pieces_elsewhere_in_bounded_memory(tmp_path):
    words = [f"word{i}" for i in range(1_200_000)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": " ".join(words)}) + '\n{"text": "after"}\n')
    (tmp_path / "b.txt").write_text(" ".join(words) + "\n" + "é" * 3_000_000)
    del words
    left_out: Counter[str] = Counter()
    tracemalloc.start()
    count = signs = 0
    for document in read_corpus(place(tmp_path), TEXT_FIELDS, left_out):
        count += document.text.count("word")
        signs += document.text.count("é")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (count, signs) == (1_200_000, 3_000_000) and left_out == {"lines over 1 MB": 1}
    assert peak < 12e6


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "hearts", "Lungs", "seen.", "\n\n", "é" * 30]), max_size=90),
    st.integers(36, 60),
    st.integers(0, 9),
)
def test_chunks_lose_no_word_keep_their_bound_and_repeat_no_more_than_told(parts, limit, overlap):
    text = " ".join(f"{n}{part}" if part.strip("\n-") else part for n, part in enumerate(parts))
    words = text.split()
    cost = [int(n) - 2 for n in Words().count_tokens(words)]
    position = {w: n for n, w in enumerate(words)}
    chunks = Chunker(Words(), limit, overlap)(Document("d", text, "s", title="Heart > Large"))
    assert (Words().count_tokens(chunks) <= limit).all()
    done = 0
    for chunk in chunks:
        body = chunk.removeprefix("Heart > Large: ").split()
        start = position[body[0]]
        assert body == words[start : start + len(body)] and start <= done < start + len(body)  # nothing between it and the one before
        assert sum(cost[start:done]) <= overlap
        done = start + len(body)
    assert done == len(words)


def test_what_is_longer_than_a_chunk_stands_in_several_and_nothing_loops():
    chunks = Chunker(Words(), 32, 8)(Document("d", "x" * 950 + " end", "s"))
    assert "".join(c.replace(" ", "") for c in chunks).count("x") >= 950 and chunks[-1].endswith("end")
    assert Chunker(Words(), 32, 8)(Document("d", " \n ", "s")) == []


def test_chunks_end_with_sentences_begin_with_the_first_one_and_repeat_the_last():
    sentences = [f"Sentence {n} says what it says of hearts." for n in range(10, 22)]
    chunks = Chunker(Words(), 60, 14)(Document("d", " ".join(sentences), "s"))
    assert len(chunks) > 2 and all(c.startswith(sentences[0]) and c.endswith("hearts.") for c in chunks)
    for one, after in pairwise(chunks):
        assert after.removeprefix(sentences[0]).strip().startswith(one[-len(sentences[1]) :].strip())
