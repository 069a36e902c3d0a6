"""What a page of HTML holds, for tests."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Every tag, every address that a browser would load, and all text of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "srcset", "data-src") + (("href",) if tag in ("link", "a") else ())
        self.loaded += [value for name, value in attrs if name in names and value and not value.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text += data
