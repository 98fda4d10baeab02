"""A page as its tests look at it: is it whole, does it load anything, what does it say?"""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "area", "base", "source", "wbr"}
LOADS = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background"}


class PageReader(HTMLParser):
    """Collects what a test asks of a page.

    Attributes:
        faults: elements that are not closed, or closed in another order.
        loads: what the page would load or lead to.
        ids: of elements.
        tags: names of all elements.
        tables: rows of cells of each table.
        text: all that is read, without styles.
    """

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in LOADS]
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if any(name.startswith("on") for name, _ in attrs):
            self.faults.append(f"<{tag}> runs a script")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:]}")
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "@import" not in data
            assert "url(" not in data
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def read_page(page: str) -> PageReader:
    """Read a page; check that it is whole, runs nothing and loads nothing."""
    reader = PageReader(page)
    assert reader.faults == []
    assert not {"script", "iframe", "object", "embed", "link", "img"} & {*reader.tags}
    assert [x for x in reader.loads if not x.startswith(("#", "data:image/png;base64,"))] == []
    assert len(reader.ids) == len({*reader.ids}), "two elements have the same id"
    assert len(page.encode()) < 2e6
    return reader
