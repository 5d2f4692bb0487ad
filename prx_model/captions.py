"""The one step between a caption as someone wrote it and what a text tower reads.

Training, the text cache, evaluation and generate.py all take it, once, as exported pipelines do: so a prompt gives the
same tokens everywhere. Needs ftfy, which the extras `model` and `train` bring.
"""

import html


def clean_caption(caption: str) -> str:
    r"""A caption as diffusers' `PRXPixelPipeline` cleans a prompt: ftfy, HTML entities twice, no blanks around it.

    `" a red cat "` gives `"a red cat"`, `"sign “Hi”"` straight quotes, `"cats &amp; dogs"` an `&`. ftfy also undoes
    text that was decoded wrongly (`"schÃ¶n"`), composes accents (NFC), makes full-width letters and ligatures plain,
    and takes control characters out. A microsecond where plain ASCII needs none of this, else 20 to 300.
    """
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return caption.strip()  # nothing else in it that ftfy or HTML would change
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
