"""
FLOPs of training and of an outer step, as all benches count them. A multiply-add counts 2, a
backward pass as two forward passes (Kaplan et al., arXiv 2001.08361), and a lookup nothing.
config is a GPTConfig.
"""


def forward_flops(config):
    """Of one token: 2 per weight of the blocks and of the head, and attention."""
    L, C, V, T = config.n_layer, config.n_embd, config.vocab_size, config.block_size
    weights = 12 * L * C**2 + V * C
    attention = 2 * L * T * C  # two matmuls of T x C per token, of which a causal mask needs half
    return 2 * weights + attention


def training_flops(config, tokens):
    """Of a forward and backward pass over so many tokens."""
    return 3 * tokens * forward_flops(config)


def outer_step_flops(config, target_tokens, pieces, curvature=True):
    """
    Of one outer step of fastmix.py: the target's forward pass and its gradient at the head; the
    inverse curvature, unless a method goes without; and one product of V x C numbers for each
    piece, which is what one chunk of the loss holds of one source.
    """
    C, V = config.n_embd, config.vocab_size
    head = 2 * V * C
    target = target_tokens * (forward_flops(config) + head)
    if curvature:
        second_moment = 2 * target_tokens * C**2  # of the hidden states
        inverse = 2 * C**3
        product = head * C  # the target's gradient (V, C) times that inverse
        target += second_moment + inverse + product
    return target + pieces * head
