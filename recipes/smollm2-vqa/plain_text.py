"""Writes data/plain-text.txt: English prose that every CPython 3.11 brings, chapters of its language reference."""

from pathlib import Path
from pydoc_data.topics import topics

CHAPTERS = 24


def main() -> None:
    path = Path("data/plain-text.txt")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(topics[name].strip() for name in sorted(topics)[:CHAPTERS]) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
