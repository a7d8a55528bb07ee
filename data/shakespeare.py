"""Shakespeare's plays: converts a Markdown edition to plain text, one document per scene.

The source is a Markdown edition of 38 plays (see `download.py`). The output is plain play text:

    ACT I. SCENE I. Elsinore. A platform before the castle.

    [FRANCISCO at his post. Enter to him BERNARDO]

    BERNARDO:
    Who's there?

The heading is act, scene and place. `SPEAKER:` is on a separate line above the speech, stage directions are in
brackets, and a blank line ends a speech (a speech interrupted by a direction continues without a new name). No markup
is left, and every character is ASCII. There are three steps:

1. Corrections of the source: RULES fix recurring errors, such as names split in two or joined to the speech. TYPOS
   lists errors that occur once.
2. The Markdown is split at blank lines into *blocks*: headings, speeches (starting with a bold name) and others.
3. Stage directions, written as `_..._`, `_\\[...]_`, `*[...]*` or `*...*`, some over several lines, become `[...]`.
"""

import re
from collections.abc import Iterator

RULES = (
    # A speaker's name split in two, with the first half as the last line of the preceding speech.
    (r"\n(BISHOP|CARDINAL|COUNTESS|RICHARD|LADY|Ghosts?|Varro's|DON ADRIANO DE)\n+\*\*", r"\n\n**\1 "),
    # A speaker's name joined to the first line of the speech.
    (
        r"\n(Lord Chief-Justice|(?:First |Second |Third )?Serving-[Mm][ae]n|ALL SERVING-MEN|Master-Gunner|Master's-Mate"
        r"|(?:Varro's|Isidore's|Lucilius') Servants?|Senators(?=, & C)|Old Lady|Jeweller|ANTONIO|CASSIO)"
        r"(?:, & C|:)? (?=['A-Z])",
        r"\n\n**\1**\n",
    ),
    (r"\n+(?=\*\*)", r"\n\n"),
    # The play's title, repeated at the top of a page; and headings without markup.
    (r"\n(?:LOVE'S LABOURS LOST|CYMBELINE)\n", r"\n"),
    (r"\n(EPILOGUE|SCENE II?)\b[: ]*(.*)\s*\n", r"\n\n### \1. \2\n\n"),
    # A heading that continues in the next block, which is neither direction nor speech nor heading.
    (r"\n(#+ SCENE [^\n]*)\n\n(?=[^_*#\n\\])((?:.+\n)+)", lambda match: f"\n{match[1]} {' '.join(match[2].split())}\n"),
)

TYPOS = (
    ("as-you-like-it", "C ourage", "Courage"),
    ("as-you-like-it", "me m a most", "me in a most"),
    ("much-ado-about-nothing", "hi s glory", "his glory"),
    ("the-comedy-of-errors", "Ill d eeds", "Ill deeds"),
    (
        "the-comedy-of-errors",
        "**ANTIPHOLUS**  \nDo you hear, you minion? you'll let us in, I hope?  \nOF EPHESUS",
        "**ANTIPHOLUS OF EPHESUS**\nDo you hear, you minion? you'll let us in, I hope?",
    ),
    ("the-merry-wives-of-windsor", "**SHALLOW & PAGE & & C**", "**SHALLOW & PAGE**"),
    ("twelfth-night", "stocking s,", "stockings,"),
    ("two-gentlemen-of-verona", "Bu t yet", "But yet"),
    ("two-gentlemen-of-verona", "JULlA", "JULIA"),
    ("edward-iii", "### SCENE IV. The same. A part", "### SCENE VI. The same. A part"),
    ("henry-iv-part-2", "th e peace", "the peace"),
    ("henry-iv-part-2", "I 'll", "I'll"),
    ("henry-iv-part-1", "there 's", "there's"),
    ("henry-v", "c rystals", "crystals"),
    ("henry-v", "DUKE oF BOURBON", "DUKE OF BOURBON"),
    ("henry-vi-part-1", "**SU FFOLK**", "**SUFFOLK**"),
    ("henry-vi-part-2", "h is brother", "his brother"),
    ("henry-vi-part-3", "sha$l", "shall"),
    ("henry-vi-part-3", "awhi le", "awhile"),
    ("henry-viii", "m the evening", "in the evening"),
    ("henry-viii", "shal l", "shall"),
    (
        "henry-viii",
        "_Enter NORFOLK at one",
        "### SCENE I. London. An ante-chamber in the palace.\n\n_Enter NORFOLK at one",
    ),
    ("king-john", "Whi ch", "Which"),
    ("richard-ii", "if n ot", "if not"),
    ("richard-ii", "kn ees", "knees"),
    ("richard-iii", "Who m eets", "Who meets"),
    ("all-s-well-that-ends-well", "&amp; c.", "& c."),
    ("measure-for-measure", "A s mine", "As mine"),
    ("measure-for-measure", "**POMPHEY**", "**POMPEY**"),
    ("the-taming-of-the-shrew", "younges t", "youngest"),
    ("the-taming-of-the-shrew", "**KATARINA**", "**KATHARINA**"),
    ("troilus-and-cressida", "A nd we", "And we"),
    ("antony-and-cleopatra", "fa rewell", "farewell"),
    ("julius-caesar", "t hat lies", "that lies"),
    ("titus-andronicus", "wil l make", "will make"),
    ("cymbeline", "god s and", "gods and"),
    ("cymbeline", "Britain s harts", "Britain's harts"),
    ("cymbeline", "stone s,", "stones,"),
    ("cymbeline", "**Scene III**  \n", "### SCENE III. "),
    ("cymbeline", "**Posthumus Leonatus**", "**POSTHUMUS LEONATUS**"),
    ("pericles", "doin g", "doing"),
    ("the-tempest", "_Enter PROSPERO and MIRANDA_", "### SCENE II. The island.\n\n_Enter PROSPERO and MIRANDA_"),
    ("the-tempest", "### EPILOGUE. \n\nSPOKEN BY PROSPERO", "### EPILOGUE.\n\n_Spoken by PROSPERO_\n\n**PROSPERO**"),
    ("the-tempest", "_Burthen _\\[dispersedly, within_", "_Burthen, dispersedly, within_"),
    ("hamlet", "**ROSENCRANTZ: & GUILDENSTERN:**", "**ROSENCRANTZ & GUILDENSTERN**"),
    ("hamlet", "the play 's the thing", "the play's the thing"),
    ("macbeth", "kno wn", "known"),
    ("othello", "Saints m your", "Saints in your"),
    ("othello", "My lord , my", "My lord, my"),
    ("romeo-and-juliet", "**NURSE**", "**Nurse**"),
    ("timon-of-athens", "Hav e", "Have"),
    ("timon-of-athens", "\nBoth  \n\n**Varro's Servants**", "\n\n**Both Varro's Servants**"),
)

