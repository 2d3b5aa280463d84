#!/usr/bin/env python
"""
Find phrases that the project's prose avoids, in pages, docstrings, comments and messages; or print random sentences.

    python scripts/check_english.py [FILE_OR_FOLDER ...]      exit code 1 if a phrase is found
    python scripts/check_english.py --draw 30 --seed 7        thirty random sentences, with file and line

Code is not checked: fenced blocks and `backticks` in pages, docstrings and comments are skipped.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ("README.md", "CONTRIBUTING.md", "docs", "recipes", "src", "scripts", "tests", "Makefile")

# Pattern of a phrase to avoid (a space also matches a line break) -> what to write instead.
PHRASES: dict[str, str] = {
    r"a number that is none|(?:is|are|was|were|being|makes?) no numbers?": "NaN or Inf",
    r"anew": "again, from scratch; or name the action: restart, rebuild",
    r"nobody|somebody|anybody|no-one": "name who: no process, a user, another program",
    r"so many": "this many; or give the number: every N steps",
    r"of what": "name the noun",
    r"that which": "name the noun",
    r"(?:with )?what would do": "with a suggested fix",
    r"what (?:it|they) (?:is|are|was|were)": "name the noun",
    r"(?<!there\x20)(?:is|are|was|were) no (?!longer|more|less|better|worse|different|such|other than)": "is not a; has no",
    r"(?:is|are|was|were|be) borne": "is tolerated",
    r"of (?:itself|themselves)": "omit it, or name the noun",
    r"(?:go|goes|going|gone|went) on(?! (?:a|an|the|each|every|one|its|this|that|disk)\b)": "continue, resume",
    r"(?:leave|leaves|leaving|left) (?:it |them |this |that )?out": "skip, omit",
    r"makes? of": "name the action",
    r"(?:come|comes|coming|came) to": "reach, total, become",
    r"(?<!long\x20)as (?:it|they) (?:is|are|was|were)(?=[.,;:)]|$|\s+(?:and|or|in|on|with)\b)": "unchanged",
    r"lies|lain": "is",
    r"stands|stood(?! for)": "is, remains",
    r"(?:is|are|was|were|be|been) said|(?<!\w)said (?:so|once|of)": "report, print, state",
    r"for want of": "for lack of, without",
    r"Raises? (?:\S+ ){1,4}where|(?:None|True|False|null|nothing|0) where": "if",
    r"where (?:there (?:is|are|was|were)|(?:no|nothing|none|neither|one)\b(?! (?:else|of)\b)|(?:it|they) (?:is|are|was|were) (?:not|no|none|set|given|known|"
    r"there|so|one|this|that|something)|(?:this|that) (?:is|was|has|can|cannot))": "if, when",
    r"whether (?:it|they|this|that) (?:is|are|was) so": "whether",
    r"beforehand": "before, first",
    r"aside(?! from)": "separately, in the background, to a temporary name",
    r"asunder|thereof|thereby|therein|wherein|whereof": "plain words",
    r"without a word": "silently",
    r"refus(?:e|es|ed|ing|als?)": "reject",
    r"for ever": "forever, permanently",
    r"has (?:come|gone) (?:round|so far|that far)": "plain words",
    r"the very": "the same",
    r"keeps? (?:those|that) of": "keep every Nth",
    r"busy so": "plain words",
    r"is nothing to it": "cannot process",
    r"cannot hold together|can hold together": "incompatible",
}
# Accepted phrases: (end of the file's path, pattern of the text around the phrase, reason).
ALLOWED: list[tuple[str, str, str]] = [
    ("", r"[Cc]onnection refused|ECONNREFUSED|refused (?:the )?connection", "the system's own words"),
    ("", r"come to rest|comes to mind", "an idiom"),
    ("scripts/check_english.py", r"", "the list itself"),
    ("tests/docs/test_english.py", r"", "tries the list"),
]
_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"``.+?``|`[^`]+`|<!--.*?-->|\]\([^)]*\)|https?://\S+", re.DOTALL)
_INDENTED = re.compile(r"^ {4,}\S.*$", re.MULTILINE)


@dataclass(frozen=True)
class Text:
    """A piece of prose: where it starts, and its kind: page, docstring, comment or message."""

    path: Path
    line: int
    kind: str
    words: str

    @property
    def prose(self) -> str:
        """The words, with each character of code replaced by one that matches no pattern."""
        found = self.words
        if self.kind == "page":
            found = _FENCE.sub(_blank, found)
            found = _INDENTED.sub(_blank, found)
        return _CODE.sub(_blank, found)

    def line_at(self, position: int) -> int:
        return self.line + self.words.count("\n", 0, position)


def _blank(found: re.Match[str]) -> str:
    return "".join("\n" if c == "\n" else "\N{MIDDLE DOT}" for c in found[0])


def files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        inside = [place] if place.is_file() else sorted(place.rglob("*"))
        yield from (f for f in inside if f.suffix in (".md", ".py", ".yaml", ".sh") or f.name == "Makefile")


def texts(path: Path) -> Iterator[Text]:
    """Yield the prose of a file."""
    source = path.read_text(encoding="utf-8")
    match path.suffix:
        case ".md":
            yield Text(path, 1, "page", source)
        case ".py":
            yield from _strings(path, ast.parse(source))
            yield from _comments(path, source)
        case _:
            for number, line in enumerate(source.splitlines(), 1):
                if line.lstrip().startswith("# "):
                    yield Text(path, number, "comment", line)


def _strings(path: Path, tree: ast.AST) -> Iterator[Text]:
    """Yield docstrings, and strings of three words or more; the parts of an f-string count as one string."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                inside.add(id(first.value))
                yield Text(path, first.lineno, "docstring", first.value.value)
        elif isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in ast.walk(node) if isinstance(part, ast.Constant)}
            parts = [str(p.value) if isinstance(p, ast.Constant) else "\N{MIDDLE DOT}" for p in node.values]
            yield from _message(path, node.lineno, "".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield from _message(path, node.lineno, node.value)


def _message(path: Path, line: int, words: str) -> Iterator[Text]:
    if len(re.findall(r"\b[A-Za-z]{2,}\b", words)) >= 3 and " " in words.strip():
        yield Text(path, line, "message", words)


def _comments(path: Path, source: str) -> Iterator[Text]:
    """Yield comments; those on neighboring lines form one block."""
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or re.match(r"#\s*(type:|noqa|fmt:|!)", token.string):
            continue
        row = token.start[0]
        if row != last + 1 and block:
            yield Text(path, start, "comment", "\n".join(block))
            block = []
        start = start if block else row
        block.append(token.string.lstrip("#").strip())
        last = row
    if block:
        yield Text(path, start, "comment", "\n".join(block))


def findings(found: Sequence[Text]) -> Iterator[tuple[Text, int, str, str]]:
    """Yield (text, line, phrase, what to write instead)."""
    patterns = {
        re.compile(rf"\b(?:{p})".replace(" ", r"\s+") + r"\b", re.IGNORECASE): instead for p, instead in PHRASES.items()
    }
    for text in found:
        prose = text.prose
        for pattern, instead in patterns.items():
            for match in pattern.finditer(prose):
                around = prose[max(0, match.start() - 60) : match.end() + 60]
                if not any(text.path.as_posix().endswith(end) and re.search(p, around) for end, p, _ in ALLOWED):
                    yield text, text.line_at(match.start()), " ".join(match[0].split()), instead


def sentences(found: Sequence[Text]) -> list[tuple[Text, int, str]]:
    """Return (text, line, sentence) of each sentence of four words or more in pages, docstrings, and messages outside tests."""
    drawn = []
    for text in found:
        if text.kind == "comment" or (text.kind == "message" and "tests" in text.path.parts):
            continue
        words = _FENCE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text.words) if text.kind == "page" else text.words
        for match in re.finditer(r"(?:[^.!?|\n]|[.!?](?!\s)|\n(?!\s*\n|\s*[-#|>]))+[.!?]?", words):
            sentence = " ".join(match[0].replace("**", "").strip(" -#>\n").split())
            whole = text.kind == "message" or sentence.endswith((".", "!", "?"))  # else a cell, a heading or a command
            if whole and len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 4:
                at = match.start() + len(match[0]) - len(match[0].lstrip())
                drawn.append((text, text.line_at(at), sentence))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "places", nargs="*", type=Path, metavar="FILE_OR_FOLDER", help="files and folders to check (default: all)"
    )
    parser.add_argument("--draw", type=int, metavar="N", help="print N random sentences instead of checking")
    parser.add_argument("--seed", type=int, default=0, help="random seed of --draw")
    args = parser.parse_args()
    places = [p.resolve() for p in args.places] or [ROOT / p for p in PLACES]
    found = [text for path in files(places) for text in texts(path)]
    if args.draw:
        for text, line, sentence in random.Random(args.seed).sample(sentences(found), args.draw):
            print(f"{text.path.relative_to(ROOT)}:{line}: [{text.kind}] {sentence}")
        return
    folders: Counter[str] = Counter()
    for text, line, phrase, instead in findings(found):
        path = text.path.relative_to(ROOT) if text.path.is_relative_to(ROOT) else text.path
        print(f"{path}:{line}: {phrase!r}: {instead}")
        folders["/".join(path.parts[:3] if path.parts[0] == "src" else path.parts[:1])] += 1
    if folders:
        print(f"\n{folders.total()} phrases:", ", ".join(f"{name} {n}" for name, n in sorted(folders.items())))
    sys.exit(bool(folders))


if __name__ == "__main__":
    main()
