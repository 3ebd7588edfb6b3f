"""Parts of reading and writing PEFT's files that need no model."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from tfimm_lora.lora.peft.config import check_config
from tfimm_lora.lora.peft.json_file import read_json
from tfimm_lora.lora.peft.tensors import merge_shared
from tfimm_lora.weights.regex import UnsupportedRegexError, fullmatch, match_start


def test_bounded_matcher_agrees_with_python():
    """Random patterns and texts: the same answers as ``re``."""
    rng = np.random.default_rng(0)
    atoms = ["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", "(?:a|b)", "(a|ab)", "c", r"\w", "[a-c1]"]
    counts = ["", "", "*", "+", "?", "{2}", "{1,3}", "*?", "+?"]
    seen = {True: 0, False: 0}
    for _ in range(3000):
        parts = [rng.choice(atoms) + rng.choice(counts) for _ in range(int(rng.integers(1, 6)))]
        pattern = rng.choice(["", "^", "(?=a)", "(?!b)"]) + "".join(parts) + rng.choice(["", "$"])
        if rng.random() < 0.4:
            pattern = f"({pattern})" + rng.choice(["*", "+", "?", "|c", "{0,2}"])
        text = "".join(rng.choice(list("abc.1")) for _ in range(int(rng.integers(0, 7))))
        expected = re.fullmatch(pattern, text) is not None
        assert fullmatch(pattern, text) == expected, (pattern, text)
        assert match_start(pattern, text) == (re.match(pattern, text) is not None), (pattern, text)
        seen[expected] += 1
    assert min(seen.values()) > 300
    with pytest.raises(UnsupportedRegexError, match="A name has 2000 characters"):
        fullmatch("a*", "a" * 2000)


def test_layers_that_disagree_on_what_is_shared():
    large = np.arange(12.0).reshape(3, 4)
    merged = merge_shared([{"v": large[:2]}, {"v": large}, {"v": large[:, :3]}], ("v",))
    np.testing.assert_array_equal(merged["v"], large)
    with pytest.raises(ValueError, match="The layers have different v, which PEFT stores once"):
        merge_shared([{"v": large}, {"v": large[:2] + 1}], ("v",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no JSON object: it is a list"),
        ("3", "is no JSON object: it is a int"),
        ("", "is no JSON object"),
        ("{", "is no JSON object"),
        ('{"r": 2, "r": 3}', "is no JSON object: the key 'r' is there twice"),
        ('{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}', "the key 'a' is there twice"),
        ('{"lora_alpha": NaN}', "is no JSON object: NaN is no number"),
        ('{"lora_alpha": Infinity}', "is no JSON object: Infinity is no number"),
        ('{"lora_alpha": 1e999}', "is no JSON object: 1e999 is too large a number"),
        (
            '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}",
            "is no JSON object|r has to be an integer",
        ),
        ('{"a": ' * 100_000, "is no JSON object: it is nested too deeply"),
        ("[" * 100_000, "is no JSON object: it is nested too deeply"),
        (b"\xff\xfe\x00{", "is no JSON object"),
    ],
)
def test_json_that_is_none(text: str | bytes, message: str, tmp_path: Path):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        check_config(read_json(path), "config")


def test_a_config_of_a_gigabyte_is_not_read(tmp_path: Path):
    path = tmp_path / "adapter_config.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"has 1,073,741,824 bytes; a config of an adapter has a"):
        read_json(path)
    assert time.perf_counter() - start < 2
