"""Build hooks of the documentation site: the file map, the API pages, and files from outside docs/."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmalign"
FILE_MAP = "<!-- file map -->"  # the table of all modules takes its place
PAGES = {  # pages that live outside docs/
    "contributing.md": "CONTRIBUTING.md",
    "bundled_models.md": "models/README.md",
    "table_text_to_image.md": "assets/comparison_text_to_image.md",
    "table_vision_language.md": "assets/comparison_vision_language.md",
}
LINK = re.compile(r'(?<=\]\()([^)\s#]+)|(?<=src=")([^"]+)')


def on_files(files: Files, config: Any) -> Files:
    """Add pages that live elsewhere, one API page for each package, and files that pages link to."""
    for uri, source in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    pages = dict(_api_pages())
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    config.nav.append({"API": [{Path(uri).stem: uri} for uri in pages]})
    for page in files.documentation_pages():
        for path in _outside_links(page.src_uri, page.content_string):
            if (ROOT / path).is_file() and files.get_file_from_path(f"files/{path}") is None:
                files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in the file map, and lead links out of docs/ to their copies in the site."""
    uri = page.file.src_uri

    def led(link: re.Match[str]) -> str:
        return _site_link(uri, link[0])

    return LINK.sub(led, markdown.replace(FILE_MAP, "\n".join(file_map())))


def file_map() -> Iterator[str]:
    """Yield the lines of a table for each package: its modules, each with the first sentence of its docstring."""
    for folder in _packages():
        name = folder.relative_to(ROOT).as_posix()
        yield from ("", f"**`{name}/`** {first_line(folder / '__init__.py')}", "", "| file | content |", "|---|---|")
        for file in sorted(folder.glob("*.py")):
            if file.name != "__init__.py":
                yield f"| `{file.name}` | {first_line(file)} |"


def first_line(file: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _packages() -> list[Path]:
    return [PACKAGE, *sorted(file.parent for file in PACKAGE.rglob("*/__init__.py"))]


def _api_pages() -> Iterator[tuple[str, str]]:
    """Yield the address and the content of each package's page."""
    for folder in _packages():
        name = ".".join(folder.relative_to(ROOT).parts)
        modules = [f"{name}.{file.stem}" for file in sorted(folder.glob("*.py")) if not file.stem.startswith("_")]
        directives = [f"::: {module}\n" for module in (name, *modules)]
        yield f"api/{name}.md", f"# `{name}`\n\n" + "\n".join(directives)


def _outside_links(uri: str, markdown: str) -> Iterator[str]:
    """Yield the repository paths outside docs/ that a page links to, except for other pages."""
    for link in LINK.finditer(markdown):
        path = _repository_path(uri, link[0])
        if path is not None and not path.startswith("docs/") and path not in ("README.md", *PAGES.values()):
            yield path


def _repository_path(uri: str, link: str) -> str | None:
    """Return the path that a page's link means, from the repository's root; None for a web address."""
    if "://" in link or link.startswith("#"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(PAGES.get(uri, f"docs/{uri}")), link))


def _site_link(uri: str, link: str) -> str:
    """Return a link as it must be in the site."""
    path = _repository_path(uri, link)
    if path is None:
        return link
    addresses = {"README.md": "index.md", **{source: address for address, source in PAGES.items()}}
    target = addresses.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")
    return posixpath.relpath(target, posixpath.dirname(uri) or ".")
