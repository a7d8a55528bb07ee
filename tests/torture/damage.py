"""What is done to heed: how files are damaged, values at the edges of every field, hostile texts."""

import random
import shutil
from pathlib import Path

from training.config import SECTIONS
from training.config_files import fields

SMALLEST = [
    "--model.n_layer=1", "--model.n_embd=16", "--model.n_head=1", "--model.n_kv_head=1", "--model.head_dim=16",
    "--model.n_ffn=16", "--model.context=16", "--train.batch_tokens=64", "--train.micro_batch_size=4",
    "--train.compile=off", "--train.dtype=float32", "--train.device=cpu", "--train.num_evals=2", "--train.prompt=",
    "--data.val_fraction=0.2", "--data.tokenizer=byte", "--optim.warmup_steps=2", "--train.save_minutes=0",
]  # fmt: skip

DAMAGES = ("cut", "emptied", "one byte", "flipped", "noise", "text", "json", "zeros", "longer", "gone", "unreadable")


def damage(path: Path, how: str, seed: int = 0) -> None:
    """Damage a file."""
    raw, number = bytearray(path.read_bytes()), random.Random(f"{path.name} {how} {seed}")
    path.unlink()
    if how == "unreadable":  # for root, too, who may read every file
        path.mkdir()
    elif how != "gone":
        if how == "flipped":
            raw[number.randrange(len(raw))] ^= 1 << number.randrange(8)
        changed = {
            "cut": raw[: number.randrange(len(raw))],
            "emptied": b"",
            "one byte": b"\xff",
            "flipped": raw,
            "noise": number.randbytes(len(raw)),
            "text": b"not what was here before\n" * 9,
            "json": number.choice([b"[]", b"{}", b"null", b"7", b'"x"', b"[" * 50_000, b'{"step": {}}']),
            "zeros": bytes(len(raw)),
            "longer": raw + b"more",
        }
        path.write_bytes(changed[how])


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fresh(source: Path, target: Path) -> Path:
    """A copy of a folder, in place of an older one."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


EDGES = (
    "", " ", "0", "1", "-1", "2", "-0.0", "0.5", "1e-320", "1e308", "nan", "inf", "-inf", "2147483647",
    "9223372036854775807", "-9223372036854775808", "1" + "0" * 40, "1e400", "true", "[]", "{x = 1}", '"x"', "'",
    "2020-01-01", "None", "x" * 300, "é\u202e\U0001f600", "../nowhere", "/dev/null", "a\nb", "%s{0}", "-", "=",
)  # fmt: skip
ENDLESS = ("train.steps", "train.minutes")  # a large one is no mistake: only the configuration is made


def flag_cases() -> list[tuple[str, ...]]:
    """A command line for every field and every edge value."""
    names = [f"{section}.{name}" for section in SECTIONS for name in fields(section)]
    cases = [
        (f"--{name}={value}", *(["--print-config"] if name in ENDLESS else [])) for name in names for value in EDGES
    ]
    return cases + [(f"--{name}={value}",) for name in ("name", "init-from") for value in EDGES]


def toml_cases() -> list[str]:
    """Recipes: an edge value of every field, and files that are no recipes."""
    cases = [
        f"[{section}]\n{name} = {value}\n"
        for section in SECTIONS
        for name in fields(section)
        for value in ("nan", "-inf", "-1", "true", '""', "[1]", "{}", "9223372036854775807")
        if f"{section}.{name}" not in ENDLESS
    ]
    broken = ["", "[", "[model", "model = 3\n", "[[model]]\n", "name = 3\n", "[model.n_layer]\nx = 1\n", "x = 1\n",
              "[model]\nn_layer = 1\nn_layer = 2\n", "\x00", "\ufeff[model]\n", "[data]\nsource = \"a\\u0000b\"\n",
              "a = " + "[" * 20_000, "[train]\nsteps = 1\nminutes = 1.0\n", f'name = "{"x" * 300}"\n']  # fmt: skip
    table = '[[data.sources]]\nsource = "nowhere.txt"\n'
    mixtures = [table, table * 2, f"{table}weight = 1\n", f"{table}weight = 1\n{table}weight = nan\n",
                f"{table}weight = 1e308\n{table}weight = 1e308\n", f"{table}weight = 1e-320\n", f"{table}weight = []\n",
                f"[data]\nsource = 'x'\n{table}weight = 1\n", "[data]\nsources = 3\n", "[data]\nsources = [[]]\n",
                "[data.sources]\n", "[[data.sources]]\n", "[[data.sources.source]]\n",
                '[data]\n"sources.weight" = 1.0\n',
                "[[data.sources]]\nsource = '/dev/null'\nweight = 1\n" * 50]  # fmt: skip
    return cases + broken + mixtures


def texts(long: bool) -> dict[str, bytes]:
    """File name -> hostile content."""
    number, line = random.Random(1), b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"'
    size = 100_000_000 if long else 1_000_000
    plain = "".join(f"Line {n} of a text with birds and bees.\n" for n in range(300)).encode()
    return {
        "empty.txt": b"", "newline.txt": b"\n", "one.txt": b"a", "nul.txt": plain + b"\0",
        "bom.txt": b"\xef\xbb\xbf" + plain, "bom-only.txt": b"\xef\xbb\xbf",
        "utf-16.txt": plain.decode().encode("utf-16"),
        "latin-1.txt": b"caf\xe9 " * 999,
        "cut.txt": plain + b"\xc3", "surrogates.txt": plain + b"\xed\xa0\x80", "noise.txt": number.randbytes(9999),
        "line.txt": b"".join(b"word %d " % n for n in range(size // 13)),
        "space.txt": b" " * 9999, "controls.txt": bytes(range(1, 32)) * 99,
        "separators.txt": b"<|endoftext|>\n" * 99, "marks.txt": b"<|im_start|>user\n<|im_end|>" * 99,
        "gzip.txt": b"\x1f\x8b\x08\0" + number.randbytes(999), "crlf.txt": plain.replace(b"\n", b"\r\n"),
        "deep.jsonl": b"[" * 100_000 + b"]" * 100_000, "empty.jsonl": b"", "noise.jsonl": number.randbytes(999),
        "numbers.jsonl": b"1\n2\n3\n", "nulls.jsonl": b"null\n" * 9, "lists.jsonl": b"[1, 2]\n" * 9,
        "other.jsonl": b'{"body": "x"}\n' * 99, "number.jsonl": b'{"text": 7}\n' * 99,
        "none.jsonl": b'{"text": null}\n' * 99,
        "mixed.jsonl": b'{"text": "x"}\n{"text": 3}\n', "surrogate.jsonl": b'{"text": "a \\ud800 b"}\n' * 99,
        "cut.jsonl": b'{"text": "x"}\n{"te', "good.jsonl": b'{"text": "%s"}\n' % (b"good " * 99) * 99,
        "deep-chat.jsonl": b'{"messages": ' + b"[" * 100_000, "cut-chat.jsonl": line, "roles.jsonl": line + b': 3}]}\n',
        "no-turns.jsonl": b'{"messages": []}\n' * 9, "null-turns.jsonl": b'{"messages": [null, 3]}\n' * 9,
        "surrogate-chat.jsonl": (line + b', "content": "\\udfff"}]}\n') * 99,
        "fake.parquet": plain, "empty.parquet": b"", "magic.parquet": b"PAR1" + number.randbytes(99) + b"PAR1",
        "fake.json": plain, "deep.json": b"[" * 100_000, "object.json": b'{"text": ["a", "b"]}',
        "empty.bin": b"", "noise.bin": number.randbytes(9998), "odd.bin": b"abc", "zeros.bin": bytes(9998),
        "unknown.pdf": b"%PDF-1.4\n" + number.randbytes(999), "long.md": b"#" * 9999,
    }  # fmt: skip
