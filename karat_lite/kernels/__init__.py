"""Fused GPU kernels. Each module imports Triton itself: import one only where it is used."""
