"""Prompts of tiny models that wait for a place in a batch."""

from looplm.infer.engine import Generation

QUEUE = [[3 + (5 * number + place) % 20 for place in range(1 + number % 5)] for number in range(21)]


def spread_eos(generations: list[Generation]) -> int:
    """A token that, taken as EOS, ends these texts at the most different lengths."""
    firsts = {token: {each.ids.index(token) for each in generations if token in each.ids} for token in range(40)}
    return max(firsts, key=lambda token: len(firsts[token]))
