"""For mkdocs: the documents also link to files of the repository, which are not on the site."""

from __future__ import annotations

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Name files outside of the documents instead of linking to them."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def name(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return link[0]
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return re.sub(r"\[([^]]+)\]\((\.\./[^)]+)\)", name, markdown)
