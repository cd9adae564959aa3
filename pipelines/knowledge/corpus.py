"""A user's own corpus, a file or a folder anywhere -> documents -> chunks of so many of the encoder's own tokens.

JSONL and Parquet (a record a document), Markdown (a section a document, under its headings) and plain text (a few pages a document).
What is wrong with a whole file stops the reading with one sentence; what is wrong with one record is counted and left out.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.errors import CxrayError
from contracts.storage import Place, told
from models.encoders.base import TextEncoder

TEXT_FIELDS = ("text", "answer", "passage", "contents")
OTHER_FIELDS = ("id", "title", "topic", "source")
LINE_BYTES = 1 << 20  # a longer line of JSONL is left out; of Markdown and plain text it is read in pieces of so many bytes
PAGE_CHARACTERS = 8_000  # of plain text, which does not say where one thing ends: about three pages
_BLOCK = 1 << 18  # bytes read at once
_ROWS = 512  # of a Parquet file

_WORD = re.compile(r"\S{1,100}")  # a longer run of signs (an address, a sequence) is no word, and is cut
_PARAGRAPH = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*•]|\d+\.)\s)")
_SENTENCE_END = re.compile(r"[.!?][\"')\]\u2019\u201d]*$")
_HEADING = re.compile(r"\s{0,3}(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus. source: what it says of itself, or its file. title: what its chunks begin with, where it has one."""

    id: str
    text: str
    source: str
    topic: str = ""
    title: str = ""


def files_of(where: Place) -> list[Place]:
    """The corpus' files in the order they are read: itself, or all below it by name. Raises CxrayError where there is nothing."""
    with told(where):
        if where.fs.isfile(where.path):
            return [where]
        files = where.files()
    if not files and not where.exists():
        raise CxrayError(f"{where}: no corpus here; name a file or a folder of {', '.join(READERS)} files")
    return files


def read_corpus(where: Place, fields: Sequence[str], left_out: Counter[str]) -> Iterator[Document]:
    """The documents of a file or a folder, in the order of their files' names.

    fields: of a record the first of these that is there is its text. left_out: reason -> count, added to while reading: records
    without a text, lines of JSONL over 1 MB, files of unknown kinds. Raises CxrayError, and never repeats the text, for a
    corpus without any document, for a file that is not UTF-8, not JSON or not Parquet, and for Parquet without a text column.
    """
    files, found = files_of(where), False
    for file in files:
        reader = READERS.get("." + file.name.rpartition(".")[2].lower())
        if reader is None:
            left_out["files of an unknown kind"] += 1
            continue
        name = file.relative(where) or file.name
        for document in reader(file, name, fields, left_out):
            found = True
            yield document
    if not found:
        why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "they are empty" if files else "no files"
        raise CxrayError(f"{where}: the corpus has no text ({why}); it takes {', '.join(READERS)}, text in one of {', '.join(fields)}")


def _jsonl(file: Place, name: str, fields: Sequence[str], left_out: Counter[str]) -> Iterator[Document]:
    for number, line in _lines(file, left_out, pieces=False):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise CxrayError(f"{file}, line {number:,}: not JSON; correct the line, or take it out") from None
        if not isinstance(record, dict):
            raise CxrayError(f"{file}, line {number:,}: a record must be an object such as {{{fields[0]!r}: ...}}")
        yield from _of_record(record, name, number, fields, left_out)


def _parquet(file: Place, name: str, fields: Sequence[str], left_out: Counter[str]) -> Iterator[Document]:
    fs, path = file.arrow()
    number = 0
    with told(file):
        try:
            with fs.open_input_file(path) as source:
                table = pq.ParquetFile(source)
                columns = [c for c in (*fields, *OTHER_FIELDS) if c in table.schema_arrow.names]
                if not any(c in fields for c in columns):
                    raise CxrayError(f"{file}: no text column; one of {', '.join(fields)} is wanted (`text_fields` names others)")
                for batch in table.iter_batches(_ROWS, columns=columns):
                    for record in batch.to_pylist():
                        number += 1
                        yield from _of_record(record, name, number, fields, left_out)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise CxrayError(f"{file}: not a readable Parquet file, from row {number + 1:,} on; write it again") from error


