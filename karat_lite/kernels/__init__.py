"""The core of Kolmogorov-Arnold attention computed without keeping scores: block by block, or in one GPU kernel.

    S_kq = scale Q_k . K_q,    Y_ke = sum_f sum_q psi_f(S_kq) R_fqe

One operation serves the modular operator (R the coefficients, e its r units) and the full-rank one (R the values mixed
over tokens, e their d channels). functional.py says which; here stand the ways to compute it and its gradients.
"""
