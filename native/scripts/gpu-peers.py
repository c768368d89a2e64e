#!/usr/bin/env python3
"""What the GPU and cuDNN's attention (through PyTorch) reach, beside what `tca-test-cuda bench` prints of our kernels and stock's.

    gpu-peers.py            skips with one line where PyTorch with CUDA is missing

Ceilings: copy and read of 2 GB, a matrix product; none in a CUDA graph, where copies run at two thirds of the speed. Attention: one
layer of an 8B shape (32 heads, 8 KV heads of 128, f16), all regions of one length, no mask. K and V rotate over far more memory
than the L2 cache holds. Decode is timed in CUDA graphs, as ours is.
"""

import statistics
from collections.abc import Callable

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
except ImportError:
    torch = None

HEADS, HEADS_KV, DIM = 32, 8, 128
ROTATE = 640 << 20  # bytes of K and V


def milliseconds(run: Callable[[], object], n: int = 1) -> float:
    """Median time of run() over its n parts."""
    times = []
    for i in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / n)
    return statistics.median(times)


def half(*shape: int) -> "torch.Tensor":
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


def ceilings() -> None:
    x = torch.randn(512 << 20, device="cuda")
    y = torch.empty_like(x)
    size = x.nbytes / 1e9
    print(f"ceiling    copy {2 * size / milliseconds(lambda: y.copy_(x)):.2f} TB/s, bytes read and written")
    print(f"ceiling    read {size / milliseconds(lambda: torch.sum(x)):.2f} TB/s")
    a, b = half(8192, 8192), half(8192, 8192)
    print(f"ceiling    f16 matrix product {2 * 8192**3 / 1e9 / milliseconds(lambda: [a @ b for _ in range(10)], 10):.0f} TFLOP/s")


def attention(n_tokens: int, length: int) -> None:
    size = 2 * HEADS_KV * length * DIM * 2
    n_sets = min(max(-(-ROTATE // size), 2), 400) if n_tokens == 1 else 2
    q = half(1, HEADS, n_tokens, DIM)
    sets = [(half(1, HEADS_KV, length, DIM), half(1, HEADS_KV, length, DIM)) for _ in range(n_sets)]

    def run() -> None:
        for k, v in sets:
            scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    ms = milliseconds(graph.replay, n_sets)
    if n_tokens == 1:
        print(f"decode     f16   cuDNN   mean {length:6}: {ms:8.4f} ms  {size / 1e9 / ms:5.2f} TB/s")
    else:
        tflop = 4 * DIM * HEADS * n_tokens * length / 1e12
        print(f"prefill    f16   cuDNN   mean {length:6} tokens {n_tokens:4}: {ms:8.4f} ms  {tflop / ms * 1e3:5.0f} TFLOP/s")


def main() -> None:
    if torch is None or not torch.cuda.is_available():
        print("skip   gpu-peers: no PyTorch with CUDA")
        return
    ceilings()
    for length in (256, 1024, 4096, 16384, 51200, 131072):
        attention(1, length)
    for n_tokens, length in ((512, 2048), (512, 8192), (512, 51200), (2048, 32768), (2048, 131072)):
        attention(n_tokens, length)


if __name__ == "__main__":
    main()