def _of_record(record: Mapping[str, Any], name: str, number: int, fields: Sequence[str], left_out: Counter[str]) -> Iterator[Document]:
    text = next((record[f] for f in fields if record.get(f) is not None), None)
    if text is None:
        left_out["records without a text field"] += 1
    elif not isinstance(text, str):
        left_out["records whose text is no text"] += 1
    elif not (text := _storable(text)).strip():
        left_out["empty texts"] += 1
    else:
        given = {f: _storable(str(record[f])).strip() for f in OTHER_FIELDS if isinstance(record.get(f), str | int)}
        title = given.get("title", "")
        yield Document(
            given.get("id") or f"{name}:{number}", text, given.get("source") or name, given.get("topic") or title, title
        )  # fmt: skip


def _storable(text: str) -> str:
    """JSON may hold halves of characters, which no file of UTF-8 can."""
    return text.encode("utf-8", "replace").decode()


def _markdown(file: Place, name: str, fields: Sequence[str], left_out: Counter[str]) -> Iterator[Document]:
    return _pages(file, name, left_out, headings=True)


def _plain(file: Place, name: str, fields: Sequence[str], left_out: Counter[str]) -> Iterator[Document]:
    return _pages(file, name, left_out, headings=False)


def _pages(file: Place, name: str, left_out: Counter[str], headings: bool) -> Iterator[Document]:
    """Documents that end before a heading, or with a paragraph once they are long, or with a line where there are no paragraphs."""
    path: list[tuple[int, str]] = []
    page, start, length, fenced = list[str](), 1, 0, False

    def document() -> Iterator[Document]:
        if any(line.strip() for line in page):
            title = " > ".join(text for _, text in path)
            yield Document(f"{name}:{start}", "\n".join(page), name, title, title)

    for number, line in _lines(file, left_out, pieces=True):
        fenced ^= headings and bool(_FENCE.match(line))
        heading = _HEADING.match(line) if headings and not fenced else None
        if heading or length > 2 * PAGE_CHARACTERS or (length > PAGE_CHARACTERS and not line.strip()):
            yield from document()
            page, start, length = [], number, 0
        if heading:
            path = [(level, text) for level, text in path if level < len(heading[1])] + [(len(heading[1]), heading[2])]
        else:
            page.append(line)
            length += len(line)
    yield from document()


READERS = {".jsonl": _jsonl, ".md": _markdown, ".txt": _plain, ".parquet": _parquet}


def _lines(file: Place, left_out: Counter[str], pieces: bool) -> Iterator[tuple[int, str]]:
    """(number, line), with no more than a line of LINE_BYTES in memory. A longer one comes in pieces, cut at blanks, or is left out."""
    number, held, skipping = 1, b"", False
    with told(file), file.fs.open(file.path, "rb") as data:
        while block := bytes(data.read(_BLOCK)):  # pyright: ignore[reportArgumentType]
            *whole, held = (held + block).split(b"\n")
            for line in whole:
                if not skipping:
                    yield number, _text(line, file, number)
                number, skipping = number + 1, False
            if len(held) <= LINE_BYTES:
                continue
            if pieces:
                cut = held.rfind(b" ") + 1 or _character(held)
                yield number, _text(held[:cut], file, number)
                held = held[cut:]
            else:
                left_out["lines over 1 MB"] += not skipping
                held, skipping = b"", True
    if held and not skipping:
        yield number, _text(held, file, number)


def _character(held: bytes) -> int:
    """Where the last whole character of UTF-8 ends."""
    cut = len(held) - 1
    while cut > len(held) - 5 and held[cut] & 0b1100_0000 == 0b1000_0000:
        cut -= 1
    return cut


