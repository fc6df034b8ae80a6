"""Hooks of the documentation's build (mkdocs.yml): options, packages, files outside docs/.

`commands.md` gets the options of every command from its parser, and `rooms.md` a heading for every
package of moodistill, so that neither is said twice.
"""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)\)")  # a link from docs/ to another folder


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a parser as Markdown: a table for each group."""
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if not shown:
            continue
        title = group.title or "options"
        yield f"\n**{title[0].upper()}{title[1:]}**\n\n| option | meaning |\n| --- | --- |"
        for action in shown:
            value = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
            name = ", ".join(action.option_strings)
            if not name:
                name, value = str(value), ""
            text = html.escape(action.help or "", quote=False).replace("|", "\\|")
            yield f"| `{f'{name} {value}'.strip()}` | {text} |"


def commands() -> str:
    """Every command of the program with its options."""
    from moodistill.cli.program import COMMANDS

    lines = []
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"moodistill {name}")
        command.add_arguments(parser)
        lines += [f"\n## moodistill {name}\n", f"{command.help[0].upper()}{command.help[1:]}.\n"]
        lines += ["```text", *(f"moodistill {name} {words}" for words in command.examples), "```"]
        lines += options(parser)
    return "\n".join(lines)


def rooms() -> str:
    """Every package and module of moodistill, for mkdocstrings; without what `api.md` shows."""
    public = re.findall(
        r"^::: ([\w.]+)\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    lines = []
    for path in sorted((ROOT / "moodistill").glob("*/__init__.py")):
        room = path.parent.name
        lines.append(f"\n## {room}\n\n::: moodistill.{room}\n    options:\n      members: false\n")
        lines.append("      show_root_heading: false\n")
        for module in sorted(path.parent.rglob("*.py")):
            if module.name in ("__init__.py", "__main__.py"):
                continue
            name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
            shown = [f"!^{member}$" for module_name, member in public if module_name == name]
            lines.append(f"\n::: {name}\n    options:\n      filters: {['!^_', *shown]}\n")
            lines.append("      show_root_full_path: true\n")
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put in what is made from the code; links that leave docs/ lead to copies."""
    markdown = markdown.replace(
        "<!-- commands -->", commands() if "<!-- commands" in markdown else ""
    )
    markdown = markdown.replace("<!-- rooms -->", rooms() if "<!-- rooms" in markdown else "")
    return OUTSIDE.sub(r"](outside/\1)", markdown)


def on_files(files: Any, config: Any) -> Any:
    """Copy the files outside docs/ that pages link to."""
    from mkdocs.structure.files import File

    found = set()
    for page in files.documentation_pages():
        found |= set(OUTSIDE.findall(Path(page.abs_src_path).read_text(encoding="utf-8")))
    for name in sorted(found):
        files.append(File.generated(config, f"outside/{name}", abs_src_path=str(ROOT / name)))
    return files
