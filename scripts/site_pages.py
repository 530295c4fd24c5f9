"""Pages of the site that are not in docs/: README and its like, and the API from the docstrings.

mkdocs calls the two hooks (mkdocs.yml). Links in the pages are those of the repository, where they work too;
here they are changed to the site's names.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "cluster/README.md": "cluster.md",
}
FACE = (
    *("Config", "JebmError", "Pretrained", "Report", "Result"),
    *("fit", "from_pretrained", "load_config", "override"),
)
ROOMS = ("config", "core", "evaluate", "store", "train")
LINK = re.compile(r"(!?\[[^\]]*\])\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def modules(room: str) -> list[str]:
    """Return the dotted names of a package's public modules, the package first if it defines something."""
    folder = ROOT / "platform" / "jebm" / room
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    package = [f"jebm.{room}"] if "def " in (folder / "__init__.py").read_text("utf-8") else []
    return package + [f"jebm.{room}.{name}" for name in names]


def api_pages() -> dict[str, str]:
    """Return the Markdown of each API page: a heading, and one directive a module."""
    pages = {"api/jebm.md": "# jebm\n\n" + "\n\n".join(f"::: jebm.{name}" for name in FACE)}
    for room in ROOMS:
        directives = "\n\n".join(f"::: {module}" for module in modules(room))
        pages[f"api/{room}.md"] = f"# jebm.{room}\n\n{directives}"
    return pages


def with_site_links(markdown: str, folder: str) -> str:
    """Return a page of `folder` with links by the site's names; those to source files become text."""

    def renamed(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        target = (ROOT / folder / link).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]  # mkdocs reports it
        name = target.relative_to(ROOT).as_posix()
        if name in PAGES or name.startswith("docs/"):
            return f"{text}({PAGES.get(name, name.removeprefix('docs/'))}{anchor or ''})"
        return text.removeprefix("[").removesuffix("]")

    return LINK.sub(renamed, markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    texts = {
        page: with_site_links((ROOT / source).read_text("utf-8"), str(Path(source).parent))
        for source, page in PAGES.items()
    }
    for page, text in (texts | api_pages()).items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Rewrite the links of the pages in docs/."""
    made_here = page.file.generated_by is not None
    return markdown if made_here else with_site_links(markdown, "docs")
