"""Tables in Markdown, and the marked places of a text that they are written to."""

import re
from pathlib import Path

from datasets import write_atomic

BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def table(header: list[str], lines: list[list]) -> str:
    """A table in Markdown, without a newline at its end."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


def code(text: str) -> str:
    """The text as code; nothing stays nothing."""
    return f"`{text}`" if text else ""


def fill(text: str, tables: dict[str, str]) -> str:
    """The text with every block `<!-- table: NAME --> ... <!-- /table -->` made of tables[NAME].

    Raises:
        ValueError: a block has a name without a table, or no end.
    """

    def block(match: re.Match) -> str:
        start, name, _, end = match.groups()
        if name not in tables:
            raise ValueError(f"there is no table {name!r}, only {', '.join(tables)}.")
        return f"{start}{tables[name]}\n{end}"

    if len(BLOCK.findall(text)) != text.count("<!-- table: "):
        raise ValueError("a `<!-- table: NAME -->` has no `<!-- /table -->`, or text in its line.")
    return BLOCK.sub(block, text)


def fill_files(paths: list[Path], tables: dict[str, str]) -> list[Path]:
    """`fill` every file that exists, in place; returns those that changed.

    Raises:
        ValueError: as `fill`, with the file's name; then no file was written.
        OSError: a file cannot be read or written.
    """
    filled = {}
    for path in paths:
        if path.exists():
            text = path.read_text(encoding="utf-8")
            try:
                new = fill(text, tables)
            except ValueError as e:
                raise ValueError(f"{path}: {e}") from None
            if new != text:
                filled[path] = new
    for path, text in filled.items():
        write_atomic(path, text.encode())
    return list(filled)