HEADING = re.compile(r"(#+) *([^\n]+?)\.? *$")
SPEAKER = re.compile(r"\*\*(.+?)\*\*\s*")
MARKED = re.compile(r"[_*]*\\?\[\s*([^\[\]]*?)\s*\][_*]*|([_*])\s*([^_*]+?)\s*\2")


def scenes(markdown: str, play: str) -> Iterator[str]:
    """The scenes of one play in order, each ending with one newline. `play` selects the rows of TYPOS.

    Raises ValueError if an error listed in TYPOS does not occur: then the text is another edition.
    """
    act, heading, blocks = "", "", list[str]()
    for block in re.split(r"\n\s*\n", correct(markdown, play).strip()):
        head = HEADING.match(block)
        if not head:
            blocks.append(clean(block))
            continue
        if any(not block.startswith("[") for block in blocks):  # else: an entrance before its heading
            yield "\n\n".join([heading, *blocks]) + "\n"
            blocks = []
        level, title = len(head[1]), clean(head[2])
        if title.startswith("SCENE"):
            heading = f"{act} {title}."
        elif level == 2 or title.startswith("ACT"):
            act = heading = f"{title}."
        elif level == 1:  # the play's title, directly followed by a heading, or its epilogue
            heading = f"{title}."
        else:
            heading = f"{act} {title.upper()}."
    yield "\n\n".join([heading, *blocks]) + "\n"


def correct(markdown: str, play: str) -> str:
    """The text with RULES and TYPOS applied."""
    for pattern, right in RULES:
        markdown = re.sub(pattern, right, markdown)
    for where, wrong, corrected in TYPOS:
        if where == play:
            if wrong not in markdown:
                raise ValueError(
                    f"shakespeare: {play} does not contain {wrong!r}: not the edition that TYPOS applies to"
                )
            markdown = markdown.replace(wrong, corrected)
    return markdown.replace("\u2014", "--").replace("&amp;", "&").replace("& c", "&c")


def clean(block: str) -> str:
    """One block of Markdown (no blank line inside) as plain text."""
    name = SPEAKER.match(block)
    speech = MARKED.sub(direction, block[name.end() :] if name else block)
    lines = [re.sub(r" +([,;:?!])", r"\1", line.replace("\\", "").strip()) for line in speech.split("\n")]
    if name:
        lines.insert(0, " ".join(name[1].split()) + ":")
    return "\n".join(line for line in lines if line)


def direction(match: re.Match[str]) -> str:
    """`_Enter HAMLET,\\nreading_` -> `[Enter HAMLET, reading]`. Empty ones, which mark lost words, are removed."""
    words = " ".join((match[3] if match[1] is None else match[1]).split())
    words = re.sub(r" ('[sS]\b)", r"\1", words).replace("- ", "-")
    return f"[{words}]" if words else ""
