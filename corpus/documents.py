"""Office documents, PDF, HTML and EPUB -> one record each, by markitdown, which is an optional package."""

import re
from pathlib import Path

from base.cli import UserError, import_extra, one_line

DOCUMENTS = {".docx": b"PK", ".pdf": b"%PDF", ".html": b"", ".htm": b"", ".epub": b"PK"}  # how their bytes begin
REQUIREMENTS = "pip install -r requirements/documents.txt -c constraints.txt"


def read_document(path: Path, text_field: str) -> dict:
    """The record {"title", text_field} of a document: its text as Markdown, in which tables keep their rows.

    UserError if the package is missing or the document cannot be converted.
    """
    markitdown = import_extra("markitdown", "requirements/documents.txt")
    try:
        result = markitdown.MarkItDown(enable_plugins=False).convert_local(str(path))
    except Exception as error:  # each converter raises its own
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{path}: cannot be converted to text ({one_line(error)}): repair it, or remove it") from None
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", result.text_content).strip()  # pictures
    heading = re.search(r"^#+ +(.+)$", text, re.MULTILINE)
    title = (result.title or "").strip() or (heading[1].strip() if heading else path.stem)
    if result.title and title not in text[:1000]:
        text = f"# {title}\n\n{text}"
    return {"title": title, text_field: text}
