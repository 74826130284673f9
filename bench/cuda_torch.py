#!/usr/bin/env python3
"""Decode attention of PyTorch, BF16, 32 query heads over 8 KV heads of 128: what bench/cuda_attention is compared with.

For every length: the best of its back ends and of two ways to say grouped queries. Inputs are rotated through copies.
"""
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def microseconds(run, copies):
    times = []
    for round in range(13):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(copies):
            run(i)
        end.record()
        end.synchronize()
        if round >= 2:
            times.append(begin.elapsed_time(end) * 1000 / copies)
    return statistics.median(times)


def graph(run, copies):
    """The launches of all copies as one graph, so that Python's time does not count."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            run(i % copies)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for i in range(copies):
            run(i)
    return captured


def main():
    if not torch.cuda.is_available():
        sys.exit("cuda_torch.py: no GPU")
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}")
    lengths = [int(a) for a in sys.argv[1:]] or [16384, 131072]
    for n in lengths:
        copies = max(2, min(32, (1 << 30) // (n * 8 * 128 * 4)))
        kv = [[torch.randn(1, 8, n, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(copies)]
        q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
        grouped = q.reshape(1, 8, 4, 128)  # a KV head's queries as four rows: K and V are read once
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION),
                              ("efficient", SDPBackend.EFFICIENT_ATTENTION)):
            for how, run in (("enable_gqa", lambda i: F.scaled_dot_product_attention(q, *kv[i], enable_gqa=True)),
                             ("four rows", lambda i: F.scaled_dot_product_attention(grouped, *kv[i]))):
                try:
                    with sdpa_kernel(backend):
                        captured = graph(run, copies)
                        us = microseconds(lambda _: captured.replay(), 1) / copies
                    print(f"{n:>8} tokens  {name:<10} {how:<11} {us:9.1f} us  {n * 8 * 128 * 4 / us * 1e-3:7.0f} GB/s",
                          flush=True)
                except RuntimeError as error:
                    print(f"{n:>8} tokens  {name:<10} {how:<11} {str(error).splitlines()[0][:60]}")


main()
