"""Benchmarks of training steps and kernels: gated by correctness, interleaved, against the fastest dense form found."""
