"""Which implementation serves a scaled GEMM on a GPU: the candidates, the choice among them, its memory on disk."""
