"""
What `make docs` adds to mkdocs. The README and the recipes' own pages are pages of the site as well: they stay where
they are, and every link is written as it holds in the repository; here it is turned into the site's. Docstrings are
written as transformers writes them; here they become Markdown.
"""

import ast
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "README.md",
    "C*.md",
    "SKILL.md",
    "CITATION.cff",
    "recipes/**/README.md",
    "recipes/**/*.png",
    "tests/*/README.md",
)
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#:\s]+)((?:#[^)]*)?\))")  # what has a colon leads elsewhere
NAME = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example):")
ENTRY = re.compile(r" {4}(?:([\w, ]+?)( \(.*?\))?|(\[?`[\w.]+`\]?)):\s*(.*)")


def on_files(files, config):
    for path in sorted({path for pattern in OUTSIDE for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, in_site(name), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    inside = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()
    here = posixpath.dirname(page.file.src_uri) or "."

    def link(match):
        target = posixpath.normpath(posixpath.join(inside, match[2]))
        return f"{match[1]}{posixpath.relpath(in_site(target), here)}{match[3]}"

    return LINK.sub(link, markdown)


def in_site(name: str) -> str:
    """Where a file of the repository stands in the site."""
    return "index.md" if name == "README.md" else name.removeprefix("docs/")


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg, **kwargs):
        public = [pkg[name] for name in pkg.exports or ()]
        for item in public:
            for one in item.members.values():
                if one.is_attribute and str(one.value).startswith("field("):  # of a config of PEFT's
                    one.value, one.docstring = default_and_help(one.value)
        names = {item.name for item in public}
        for item in everything(pkg):
            if item.docstring:
                item.docstring.value = as_markdown(item.docstring.value, names)


def everything(item):
    yield item
    for member in item.members.values():
        if not member.is_alias:
            yield from everything(member)


def default_and_help(value):
    """Of `field(default=.., metadata={"help": ..})`, both."""
    found = {key.arg: ast.literal_eval(key.value) for key in ast.parse(str(value), mode="eval").body.keywords}
    return repr(found["default"]), griffe.Docstring(found["metadata"]["help"])


def as_markdown(text: str, public: set[str]) -> str:
    lines, section = [], None
    for line in text.splitlines():
        if match := SECTION.fullmatch(line):
            section = match[1]
            lines += [f"**{section}**", ""]
        elif section and section != "Example" and (match := ENTRY.fullmatch(line)):
            names, kind, thrown, said = match.groups()
            named = thrown or ", ".join(f"`{name}`" for name in names.split(", ")) + (kind or "")
            lines.append(f"- {named}: {said}")
        else:
            inside = section and section != "Example" and line.strip()
            lines.append(f"    {line.strip()}" if inside else line)
    return NAME.sub(lambda m: f"[`{m[1]}`][lavin.{m[1]}]" if m[1] in public else f"`{m[1]}`", "\n".join(lines))
