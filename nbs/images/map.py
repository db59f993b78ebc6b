"""Draw the maps at the top of the notebooks: the five networks, the part at hand lit. Run: python nbs/images/map.py"""

from pathlib import Path

BOXES = {  # key: x, y, width, name, what it is
    "data": (24, 26, 86, "image", "a glimpse at l"),
    "F": (186, 26, 112, "F", "glimpse features"),
    "R": (390, 26, 100, "R", "recurrence"),
    "C": (590, 26, 100, "C", "classifier"),
    "S": (390, 124, 100, "S", "encoder + flow"),
    "D": (266, 124, 88, "D", "decoder"),
    "EIG": (138, 124, 92, "EIG", "of each place"),
    "location": (24, 124, 86, "l", "next location"),
}
ARROWS = [  # path, label, x and y of the label
    ("M110 50H182", "glimpse, l", 146, 43),
    ("M298 50H386", "features f", 342, 43),
    ("M490 50H586", "state h", 538, 43),
    ("M690 50H736", "p(y|h)", 714, 43),
    ("M440 74V120", "h", 449, 101),
    ("M390 148H358", "z", 373, 141),
    ("M266 148H234", "f\u0303", 250, 141),
    ("M138 148H114", "", 0, 0),
    ("M67 124V78", "look there", 105, 104),
]
MAPS = {  # file: parts lit, caption
    "data": ({"data"}, "Where it starts: images.|All else sees them in glimpses."),
    "F": ({"F"}, "F turns a glimpse and its|location into features f."),
    "R": ({"R", "C"}, "R remembers what was seen, in h.|C says what that makes of the class."),
    "S": ({"S"}, "S draws a latent z: one guess|at all that is still unseen."),
    "vae": ({"S", "D"}, "S and D, the Partial VAE: imagine|the features of places unseen."),
    "model": ({"F", "R", "C", "S", "D"}, "All five networks together:|one model, one configuration."),
    "policy": ({"EIG", "location"}, "The policy: look next where most|is to be learnt about the class."),
    "training": (set(), "Three phases: first F, R, C;|then S, D; then all five."),
    "plain": (set(), "Look, remember, imagine,|choose, and look again."),
}
STYLES = {  # fill, outline, text, small text
    "pale": ("#f7f6fa", "#b8b3c6", "#3d3a47", "#6d6978"),
    "lit": ("#440154", "#440154", "#ffffff", "#e4d6ea"),
    "thin": ("#f0e6f4", "#440154", "#440154", "#6a3a78"),
}


def draw(lit: set[str], caption: str, thin: bool) -> str:
    """One map as SVG text; `thin` outlines the five networks without filling them."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="190" viewBox="0 0 760 190" role="img" '
        'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
        f"<title>The five networks. {caption.replace('|', ' ')}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#77727f"/></marker></defs>',
        '<rect x="1" y="1" width="758" height="188" rx="12" fill="#ffffff" stroke="#dcd9e3"/>',
    ]
    for path, label, x, y in ARROWS:
        parts.append(f'<path d="{path}" fill="none" stroke="#77727f" stroke-width="1.5" marker-end="url(#tip)"/>')
        parts.append(f'<text x="{x}" y="{y}" font-size="12" font-style="italic" fill="#57535f">{label}</text>')
    for key, (x, y, width, name, what) in BOXES.items():
        style = "lit" if key in lit else "thin" if thin and key in "FRCSD" else "pale"
        fill, outline, text, small = STYLES[style]
        middle, slant = x + width / 2, ' font-style="italic"' if name == "l" else ""
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="48" rx="8" fill="{fill}" stroke="{outline}"/>')
        parts.append(
            f'<text x="{middle}" y="{y + 22}" font-size="17" font-weight="bold"{slant} fill="{text}">{name}</text>'
        )
        parts.append(f'<text x="{middle}" y="{y + 38}" font-size="11.5" fill="{small}">{what}</text>')
    for number, line in enumerate(caption.split("|")):
        parts.append(
            f'<text x="520" y="{144 + 20 * number}" font-size="13" text-anchor="start" fill="#440154">{line}</text>'
        )
    return "\n".join([part for part in parts if not part.endswith("></text>")] + ["</svg>", ""])


if __name__ == "__main__":
    for file, (lit, caption) in MAPS.items():
        text = draw(lit, caption, thin=file == "training")
        Path(__file__).with_name(f"map_{file}.svg").write_text(text, encoding="utf-8")
