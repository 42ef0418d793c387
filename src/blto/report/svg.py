"""Putting our own figures into a page: checked against what matplotlib writes, and with ids that cannot collide.

A figure comes from a file beside the record, so it is not believed: elements, attributes and styles that matplotlib
does not write for us are refused, and what is left is written anew.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from markupsafe import Markup, escape

from blto.errors import InputRefused
from blto.files.text import show

MAX_CHARACTERS = 20_000_000

_DROPPED = {"metadata", "style"}
_ELEMENTS = {"svg", "g", "defs", "clipPath", "path", "rect", "use", "image", "text", "tspan"}
_PLAIN = {"d", "height", "transform", "viewBox", "width", "x", "y"}
_STYLE = re.compile(r"[A-Za-z0-9#:;,.%()'\"\s-]*")
_REFERENCE = re.compile(r"url\(#([A-Za-z0-9_.-]+)\)")
_LOCAL = re.compile(r"#([A-Za-z0-9_.-]+)")
_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=\s]*")
_NUMBERS = re.compile(r"[-+.0-9eE\s]+")


def inline_svg(text: str, prefix: str, label: str) -> Markup:
    """A matplotlib SVG as an element of an HTML page, scaling with its box.

    Args:
        text: the file's content.
        prefix: put before every id, different for every figure of a page.
        label: what the figure shows, for those who do not see it.

    Raises:
        InputRefused: not an SVG, or holding anything but drawing: scripts, links, foreign content, references outside.
    """
    if len(text) > MAX_CHARACTERS or "<!ENTITY" in text:
        raise _refused(label, "it is over the limit of 20 MB or declares entities")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise _refused(label, f"it is not XML ({error})") from error
    box = root.get("viewBox", "")
    if _local_name(root.tag) != "svg" or not _NUMBERS.fullmatch(box):
        raise _refused(label, "it is not an SVG with a viewBox")
    inside = Markup("").join(_element(child, prefix, label) for child in root)
    # matplotlib sets these two for "*", which inside a page would mean the whole page
    head = Markup('<svg viewBox="{}" role="img" aria-label="{}" stroke-linejoin="round" stroke-linecap="butt">')
    return head.format(box, label) + inside + Markup("</svg>")


def _element(element: ElementTree.Element, prefix: str, label: str) -> Markup:
    name = _local_name(element.tag)
    if name in _DROPPED:
        return Markup("")
    if name not in _ELEMENTS:
        raise _refused(label, f"it holds <{name}>")
    attributes = "".join(
        f' {key}="{escape(_value(key, value, prefix, label))}"'
        for key, value in ((_local_name(key), value) for key, value in element.items())
    )
    inside = Markup("").join(_element(child, prefix, label) + escape(child.tail or "") for child in element)
    return Markup(f"<{name}{attributes}>") + escape(element.text or "") + inside + Markup(f"</{name}>")


def _value(key: str, value: str, prefix: str, label: str) -> str:
    """The value that an attribute may have in the page."""
    if key in _PLAIN:
        return value
    if key == "id":
        return prefix + value
    if key == "href" and (local := _LOCAL.fullmatch(value)):
        return f"#{prefix}{local[1]}"
    if key == "href" and _PNG.fullmatch(value):
        return value
    if key == "clip-path" and (reference := _REFERENCE.fullmatch(value)):
        return f"url(#{prefix}{reference[1]})"
    if key == "style" and _STYLE.fullmatch(value) and "url(" not in value.lower():
        return value
    raise _refused(label, f'it holds {key}="{show(value, 40)}"')


def _local_name(name: str) -> str:
    return name.rpartition("}")[2]


def _refused(label: str, reason: str) -> InputRefused:
    return InputRefused(f'figure "{show(label, 60)}": {show(reason)}, which blto never writes; draw it again.')
