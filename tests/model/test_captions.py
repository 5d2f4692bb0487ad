"""Cleaning of captions: what diffusers' PRX pixel pipeline does to a prompt, on any text."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prx_model.captions import clean_caption

PROMPTS = {
    " a red cat ": "a red cat",
    "sign “Hi”": 'sign "Hi"',
    "it’s": "it's",
    "cats &amp; dogs": "cats & dogs",
    "cats &amp;amp;amp; dogs": "cats & dogs",  # ftfy once, then twice
    "schÃ¶n": "schön",
    "&nbsp;": "",
    "a\x07b\r\nc\x1b[31md": "ab\ncd",
}


@pytest.mark.parametrize(("prompt", "cleaned"), PROMPTS.items())
def test_a_prompt_is_cleaned(prompt: str, cleaned: str) -> None:
    assert clean_caption(prompt) == cleaned


ASCII = st.text(st.characters(max_codepoint=127))


@settings(deadline=None)  # the first example imports diffusers
@given(st.one_of(st.text(), ASCII))
@example("&#72;i  ")
@example("\udc80 half of a pair \ud83d")
@example("\x1f a unit separator \x7f")
def test_any_text_is_cleaned_as_the_published_pipeline_cleans_it(text: str) -> None:
    from diffusers.pipelines.prx.pipeline_prx_pixel import _basic_clean

    assert clean_caption(text) == _basic_clean(text)
