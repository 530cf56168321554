"""`fp8c inspect`, `fp8c export`: what a build holds, read from its files and shown. Nothing here imports torch."""
