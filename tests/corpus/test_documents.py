"""Documents -> records, by markitdown: a title, the text, tables with their rows; whatever else they hold stays out."""

import zipfile
from pathlib import Path

import pytest

from base.cli import UserError
from corpus.files import find_files, read_batches
from corpus.records import text_of

pytestmark = pytest.mark.extra
FREE = "0000000000 65535 f \n"  # the first entry of a PDF cross-reference table
QUIET = "It was quiet, and the gate stood open."
WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml"


def zipped(path: Path, files: dict[str, str]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def relations(kind: str, target: str) -> str:
    return (
        f'<Relationships xmlns="{PACKAGE}/relationships">'
        f'<Relationship Id="r1" Type="{OFFICE}/{kind}" Target="{target}"/></Relationships>'
    )


def write_docx(path: Path):
    def paragraph(text: str, style: str = "Normal") -> str:
        return f'<w:p><w:pPr><w:pStyle w:val="{style}"/></w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>'

    rows = [("Plant", "Height"), ("Oak", "20 m")]
    cells = ["".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in row) for row in rows]
    table = "<w:tbl>" + "".join(f"<w:tr>{row}</w:tr>" for row in cells) + "</w:tbl>"
    body = paragraph("The garden", "Heading1") + paragraph(QUIET) + table
    heading = '<w:style w:type="paragraph" w:styleId="Heading1"><w:name w:val="heading 1"/></w:style>'
    types = "".join(
        f'<Override PartName="/word/{name}.xml" ContentType="{TYPE}.{kind}+xml"/>'
        for name, kind in (("document", "document.main"), ("styles", "styles"))
    )
    relationships = "application/vnd.openxmlformats-package.relationships+xml"
    default = f'<Default Extension="rels" ContentType="{relationships}"/>'
    files = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">{default}{types}</Types>',
        "_rels/.rels": relations("officeDocument", "word/document.xml"),
        "word/_rels/document.xml.rels": relations("styles", "styles.xml"),
        "word/document.xml": f"<w:document {WORD}><w:body>{body}</w:body></w:document>",
        "word/styles.xml": f"<w:styles {WORD}>{heading}</w:styles>",
    }
    zipped(path, files)


def write_pdf(path: Path):
    text = f"BT /F1 18 Tf 72 720 Td (The garden) Tj 0 -30 Td /F1 12 Tf ({QUIET}) Tj ET"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        f"<</Length {len(text)}>>\nstream\n{text}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, offsets = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    end = f"xref\n0 {size}\n{FREE}{table}trailer<</Size {size}/Root 1 0 R>>\nstartxref\n{len(out)}\n%%EOF"
    path.write_text(out + end)


def write_html(path: Path):
    rows = "<tr><th>Plant</th><th>Height</th></tr><tr><td>Oak</td><td>20 m</td></tr>"
    head = "<head><title>The garden</title><style>p{}</style><script>x()</script></head>"
    picture = '<img src="data:image/png;base64,AAAA">'
    body = f"<body><h1>A day</h1><p>{QUIET}</p>{picture}<table>{rows}</table></body>"
    path.write_text(f"<!DOCTYPE html><html>{head}{body}</html>")


def write_epub(path: Path):
    container = "urn:oasis:names:tc:opendocument:xmlns:container"
    root = '<rootfile full-path="c.opf" media-type="application/oebps-package+xml"/>'
    meta = '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>The garden</dc:title></metadata>'
    items = '<manifest><item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest>'
    spine = '<spine><itemref idref="a"/></spine>'
    files = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": f'<container xmlns="{container}"><rootfiles>{root}</rootfiles></container>',
        "c.opf": f'<package xmlns="http://www.idpf.org/2007/opf" version="3.0">{meta}{items}{spine}</package>',
        "a.xhtml": f'<html xmlns="http://www.w3.org/1999/xhtml"><body><h1>One</h1><p>{QUIET}</p></body></html>',
    }
    zipped(path, files)


WRITERS = {"a.docx": write_docx, "a.pdf": write_pdf, "a.html": write_html, "a.epub": write_epub}


@pytest.mark.parametrize("name", WRITERS)
def test_a_document_is_a_record_with_its_title(name, tmp_path):
    WRITERS[name](tmp_path / name)
    (batch,) = read_batches(find_files([tmp_path]), "text")
    [(_, record)] = batch.records
    text = text_of(record, "text")
    assert QUIET in text
    assert "The garden" in text
    assert record["title"] == ("a" if name == "a.pdf" else "The garden")
    assert not set(text) & set("<>{}")
    assert "base64" not in text
    if name in ("a.docx", "a.html"):
        assert "| Plant | Height |" in text
        assert "| Oak | 20 m |" in text


def test_a_document_that_is_not_what_its_name_says_is_one_line(tmp_path):
    for name in ("a.docx", "a.pdf", "a.epub"):
        (tmp_path / name).write_bytes(b"no document")
        with pytest.raises(UserError, match=f"{name}: it is not a .{name[2:]} document"):
            list(read_batches([tmp_path / name], "text"))
    zipped(tmp_path / "b.docx", {"word/document.xml": "<w"})
    with pytest.raises(UserError, match="b.docx: cannot be converted to text .*repair it, or remove it"):
        list(read_batches([tmp_path / "b.docx"], "text"))