def _text(line: bytes, file: Place, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r").replace("\0", " ")
    except UnicodeDecodeError:
        raise CxrayError(f"{file}, line {number:,}: not UTF-8; save the file as UTF-8") from None


class Chunker:
    """Cuts documents to chunks of at most `limit` of the encoder's tokens, special ones counted.

    Chunks end at the end of a sentence where one ends in their second half, never within a word, and repeat at most `overlap` tokens of
    the one before, whole sentences where they fit. A chunk taken out of its document no longer says what it is about, so each begins
    with the title, or with the first sentence, of at most a quarter of its tokens (measured by benchmarks/knowledge.py).
    """

    def __init__(self, encoder: TextEncoder, limit: int, overlap: int) -> None:
        self.encoder, self.limit, self.overlap = encoder, limit, overlap
        self._special = int(encoder.count_tokens([""])[0])
        self._known: dict[str, int] = {}

    def __call__(self, document: Document) -> list[str]:
        words, ends = _words(document.text)
        title = _WORD.findall(document.title)
        if title and words[: len(title)] != title:
            title[-1] += ":"
        first = next((i for i, end in enumerate(ends) if end), len(words) - 1)
        lead = self._lead(title or words[: first + 1])
        limit = self.limit
        while True:
            chunks = self._cut(words, ends, lead, limit - self._special)
            # A tokeniser may count words together otherwise than one by one.
            over = int(self.encoder.count_tokens(chunks).max(initial=0)) - self.limit
            if over <= 0 or limit - over < self.limit // 2:
                return chunks
            limit -= over

    def _cut(self, words: list[str], ends: list[bool], lead: list[str], limit: int) -> list[str]:
        costs, lead_cost = self._costs(words), sum(self._costs(lead))
        chunks: list[str] = []
        start = done = 0  # done: the words before it stand in a chunk
        while done < len(words):
            if sum(costs[start : done + 1]) + lead_cost > limit:
                start = done  # what is repeated would leave no room for the next word
            head = [] if words[start : start + len(lead)] == lead else lead
            stop, full = start, lead_cost if head else 0
            while stop < len(words) and (full + costs[stop] <= limit or stop <= done):
                full += costs[stop]
                stop += 1
            if stop < len(words):
                half = max(done, (start + stop) // 2)
                stop = next((i for i in range(stop, half, -1) if ends[i - 1]), stop)
            chunks.append(" ".join([*head, *words[start:stop]]))
            done, start = stop, self._back(costs, ends, start, stop)
        return chunks

    def _back(self, costs: list[int], ends: list[bool], start: int, stop: int) -> int:
        """Where the chunk after the one from `start` to `stop` begins."""
        at, spent, sentence = stop, 0, None
        while at - 1 > start and spent + costs[at - 1] <= self.overlap:
            at -= 1
            spent += costs[at]
            if ends[at - 1]:
                sentence = at
        return at if sentence is None else sentence

    def _lead(self, words: list[str]) -> list[str]:
        spent, lead = 0, []
        for word, cost in zip(words, self._costs(words)):
            spent += cost
            if spent > self.limit // 4:
                break
            lead.append(word)
        return lead

    def _costs(self, words: list[str]) -> list[int]:
        new = [w for w in dict.fromkeys(words) if w not in self._known]
        if new:
            self._known.update(zip(new, (self.encoder.count_tokens(new) - self._special).tolist()))
        return [self._known[w] for w in words]


def _words(text: str) -> tuple[list[str], list[bool]]:
    """(words, whether a sentence, a paragraph or an item of a list ends with each)."""
    words, ends = list[str](), list[bool]()
    for paragraph in _PARAGRAPH.split(text):
        here = _WORD.findall(paragraph)
        words += here
        ends += [bool(_SENTENCE_END.search(a)) and not b[:1].islower() for a, b in pairwise(here)] + [True] * bool(here)
    return words, ends
