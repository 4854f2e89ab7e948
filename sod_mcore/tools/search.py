"""The `search` tool: ranks the documents of a local file. A stand-in for a real search engine.

It shows what a tool with data of its own looks like and lets a search task run without a network.
All documents lie in memory, so it suits thousands of them, not millions.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sod_mcore.config import ConfigError
from sod_mcore.tools.interface import ToolResult, ToolSchema, function_schema

_WORD = re.compile(r"\w+")
_DOTS = "..."
_MAX_QUERY_CHARACTERS = 1000
# Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009: usual values of k_1 and b.
_SATURATION = 1.2
_LENGTH_WEIGHT = 0.75


@dataclass(frozen=True)
class Document:
    """What can be found."""

    title: str
    text: str


def read_documents(path: Path) -> list[Document]:
    """The documents of a JSONL file of {"title", "text"}.

    Raises:
        ConfigError: the file cannot be used; the message names it and the line.
    """
    wrong = f"tools.search_documents = {str(path)!r}"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{wrong} cannot be read: {error}") from error
    documents = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            title, text = record["title"], record["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{wrong}, line {number}: give {{"title", "text"}}') from error
        if not (isinstance(title, str) and isinstance(text, str)):
            raise ConfigError(f"{wrong}, line {number}: title and text must be strings")
        documents.append(Document(title, text))
    if not documents:
        raise ConfigError(f"{wrong} holds no documents")
    return documents


class Index:
    """Ranks documents by Okapi BM25."""

    def __init__(self, documents: Sequence[Document]) -> None:
        """Count the words of each document, its title included."""
        self.documents = list(documents)
        self._lengths: list[int] = []
        self._occurrences: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for position, document in enumerate(self.documents):
            words = _words(f"{document.title} {document.text}")
            self._lengths.append(len(words))
            for word, count in Counter(words).items():
                self._occurrences[word].append((position, count))
        self._mean_length = max(1.0, sum(self._lengths) / max(1, len(self._lengths)))

    def search(self, query: str, count: int) -> list[Document]:
        """The best documents that hold a word of the query; of equals, the earlier one first."""
        scores: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(_words(query)):
            occurrences = self._occurrences.get(word, [])
            rest = len(self.documents) - len(occurrences)
            rarity = math.log(1 + (rest + 0.5) / (len(occurrences) + 0.5))
            for position, occurrence in occurrences:
                relative = self._lengths[position] / self._mean_length
                norm = _SATURATION * (1 - _LENGTH_WEIGHT + _LENGTH_WEIGHT * relative)
                scores[position] += rarity * occurrence * (_SATURATION + 1) / (occurrence + norm)
        best = sorted(scores, key=lambda position: (-scores[position], position))
        return [self.documents[position] for position in best[:count]]


def snippet(text: str, query: str, size: int) -> str:
    """At most `size` characters of `text`, and dots, from shortly before a word of the query."""
    wanted = set(_words(query))
    places = (word.start() for word in _WORD.finditer(text) if word[0].lower() in wanted)
    start = max(0, min(next(places, 0) - size // 4, len(text) - size))
    end = start + size
    cut = " ".join(text[start:end].split())
    return (_DOTS if start else "") + cut + (_DOTS if end < len(text) else "")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def search_schema() -> ToolSchema:
    """The schema of the tool, for those who only show it."""
    return function_schema(
        Search.name, "Searches a collection of documents.", {"query": "What to search for."}
    )


class Search:
    """The tool. It shows the matching parts of the best documents."""

    name = "search"

    def __init__(self, index: Index, *, count: int = 3, max_characters: int = 256) -> None:
        """Show at most `count` documents, which share `max_characters` equally."""
        self._index = index
        self._count = count
        self._max_characters = max_characters
        self._line_characters = max(1, max_characters // count - 1)

    @property
    def schema(self) -> ToolSchema:
        """The function schema as shown to the model."""
        return search_schema()

    async def call(self, arguments: Mapping[str, object]) -> ToolResult:
        """Search for `arguments["query"]`."""
        query = arguments.get("query")
        if not isinstance(query, str) or not query.strip():
            return ToolResult("Error: give one argument, `query`, a string.", succeeded=False)
        query = query[:_MAX_QUERY_CHARACTERS]
        found = self._index.search(query, self._count)
        if not found:
            return ToolResult("Nothing was found.", succeeded=True)
        lines = [self._line(number, document, query) for number, document in enumerate(found, 1)]
        return ToolResult("\n".join(lines)[: self._max_characters], succeeded=True)

    def _line(self, number: int, document: Document, query: str) -> str:
        heading = f"[{number}] {document.title}: "
        room = self._line_characters - len(heading) - 2 * len(_DOTS)
        return (heading + snippet(document.text, query, max(room, 0)))[: self._line_characters]
