"""What the programs in related/ refuse on their command lines alike."""
from toy.world import tokenize


def refuse_blank_name(parser, name):
    """Ends with a line of usage at a --name that nobody could see in the run folder."""
    if name is not None and not name.strip():
        parser.error(f"--name {name!r} is blank: choose another")


def refuse_unknown_words(parser, captions):
    """Ends with a line of usage at captions, of --prompt, with words that the toy world does not know, or too many."""
    try:
        tokenize(captions)
    except ValueError as error:
        parser.error(f"--prompt: {error}")
