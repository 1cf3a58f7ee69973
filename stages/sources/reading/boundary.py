"""Where a prompt ends and its response begins: spaces between the two are the response's.

Byte-level tokenizers spell a word inside a sentence with the space before it, so a prompt that
kept that space would end in a token that no running text has there.
"""


def at_spaces(prompt: str) -> tuple[str, str]:
    """Return a prompt without the spaces at its end, and those spaces; line breaks stay."""
    bare = prompt.rstrip(" ")
    return bare, prompt[len(bare) :]
