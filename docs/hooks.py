"""For mkdocs: the documents also link to files of the repository, which are not on the site.

All but pictures, which become part of it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PICTURES = "benchmarks/results"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pictures."""
    root = Path(config["docs_dir"]).parent
    for path in (root / PICTURES).glob("*.png"):
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Name files outside of the documents instead of linking to them."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def name(link: re.Match[str]) -> str:
        is_picture, text, target = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return link[0]
        if is_picture:
            shown = posixpath.join("docs/pictures", posixpath.basename(path))
            return f"![{text}]({posixpath.relpath(shown, folder)})"
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return re.sub(r"(!?)\[([^]]+)\]\((\.\./[^)]+)\)", name, markdown)
