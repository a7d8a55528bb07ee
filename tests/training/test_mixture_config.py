"""[[data.sources]] in a recipe: read, written, overridden, and one line with the line number for each mistake."""

import pytest

from training.config import ConfigError, SourceConfig
from training.config_files import dump, load

MIXTURE = """[data]
tokenizer = "byte"

[[data.sources]]
source = "shakespeare"
weight = 70

[[ data.sources ]]
source = "rows.jsonl"
text_column = "body"
weight = 0.5
limit = 9

[train]
steps = 3
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


def test_a_mixture_is_read_and_written(recipe):
    config = load(recipe(MIXTURE))
    assert config.data.sources == (
        SourceConfig("shakespeare", 70.0),
        SourceConfig("rows.jsonl", 0.5, text_column="body", limit=9),
    )
    assert (config.data.source, config.data.tokenizer, config.train.steps) == ("", "byte", 3)
    assert config.data.name == "0.9929 shakespeare + 0.007092 rows.jsonl" and not config.data.chat
    assert load(recipe(dump(config))) == config
    inline = '[data]\nsources = [{source = "a", weight = 1}, {source = "b", weight = 1, format = "chat"}]'
    assert load(recipe(inline)).data.name == "0.5 a + 0.5 b" and load(recipe(inline)).data.chat


def test_a_source_on_the_command_line_replaces_the_mixture(recipe):
    data = load(recipe(MIXTURE), {"data.source": "kjv", "data.limit": "3"}).data
    assert (data.source, data.sources, data.limit, data.tokenizer) == ("kjv", (), 3, "byte")
    assert load(recipe(MIXTURE), {"data.tokenizer": "char"}).data.sources
    with pytest.raises(
        ConfigError, match=r"^--data.limit: data.limit = 3: must be left out with \[\[data.sources\]\]$"
    ):
        load(recipe(MIXTURE), {"data.limit": "3"})
    with pytest.raises(ConfigError, match=r"^--data.sources: data.sources: no such field; did you mean data.source\?$"):
        load(recipe(MIXTURE), {"data.sources": "kjv"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[data]", '[data]\nsource = "kjv"', ":2: data.source = 'kjv': must be left out with [[data.sources]]"),
        ("[data]", '[data]\nval_source = "kjv"', ":2: data.val_source = 'kjv': must be left out with [[data.sources]]"),
        ("[data]", '[data]\nformat = "chat"', ":2: data.format = 'chat': must be left out with [[data.sources]]"),
        ("weight = 70\n", "", ":5: data.sources.weight: is missing in this table"),
        ('source = "rows.jsonl"\n', "", ":9: data.sources.source: is missing in this table"),
        ('source = "rows.jsonl"', 'source = ""', ":9: data.sources.source = '': must name a text"),
        ("weight = 0.5", "weight = 0", ":11: data.sources.weight = 0.0: must be above 0"),
        ("weight = 0.5", "weight = -1", ":11: data.sources.weight = -1.0: must be above 0"),
        ("weight = 0.5", "weight = inf", ":11: data.sources.weight = inf: must be a finite number"),
        ("weight = 0.5", 'weight = "half"', ":11: data.sources.weight = 'half': must be a number, is a string"),
        ("weight = 70", "wieght = 70", ":6: data.sources.wieght: no such field; did you mean data.sources.weight?"),
        ("limit = 9", "limit = -9", ":12: data.sources.limit = -9: must be at least 0"),
        ("limit = 9", 'format = "chats"', ":12: data.sources.format = 'chats': must be text or chat"),
        ("limit = 9", "val_fraction = 0.1", ":12: data.sources.val_fraction: no such field"),
        ("weight = 0.5", "weight = 0.001", ": data.sources: weights [70.0, 0.001]: each must be at least 1/10000 of"),
        ("[[data.sources]]", "[data.sources]", ": not TOML"),
        (MIXTURE, "[data.sources]\nsource = 'a'", ": data.sources = {'source': 'a'}: must be one or more tables, [["),
        (MIXTURE, "[[data.source]]\nsource = 'a'", ": data.source = [{'source': 'a'}]: must be a string, is a list"),
        (MIXTURE, "[data]\nsources = []", ":2: data.sources = []: must be one or more tables, [[data.sources]]"),
        (MIXTURE, '[data]\nsources = ["a"]', ":2: data.sources = ['a']: must be one or more tables"),
        (MIXTURE, "[[data]]\nsource = 3", ": data = [{'source': 3}]: must be a section, [data]"),
        (MIXTURE, "[[sources]]\nweight = 3", ": sources: no such section"),
    ],
)
def test_a_mistake_has_the_line_number(recipe, old, new, message):
    assert old in MIXTURE
    path = recipe(MIXTURE.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).startswith(path + message), error.value
    assert "\n" not in str(error.value)
