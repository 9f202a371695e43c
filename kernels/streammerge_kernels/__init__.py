"""Tensor operations: a torch reference defines each; faster twins may stand in for it."""
