"""
FLOPs of training and of an outer step, as all benches count them. A multiply-add counts 2, a
backward pass as two forward passes (Kaplan et al., arXiv 2001.08361), and a lookup nothing.
config is a GPTConfig.
"""


def forward_flops(config):
    """Of one token: 2 per weight of the blocks and of the head, and attention."""
    L = config.n_layer
    C = config.n_embd
    weights = 12 * L * C**2 + config.vocab_size * C
    # attention has two matmuls of T x C per token and layer, of which a causal mask needs half
    attention = 2 * L * config.block_size * C
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
    C = config.n_embd
    head = 2 * config.vocab_size * C  # a product of the head with one vector
    target = target_tokens * (forward_flops(config) + head)
    if curvature:
        second_moment = 2 * target_tokens * C**2  # of the hidden states
        inverse = 2 * C**3
        product = head * C  # the target's gradient (V, C) times that inverse
        target += second_moment + inverse + product
    return target + pieces * head
