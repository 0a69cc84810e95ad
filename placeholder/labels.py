"""How names and errors from strangers are shown in our own messages: on one line, cut short, without control characters."""

MAX_SHOWN = 120  # characters of a name
MAX_REASON = 400


def quoted(name: str) -> str:
    """A name in quotation marks, with control characters escaped, and cut in the middle where it is long."""
    return _cut(repr(name), MAX_SHOWN)


def label(name: str) -> str:
    """A name as it is, or quoted where that would disturb a log."""
    return name if name.isprintable() and len(name) <= MAX_SHOWN else quoted(name)


def reason(error: BaseException) -> str:
    """What an error of a library says, for use within a sentence of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return _cut("".join(character if character.isprintable() else "?" for character in text), MAX_REASON)


def _cut(text: str, limit: int) -> str:
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"
