"""SVG pictures from strings: rectangles, lines, arrows and text on white, in drawing.py's colours.

All lengths are pixels, y points down. Numbers are rounded to 0.1, so that a picture is the same
file on every machine.
"""

from html import escape

FONT = "DejaVu Sans, Verdana, sans-serif"
INK = "#222222"
FAINT = "#e6e6e6"


def number(value: float) -> str:
    """A length as text, rounded to 0.1, without ".0" and without the sign of -0."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


def element(name: str, content: str = "", **attributes) -> str:
    """An element; in names of attributes _ stands for -, and numbers are lengths."""
    told = " ".join(
        f'{key.replace("_", "-")}="{value if isinstance(value, str) else number(value)}"'
        for key, value in attributes.items()
    )
    return f"<{name} {told}>{content}</{name}>" if content else f"<{name} {told}/>"


def rectangle(x, y, width, height, fill="white", **more) -> str:
    """A filled rectangle, without an outline unless `stroke` is given."""
    return element("rect", x=x, y=y, width=width, height=height, fill=fill, **more)


def line(x1, y1, x2, y2, colour=INK, width=1.0, **more) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, stroke_width=width, **more)


def turned(x, y, words: str, degrees: float, size=12.0, colour=INK, **more) -> str:
    """One line of text, turned counterclockwise about the place where it begins (or ends)."""
    turn = f"rotate({number(-degrees)} {number(x)} {number(y)})"
    return text(x, y, words, size, colour, transform=turn, **more)


def path(points, closed=False, **attributes) -> str:
    """A line through (x, y) points, or with `closed` the area that they bound."""
    steps = "L".join(f"{number(x)},{number(y)}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' * closed}", **attributes)


def text(x, y, words: str, size=12.0, colour=INK, anchor="start", **more) -> str:
    """One line of text. anchor: start, middle or end. y is the base line."""
    place = dict(x=x, y=y, font_size=size, fill=colour, text_anchor=anchor)
    return element("text", escape(words, quote=False), **place, **more)


def lines_of_text(x, y, lines, size=12.0, **more) -> str:
    """Several lines of text below one another, the first with its base line at y."""
    written = [text(x, y + 1.4 * size * i, lines[i], size, **more) for i in range(len(lines))]
    return "\n".join(written)


def arrow(x1, y1, x2, y2, colour=INK, width=1.5, **more) -> str:
    """A line that ends in a head."""
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    dx, dy = (x2 - x1) / length, (y2 - y1) / length
    back_x, back_y = x2 - 8 * dx, y2 - 8 * dy
    corners = (x2, y2), (back_x - 4 * dy, back_y + 4 * dx), (back_x + 4 * dy, back_y - 4 * dx)
    head = path(corners, closed=True, fill=colour)
    return line(x1, y1, back_x, back_y, colour, width, **more) + head


def box(x, y, width, height, lines, colour=INK, fill="white", size=12.0, **more) -> str:
    """A rounded box with a coloured outline and centred lines; the first one is bold."""
    outline = rectangle(x, y, width, height, fill, rx=6, stroke=colour, stroke_width=1.5, **more)
    first = y + height / 2 - 0.7 * size * (len(lines) - 1) + 0.36 * size
    bold, *others = lines
    middle = dict(anchor="middle")
    written = text(x + width / 2, first, bold, size, font_weight="bold", **middle)
    if others:
        written += "\n" + lines_of_text(x + width / 2, first + 1.4 * size, others, size, **middle)
    return f"{outline}\n{written}"


def document(width, height, about: str, title: str, parts) -> str:
    """A whole picture on white. about: how it was made, which a test reads."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    size = f'width="{width}" height="{height}" font-family="{FONT}">'
    described = f"<title>{escape(title)}</title>\n<desc>{escape(about)}</desc>"
    heading = text(16, 26, title, 14.5)
    body = [described, rectangle(0, 0, width, height), heading, *parts]
    return "\n".join([head + size, *body, "</svg>", ""])
