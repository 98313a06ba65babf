"""Layer patterns: one character for each residual sublayer, as Megatron-LM and Nemotron-H do.

A layer of ours has a mixer and a feed-forward, each behind a norm and added to the stream; two
sublayers of a pattern make one layer where a mixer is followed by a feed-forward, and a sublayer
that stands alone is a layer without the other half.
"""

from __future__ import annotations

MIXERS = {
    "*": "full_attention",
    "W": "sliding_attention",
    "M": "mamba2",
    "S": "mamba2s",
    "2": "2mamba",
    "X": "2mamba_e",
}
FEED_FORWARDS = {"-": "dense", "E": "moe"}
NOT_HERE = {
    "G": "gated delta net layers are not implemented",
    "D": "sparse attention layers are not implemented",
    "+": "multi-head latent attention is not implemented",
    "|": "pipeline stages are set in [parallel]; remove it",
    "/": "multi-token prediction is not implemented; remove what follows",
}


def parse_layer_pattern(pattern: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mixer and feed-forward of every layer.

    Raises ValueError that names the character which is unknown or stands for something that is not
    here.
    """
    mixers: list[str] = []
    feed_forwards: list[str] = []
    awaits_feed_forward = False
    for place, letter in enumerate(pattern):
        if letter in MIXERS:
            mixers.append(MIXERS[letter])
            feed_forwards.append("none")
            awaits_feed_forward = True
        elif letter in FEED_FORWARDS:
            if not awaits_feed_forward:
                mixers.append("none")
                feed_forwards.append("none")
            feed_forwards[-1] = FEED_FORWARDS[letter]
            awaits_feed_forward = False
        else:
            known = " ".join([*MIXERS, *FEED_FORWARDS])
            reason = NOT_HERE.get(letter, f"the letters are {known}")
            raise ValueError(f"layer_pattern has {letter!r} at place {place}: {reason}")
    return tuple(mixers), tuple(feed_forwards)
