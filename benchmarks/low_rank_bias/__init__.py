"""The experiments of "The Low-Rank Simplicity Bias in Deep Networks" (Huh et al., TMLR 2023)."""
