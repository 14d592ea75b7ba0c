"""Memory that a compilation without a card does not count: the scratch space of cuDNN's attention."""


def backward_bytes(rows: int, length: int, segments: int, heads: int, head_dim: int) -> int:
    """Scratch of one packed backward pass: B·M·T·(4·N·H + 2·2·N·H + 4·N) bytes.

    dq in float32, dk and dv of all query heads in 16 bits, and one float32 a head. cuDNN 9 on an H100 asked for 2,816
    bytes more at B = 1, M = 8, T = 8,192, N = 24, H = 128. It counts where a program needs most memory during a
    backward pass: with layers in a loop it does, with layers written out the head's chunks need more.

    Args:
      rows: B of a microbatch on one device.  length: T.  segments: M that the kernel is compiled for.
      heads, head_dim: N query heads of H.
    """
    return rows * segments * length * (4 * heads * head_dim + 2 * 2 * heads * head_dim + 4 * heads)
