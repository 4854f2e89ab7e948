"""The search stub: its ranking against the published formula, its snippets, faulty files."""

import json
import math
from pathlib import Path

import pytest

from sod_mcore.config import ConfigError
from sod_mcore.tools import Search, Tool, ToolResult
from sod_mcore.tools.search import Document, Index, read_documents, snippet

DOCUMENTS = [
    Document("Paris", "Paris is the capital of France."),
    Document("Rome", "Rome is the capital of Italy. All roads lead to Rome."),
    Document("Rivers", "The Seine flows through Paris, the Tiber through Rome."),
    Document("Bread", "Flour, water and salt."),
]


def titles(query: str, count: int = 3) -> list[str]:
    return [document.title for document in Index(DOCUMENTS).search(query, count)]


def okapi(query: list[str], documents: list[list[str]]) -> list[float]:
    """BM25 written from its formula, over all documents."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            holders = sum(word in other for other in documents)
            idf = math.log((len(documents) - holders + 0.5) / (holders + 0.5) + 1)
            count = document.count(word)
            score += idf * count * 2.2 / (count + 1.2 * (1 - 0.75 + 0.75 * len(document) / mean))
        scores.append(score)
    return scores


def test_ranking_is_that_of_the_formula() -> None:
    words = [
        f"{d.title} {d.text}".lower().replace(".", "").replace(",", "").split() for d in DOCUMENTS
    ]
    for query in ("rome capital", "paris seine", "the capital of france", "salt"):
        scores = okapi(query.split(), words)
        expected = sorted((i for i in range(4) if scores[i] > 0), key=lambda i: -scores[i])
        assert titles(query, 4) == [DOCUMENTS[i].title for i in expected]


def test_search() -> None:
    assert titles("ROME?")[0] == "Rome"
    assert titles("salt") == ["Bread"]
    assert titles("rome paris", 1) != titles("rome paris", 2)
    assert titles("nothing like this") == []
    assert titles("") == []


def test_snippets_show_the_match() -> None:
    text = "x " * 500 + "needle " + "y " * 500
    cut = snippet(text, "a Needle", 40)
    assert "needle" in cut
    assert cut.startswith("...")
    assert cut.endswith("...")
    assert len(cut) <= 46
    assert snippet("short text", "text", 40) == "short text"
    assert snippet("tail needle", "needle", 8) == "...l needle"


@pytest.mark.asyncio
class TestCall:
    async def test_result(self) -> None:
        tool: Tool = Search(Index(DOCUMENTS), max_characters=1000)
        result = await tool.call({"query": "capital of Italy"})
        assert result.succeeded
        lines = result.text.splitlines()
        assert lines[0] == "[1] Rome: Rome is the capital of Italy. All roads lead to Rome."
        assert lines[1].startswith("[2] Paris: ")

    async def test_length_is_bounded(self) -> None:
        documents = [Document("t" * 30 * i, "word " * 1000) for i in range(5)]
        for size in range(1, 6):
            result = await Search(Index(documents), max_characters=size).call({"query": "word"})
            assert len(result.text) <= size
        for size in (30, 256, 2000):
            result = await Search(Index(documents), max_characters=size).call({"query": "word"})
            assert len(result.text) <= size
            assert len(result.text.splitlines()) == 3

    async def test_nothing_and_wrong_arguments(self) -> None:
        tool = Search(Index(DOCUMENTS))
        assert await tool.call({"query": "zzz"}) == ToolResult("Nothing was found.", True)
        for arguments in ({}, {"query": 3}, {"query": " "}):
            result = await tool.call(arguments)
            assert not result.succeeded
            assert "`query`" in result.text


class TestFile:
    def test_read(self, tmp_path: Path) -> None:
        path = tmp_path / "documents.jsonl"
        # U+2028 ends a line for str.splitlines, and not for JSONL.
        records = [{"title": "A", "text": "one\u2028two"}, {"title": "B", "text": "", "more": 1}]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n\n".join(lines) + "\n")
        assert read_documents(path) == [Document("A", "one\u2028two"), Document("B", "")]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"title": "A", "text": "a"}\n{"title": "B"}\n', "line 2: give"),
            (b"not json\n", "line 1: give"),
            (b'["title", "text"]\n', "line 1: give"),
            (b'{"title": "A", "text": 5}\n', "line 1: title and text must be strings"),
            (b"\n", "holds no documents"),
            (b"\xff\xfe", "cannot be read"),
            (None, "cannot be read.*No such file"),
        ],
    )
    def test_faults(self, tmp_path: Path, content: bytes | None, message: str) -> None:
        path = tmp_path / "documents.jsonl"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as error:
            read_documents(path)
        assert str(error.value).startswith(f"tools.search_documents = '{path}'")
