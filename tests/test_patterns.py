from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge import patterns
from streammerge.patterns import Pattern, PatternError, compiled

PARTS = ("a", "b", "[ab]", "[^a]", ".", r"\b", r"\B", "^", "$", r"\Z", r"\d", "(?i:A)", "(?=a)", "(?!b)", "(?<=a)",
         "(?<!ab)", "(?s:.)", r"\n", "")  # fmt: skip
REPEATS = ("*", "+", "?", "{2}", "{1,3}", "*?", "+?", "{0,2}?")
regexes = st.recursive(
    st.sampled_from(PARTS),
    lambda inner: (
        st.builds("(?:{}|{})".format, inner, inner)
        | st.builds("({}){}".format, inner, st.sampled_from(REPEATS))
        | st.builds("{}{}".format, inner, inner)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(regexes, st.text("abA1\n", max_size=8))
def test_keeping_every_place_finds_what_re_finds(regex: str, name: str) -> None:
    expected = re.search(regex, name) is not None
    assert Pattern(regex).is_in(name) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "MOST_RE_STEPS", -1)
        assert Pattern(regex).is_in(name) == expected


@pytest.mark.parametrize(
    ("regex", "name", "found"),
    [
        (r"(^|\.)layers\.(\d|1\d)\.", "model.layers.12.mlp", True),
        (r"(?!.*bias).*norm", "model.norm.bias", False),
        (r"(?i)NORM", "model.norm", True),
        (r"((q|k|v)_proj)\1?", "q_proj", True),
        (r"x*+y", "xxy", True),
    ],
)
def test_what_rules_are_made_of_means_what_re_means(regex: str, name: str, found: bool) -> None:
    if "*+" in regex and not hasattr(re, "NOFLAG"):
        pytest.skip("possessive repeats came with Python 3.11")
    assert Pattern(regex).is_in(name) == found


@pytest.mark.parametrize(
    ("regex", "name"),
    [
        (r"(a+)+$", "a" * 5000 + "!"),
        (r"^(([a-z])+.)+[A-Z]([a-z])+$", "a" * 5000),
        (r"^(a|a)*$", "a" * 5000 + "!"),
        (r"(.*)*x", "a" * 5000),
        (r"(((a*)*)*)*b", "a" * 1000),
        (r"(?:(?:(?:a?){99}){99}){99}b", "a" * 500),
        (r".*.*.*.*.*=", "a" * 5000),
        (r"(\.?\w+)*(?<!w)eight", "model.layers.0.self_attn.q_proj." * 20 + "!"),
    ],
)
def test_a_pattern_that_would_never_end_is_answered(regex: str, name: str) -> None:
    assert not Pattern(regex).is_in(name)


@pytest.mark.parametrize("regex", [r"(a+)+\1$", r"(?:(a)|b)*(?(1)c|d)"])
def test_a_pattern_without_a_bound_is_refused(regex: str) -> None:
    with pytest.raises(PatternError, match="repeats what itself repeats or chooses"):
        Pattern(regex)


def test_a_search_that_takes_too_many_steps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MOST_STEPS", 1000)
    with pytest.raises(PatternError, match=r"`\(a\+\)\+\$` takes too long to look for in `aaa"):
        Pattern(r"(a+)+$").is_in("a" * 5000 + "!")
    with pytest.raises(PatternError, match="takes too long"):
        Pattern(r"(a*)(a*)(a*)\1\2\3b").is_in("a" * 1000)


@pytest.mark.parametrize("regex", ["(", "a{2,1}", "(" * 2000 + ")" * 2000, "a{99999999999}", "(?P<n>a)(?P<n>a)"])
def test_what_is_no_regular_expression_is_refused(regex: str) -> None:
    with pytest.raises(PatternError, match="is not a regular expression"):
        Pattern(regex)


def test_a_pattern_is_read_once() -> None:
    assert compiled("a+") is compiled("a+")
