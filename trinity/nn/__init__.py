"""Modules of the backbone: norms, mixers, feed-forwards, experts, and how they are initialised."""
